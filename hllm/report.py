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
    return [name for name in results["test"]["all"] if name not in ("users", "ties")]


def results_table(results: Results, system: str) -> str:
    """The system beside the popularity floor, on the test split."""
    names = metric_names(results)
    rows = [
        [label, *(f"{results[split]['all'][name]:.4f}" for name in names)]
        for label, split in (("popularity", "popularity"), (system, "test"))
    ]
    return text_table(["test", *names], rows)


def frequency_table(results: Results, system: str) -> str:
    """HR and NDCG at the first list length, by how often the target occurs in training."""
    names = metric_names(results)[:2]
    header = [
        "target seen in training",
        "users",
        *(f"{name} {who}" for name in names for who in ("popularity", system)),
    ]
    rows = []
    for group, values in results["test"].items():
        if group != "all":
            cells = [f"{results[split][group][name]:.4f}" for name in names for split in ("popularity", "test")]
            rows.append([f"{group} times", f"{values['users']:.0f}", *cells])
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
    return "\n\n".join(
        [protocol_line(identity, results), results_table(results, system), frequency_table(results, system)]
    )
