"""Tables for people."""

from hllm.report import frequency_table, full_report, protocol_line, results_table, text_table

VALUES = {"users": 100, "hr@10": 0.2, "ndcg@10": 0.125, "mrr": 0.5, "ties": 0.0}
RESULTS = {
    "val": {"all": VALUES},
    "test": {"all": VALUES, "1-9": VALUES | {"users": 30}, "10+": VALUES | {"users": 70, "hr@10": 0.3}},
    "popularity": {"all": VALUES | {"hr@10": 0.1}, "1-9": VALUES | {"hr@10": 0.0}, "10+": VALUES},
}
IDENTITY = {
    "dataset": "movies",
    "protocol": "leave_one_out",
    "catalogue": "5 items 12ab",
    "interactions": "abc",
    "item vectors": "f",
}


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    assert text_table(["a", "bb"], [["ccc", "d"]]).splitlines() == ["| a   | bb |", "| --- | -- |", "| ccc | d  |"]


def test_the_system_stands_beside_popularity() -> None:
    lines = results_table(RESULTS, "mine").splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["popularity", "mine"]
    assert [cell.strip() for cell in lines[3].split("|")[2:-1]] == ["0.2000", "0.1250", "0.5000"]


def test_every_number_has_protocol_data_and_standard_error_beside_it() -> None:
    line = protocol_line(IDENTITY, RESULTS)
    for part in ("movies", "leave_one_out", "history masked", "data abc", "100 users", "error of hr@10 is 0.040"):
        assert part in line


def test_the_report_breaks_results_down_by_training_frequency() -> None:
    report = full_report(RESULTS, IDENTITY, "mine")
    row = next(line for line in report.splitlines() if line.startswith("| 10+ times"))
    assert [cell.strip() for cell in row.split("|")[2:6]] == ["70", "0.2000", "0.3000", "0.1250"]


def test_results_by_history_length_have_a_table_of_their_own() -> None:
    results = {split: groups | {"history 5-9": VALUES | {"users": 40}} for split, groups in RESULTS.items()}
    report = full_report(results, IDENTITY, "mine")
    row = next(line for line in report.splitlines() if line.startswith("| 5-9 "))
    assert [cell.strip() for cell in row.split("|")[2:4]] == ["40", "0.2000"]
    assert "events before the target" not in full_report(RESULTS, IDENTITY, "mine")
    assert "5-9" not in frequency_table(results, "mine")


def test_items_held_out_of_training_are_called_cold() -> None:
    results = {split: groups | {"cold": VALUES, "0": VALUES} for split, groups in RESULTS.items()}
    report = frequency_table(results, "mine")
    assert "| cold " in report
    assert "| 0 times " in report


def test_coverage_of_the_first_length_stands_beside_the_metrics() -> None:
    values = VALUES | {"coverage@10": 0.75, "coverage@50": 0.9}
    lines = results_table({split: {"all": values} for split in ("test", "popularity")}, "mine").splitlines()
    assert [cell.strip() for cell in lines[0].split("|")[2:-1]] == ["hr@10", "ndcg@10", "mrr", "coverage@10"]
    assert lines[3].split("|")[5].strip() == "0.7500"


def test_a_protocol_of_several_targets_a_user_counts_predictions() -> None:
    identity = IDENTITY | {"protocol": "temporal 80/10/10 successive"}
    assert " predictions; one standard error" in protocol_line(identity, RESULTS)
    assert " users; one standard error" in protocol_line(IDENTITY, RESULTS)
