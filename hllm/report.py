"""Results as tables for people: plain text to the terminal, Markdown to files."""

from collections.abc import Mapping, Sequence
from math import sqrt

Results = Mapping[str, Mapping[str, Mapping[str, float]]]
"Split -> group of targets -> metric -> value."


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown table with aligned columns: reads well in a terminal and in a file."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def metric_names(results: Results) -> list[str]:
    """hr, ndcg and mrr, which every group of users has."""
    return [name for name in results["test"]["all"] if name.partition("@")[0] in ("hr", "ndcg", "mrr")]


def results_table(results: Results, system: str) -> str:
    """The system beside the popularity floor, on the test split; coverage at the first list length."""
    coverage = [name for name in results["test"]["all"] if name.startswith("coverage@")][:1]
    names = metric_names(results) + coverage
    rows = [
        [label, *(f"{results[split]['all'][name]:.4f}" for name in names)]
        for label, split in (("popularity", "popularity"), (system, "test"))
    ]
    return text_table(["test", *names], rows)


def frequency_table(results: Results, system: str) -> str:
    """HR and NDCG at the first list length, by how often the target occurs in training; items held out of it apart."""
    names = [group for group in results["test"] if group != "all" and not _is_history(group)]
    groups = {group if group == "cold" else f"{group} times": group for group in names}
    return _group_table(results, system, "target seen in training", groups)


def history_table(results: Results, system: str) -> str:
    """HR and NDCG at the first list length, by how many events the user has before the target."""
    groups = {group.removeprefix("history "): group for group in results["test"] if _is_history(group)}
    return _group_table(results, system, "events before the target", groups)


def _is_history(group: str) -> bool:
    return group.startswith("history ")


def _group_table(results: Results, system: str, title: str, groups: Mapping[str, str]) -> str:
    """``groups`` are names in the results by what to call them."""
    names = metric_names(results)[:2]
    header = [title, "users", *(f"{name} {who}" for name in names for who in ("popularity", system))]
    rows = []
    for label, group in groups.items():
        cells = [f"{results[split][group][name]:.4f}" for name in names for split in ("popularity", "test")]
        rows.append([label, f"{results['test'][group]['users']:.0f}", *cells])
    return text_table(header, rows)


def measured_on(identity: Mapping[str, str]) -> str:
    """Data, protocol and catalogue: numbers of two runs can be compared where this is the same."""
    return (
        f"{identity['dataset']}, protocol {identity['protocol']}, {identity['catalogue']}, "
        f"data {identity['interactions']}"
    )


def protocol_line(identity: Mapping[str, str], results: Results) -> str:
    """What every number needs beside it: protocol, data, and how much chance there is in it."""
    everyone = results["test"]["all"]
    users, name = everyone["users"], metric_names(results)[0]
    error = sqrt(everyone[name] * (1 - everyone[name]) / users)
    # this protocol alone predicts several events of one user
    counted = "predictions" if "successive" in identity["protocol"] else "users"
    ranking = f"whole catalogue ranked, history masked, {users:.0f} {counted}"
    return f"{measured_on(identity)}: {ranking}; one standard error of {name} is {error:.3f}"


def full_report(results: Results, identity: Mapping[str, str], system: str) -> str:
    tables = [results_table(results, system), frequency_table(results, system)]
    if any(_is_history(group) for group in results["test"]):
        tables.append(history_table(results, system))
    return "\n\n".join([protocol_line(identity, results), *tables])
