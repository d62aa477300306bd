import pytest

from hllm.data import lookup
from hllm.data.lookup import find_row
from hllm.data.schema import Catalog
from hllm.errors import ConfigError

CATALOG = Catalog(["7", "8", "Alien", "9"], {"title": ["Alien", "Aliens (1986) ", "", "8"]})


@pytest.mark.parametrize(
    ("name", "row"), [("alien", 0), (" ALIENS (1986)", 1), ("7", 0), ("8", 3), ("9", 3), ("Aliens (1986) ", 1)]
)
def test_titles_go_before_ids_and_case_and_outer_spaces_do_not_matter(name: str, row: int) -> None:
    assert find_row(CATALOG, name, "item") == row


@pytest.mark.parametrize(
    ("name", "hint"),
    [("alein", "did you mean 'Alien'"), ("(1986)", "did you mean 'Alien"), ("§§§", "no title is like it")],
)
def test_an_unknown_name_gets_near_ones_suggested(name: str, hint: str) -> None:
    with pytest.raises(ConfigError) as error:
        find_row(CATALOG, name, "item")
    assert str(error.value).startswith(f"item: {name!r} is not in the catalogue; {hint}")


def test_a_name_as_it_is_written_goes_before_one_in_another_case() -> None:
    assert find_row(Catalog(["1", "2"], {"title": ["alien", "Alien"]}), "Alien", "item") == 1


@pytest.mark.parametrize("wrong", ["Film nr 12345 of the serie", "film number 1245 of teh series", "ilm number 12345"])
def test_of_many_titles_only_the_likely_ones_are_compared(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    match = lookup.difflib.get_close_matches
    monkeypatch.setattr(
        lookup.difflib,
        "get_close_matches",
        lambda name, names, **options: seen.append(len(names)) or match(name, names, **options),
    )
    titles = [f"{number:x} other {number * 7:o}" for number in range(20_000)] + ["Film number 12345 of the series"]
    with pytest.raises(ConfigError, match="did you mean 'Film number 12345 of the series'"):
        find_row(Catalog([str(row) for row in range(len(titles))], {"title": titles}), wrong, "item")
    assert seen == [lookup.NUM_CANDIDATES]
