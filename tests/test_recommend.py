"""Ranked titles for a history, also of items that were not in training."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import NUM_MOVIES, WORDS, Run

from hllm.errors import ConfigError, DataError
from hllm.evaluate import checkpoint_config
from hllm.recommend import Recommendations, main


def title(movie: int) -> str:
    return f"{WORDS[movie]} {WORDS[-movie]} ({1960 + movie})"


@pytest.fixture(scope="module")
def load() -> Callable[..., Recommendations]:
    def loaded(run: Run, *args: object) -> Recommendations:
        return Recommendations(checkpoint_config(run.best, None, None), run.best, *args)

    return loaded


@pytest.fixture(scope="module")
def model(id_run: Run, load: Callable[..., Recommendations]) -> Recommendations:
    return load(id_run)


@pytest.fixture
def new_items(tmp_path: Path) -> Path:
    path = tmp_path / "new.csv"
    path.write_text('id,title,genres\n900,"word1, the sequel",Drama\n901,word2 word3,\n')
    return path


def printed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    """Rows of the printed table, without its head."""
    capsys.readouterr()  # what a fixture's training printed
    main(arguments)
    lines = capsys.readouterr().out.splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 1
    return capsys.readouterr().err


def test_a_model_that_reads_when_its_target_happens_is_told_by_now(
    run_training: Callable[..., Run], load: Callable[..., Recommendations], capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_training("items=id", "user=hstu", "user.target_time=true", "user.time_gaps=true", "trainer.max_epochs=1")
    model = load(run)
    history = model.history_of_user("1")
    newest = int(history.timestamps[0, -1])
    assert history.target_times[0, -1] == newest
    assert history.target_times[0, :-1].equal(history.timestamps[0, 1:])
    arguments = [f"ckpt={run.best}", "user=1", "k=5"]
    tables = [printed([*arguments, *now], capsys) for now in ([], [f"now={newest}"], [f"now={newest + 10**7}"])]
    assert tables[0] == tables[1] != tables[2]


def test_titles_are_dated_by_the_newest_event_or_now(
    run_training: Callable[..., Run], load: Callable[..., Recommendations]
) -> None:
    flags = ["user.target_time=true", "user.time_features=true", "user.time_gaps=true", "trainer.max_epochs=1"]
    run = run_training("items=id", "user=hstu", *flags)
    for now in (None, 880_400_000):
        model = load(run, None, now)
        when = now or model.datamodule.interactions.timestamps.max()
        history = model.history_of_titles([title(3), title(4)])
        assert history.timestamps.tolist() == history.target_times.tolist() == [[when] * 2]


def test_now_is_refused_where_nothing_reads_it(id_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused([f"ckpt={id_run.best}", "user=1", "now=880000000"], capsys)
    assert "now=880000000: only a model with user.target_time=true" in message


def test_a_users_cold_items_are_neither_read_nor_recommended(
    run_training: Callable[..., Run], load: Callable[..., Recommendations]
) -> None:
    model = load(run_training("items=cached", "dataset.cold_items=0.4", "trainer.max_epochs=1"))
    history = model.history_of_user("2")
    warm = [movie for movie in range(15, 22) if movie in model.datamodule.pool.tolist()]
    assert 0 < len(warm) < 7
    assert history.items.tolist() == [warm]
    assert history.timestamps[0].equal(880_000_000 + 600 * (history.items[0] - 15))
    assert dict(model.rank(history, k=30)).keys() == {title(movie) for movie in range(1, 31)} - {
        title(movie) for movie in range(15, 22)
    }
    model.datamodule.pool = model.datamodule.pool[:0]
    with pytest.raises(ConfigError, match=r"user=2: dataset\.cold_items holds out every item of the history"):
        model.history_of_user("2")


def test_what_was_not_in_training_is_not_recommended_by_ids(
    model: Recommendations, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = model.module.train_counts.clone()
    counts[9] = 0
    monkeypatch.setitem(model.module._buffers, "train_counts", counts)
    ranked = [name for name, _ in model.rank(model.history_of_titles([title(3)]), k=100)]
    assert len(ranked) == NUM_MOVIES - 2
    assert title(9) not in ranked


@pytest.mark.parametrize("fixture", ["id_run", "cached_run"])
def test_titles_are_printed_by_falling_score_without_the_history(
    fixture: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    run = request.getfixturevalue(fixture)
    rows = printed([f"ckpt={run.best}", f"history={title(3)}|{title(4)}", "k=6"], capsys)
    scores = [float(score) for _, _, score in rows]
    assert [place for place, _, _ in rows] == ["1", "2", "3", "4", "5", "6"]
    assert scores == sorted(scores, reverse=True)
    assert not {title(3), title(4)} & {name for _, name, _ in rows}


def test_the_trained_model_names_the_next_movie(model: Recommendations) -> None:
    ranked = model.rank(model.history_of_titles([title(movie) for movie in (11, 12, 13, 14)]), k=3)
    assert title(15) in dict(ranked)


def test_a_long_list_holds_the_whole_catalogue_but_the_history(model: Recommendations) -> None:
    ranked = model.rank(model.history_of_titles([title(1)]), k=1000)
    assert {name for name, _ in ranked} == {title(movie) for movie in range(2, NUM_MOVIES + 1)}


def test_titles_are_found_by_any_case_and_by_id(model: Recommendations) -> None:
    expected = model.history_of_titles([title(7), title(9)])
    found = model.history_of_titles([f"  {title(7).upper()} ", "9"])
    assert found.items.tolist() == expected.items.tolist() == [[7, 9]]


def test_a_misspelled_title_gets_near_ones_suggested(id_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused([f"ckpt={id_run.best}", f"history={title(12)[:-2]}"], capsys)
    assert f"'{title(12)[:-2]}' is not in the catalogue; did you mean '{title(12)}'" in message


def test_a_part_of_a_title_gets_titles_with_it_suggested(model: Recommendations) -> None:
    with pytest.raises(ConfigError, match=r"did you mean .*\(1983\)"):
        model.history_of_titles(["(1983)"])


def test_a_title_like_nothing_says_so(model: Recommendations) -> None:
    with pytest.raises(ConfigError, match="'§§§' is not in the catalogue; no title is like it"):
        model.history_of_titles(["§§§"])


def test_a_history_longer_than_the_model_reads_is_cut_but_all_of_it_left_out(model: Recommendations) -> None:
    titles = [title(movie) for movie in range(1, NUM_MOVIES)]
    history = model.history_of_titles(titles * 5)
    assert history.items.shape == (1, model.config.dataset.max_history)
    assert [name for name, _ in model.rank(history, k=10)] == [title(NUM_MOVIES)]


def test_a_user_of_the_data_set_is_ranked_by_all_of_its_events(model: Recommendations) -> None:
    history = model.history_of_user("2")  # begins with movie 15 and has 7 events
    assert history.items.tolist() == [list(range(15, 22))]
    assert history.timestamps[0].diff().tolist() == [600] * 6
    assert dict(model.rank(history, k=30)).keys().isdisjoint(title(movie) for movie in range(15, 22))


def test_an_unknown_user_is_refused_with_examples(id_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert "user=nobody: not among the 40 users (1, 2, 3, ...)" in refused(
        [f"ckpt={id_run.best}", "user=nobody"], capsys
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either history="),
        (["history=a", "user=1"], "give either history="),
        (["user=1", "k=0"], "k=0: must be at least 1"),
        (["user=1", "k=ten"], "ten"),
        (["history="], "'' is not in the catalogue"),
    ],
)
def test_wrong_arguments_are_refused(
    id_run: Run, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused([f"ckpt={id_run.best}", *arguments], capsys)


def test_new_items_are_ranked_without_training(
    cached_run: Run, new_items: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"ckpt={cached_run.best}", f"history={title(3)}", "k=100"]
    before = {name: score for _, name, score in printed(arguments, capsys)}
    after = {name: score for _, name, score in printed([*arguments, f"new_items={new_items}"], capsys)}
    assert after.keys() - before.keys() == {"word1, the sequel", "word2 word3"}
    assert {name: after[name] for name in before} == before


def test_a_history_may_name_new_items(cached_run: Run, new_items: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = printed([f"ckpt={cached_run.best}", "history=Word1, the sequel|901", f"new_items={new_items}"], capsys)
    assert len(rows) == 10


def test_an_id_model_cannot_rank_new_items(id_run: Run, new_items: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused([f"ckpt={id_run.best}", "user=1", f"new_items={new_items}"], capsys)
    assert "new_items: items=id knows only the items it was trained on" in message


def test_a_new_item_with_a_known_id_is_refused(
    cached_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new.csv"
    path.write_text("id,title,genres\n7,word1,word2\n")
    message = refused([f"ckpt={cached_run.best}", "user=1", f"new_items={path}"], capsys)
    assert "new_items: id 7 is in the catalogue already" in message


def test_new_items_without_a_column_of_the_template_name_it(
    cached_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new.csv"
    path.write_text("id,name\n900,word1\n")
    message = refused([f"ckpt={cached_run.best}", "user=1", f"new_items={path}"], capsys)
    assert "title" in message
    assert "new_items" in message


def test_scores_are_those_that_evaluation_ranks_by(cached_run: Run, load: Callable[..., Recommendations]) -> None:
    model = load(cached_run)
    batch = next(iter(model.datamodule.test_dataloader()))
    expected = model.module.scores(batch)
    user = 4
    events = int(batch.mask[user].sum())
    history = model._history(batch.items[user, :events], batch.timestamps[user, :events])
    ranked = dict(model.rank(history, k=NUM_MOVIES))
    assert len(ranked) == NUM_MOVIES - events
    for name, score in ranked.items():
        assert score == pytest.approx(expected[user, model.catalog.titles.index(name)].item(), abs=1e-4)


def test_a_missing_new_items_file_is_refused(cached_run: Run) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([f"ckpt={cached_run.best}", "user=1", "new_items=/no/where.csv"])
    assert isinstance(exit_.value.__cause__, DataError)
