import pytest

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
