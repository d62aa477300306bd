"""Finished runs -> a table of docs/results.md, written from its record, which the runs of FOLDER are first read into.

    python scripts/reproduce/table.py ml1m runs/reproduce/ml1m     # any number of folders, runs at any depth below
    python scripts/reproduce/table.py                              # all tables again, from the records alone
    python scripts/reproduce/table.py ml1m --experiments           # names of the rows; --overrides, --floors likewise

tables.yaml says which rows a table has, published.yaml what others measured. --fresh forgets what the record had.
"""

import argparse
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import orderings
import records
import yaml
from pages import ROOT, write_between

from hllm.report import measured_on, text_table
from hllm.significance import holm, seed_interval

HERE = Path(__file__).resolve().parent
EXPERIMENTS = ROOT / "conf" / "experiment"
METRICS = ("hr@10", "ndcg@10", "hr@50", "ndcg@50", "hr@200", "ndcg@200", "mrr", "coverage@10")
PUBLISHED = METRICS[:6]
SHORT = METRICS[:2]
FLOOR = "floor_"
FLOORS = {
    "popularity": "events in training",
    "recent": "events in training, of the last days",
    "text": "text vectors nearest to the newest items'",
    "co_occurrence": "items shared by users in training",
}
"What hllm.floors measures; no training in any of them."


@dataclass(frozen=True)
class Table:
    """An entry of tables.yaml.

    Args:
        rows: experiment -> what it is.
        baseline: the row that all others are compared with, user by user.
        pairs: further comparisons, the first row minus the second.
        note: what a reader must know of the data.
        published: the list of published.yaml that stands beside it.
        overrides, floors: flags of its runs, and of hllm.floors beside them.
    """

    title: str
    baseline: str
    rows: dict[str, str]
    pairs: list[list[str]] = field(default_factory=list)
    note: str = ""
    published: str | None = None
    overrides: str = ""
    floors: str = ""


def read_tables() -> dict[str, Table]:
    return {name: Table(**content) for name, content in yaml.safe_load((HERE / "tables.yaml").read_text()).items()}


def told_by() -> dict[str, str]:
    """Experiment -> the table that its file tells the numbers of: the first that runs it as it is."""
    found: dict[str, str] = {}
    for name, table in read_tables().items():
        if not table.overrides:
            found = dict.fromkeys(table.rows, name) | found
    return found


def read_published() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((HERE / "published.yaml").read_text())
    return content


@dataclass(frozen=True)
class Row:
    """All seeds of an experiment in a record; none where it was not measured."""

    name: str
    about: str
    runs: list[dict[str, Any]] = field(default_factory=list)

    def values(self, metric: str, group: str = "all") -> list[float]:
        """By seed; empty where a run lacks it."""
        found = [run["test"].get(group, {}).get(metric) for run in self.runs]
        return [] if None in found else found

    def spread(self, metric: str, group: str = "all") -> str:
        """Mean over seeds, and its standard deviation where there are several."""
        values = self.values(metric, group)
        if not values:
            return ""
        found = seed_interval(values)
        return f"{found.mean:.4f}" + (f" ± {found.sd:.4f}" if len(values) > 1 else "")

    @property
    def label(self) -> str:
        return f"`{self.name}`"

    @property
    def told(self) -> str:
        """What a measured row knows of the target's time."""
        return "known" if self.runs[0]["target_time"] else "hidden"

    @property
    def about_run(self) -> str:
        """What the row is, with the settings that a floor chose on validation."""
        settings = ", ".join(f"{key} {value}" for key, value in self.runs[0]["settings"].items())
        return f"{self.about} ({settings})" if settings else self.about


def rows_of(table: Table, record: records.Record) -> list[Row]:
    """Floors first, then the table's rows, then any other experiment that was run."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for run in record["runs"]:
        runs.setdefault(run["experiment"], []).append(run)
    floors = {FLOOR + name: what for name, what in FLOORS.items() if FLOOR + name in runs}
    about = {**floors, **table.rows}
    return [Row(name, about.get(name, ""), runs.get(name, [])) for name in dict.fromkeys([*about, *runs])]


def picture(name: str) -> str:
    """The table's plot, in docs."""
    return f"table_{name}.png"


def section(name: str, table: Table, record: records.Record, published: dict[str, Any]) -> str:
    rows = rows_of(table, record)
    measured = [row for row in rows if row.runs]
    parts = [f"## {table.title}", about(record, measured), table.note, main_table(rows, record)]
    if measured:
        parts.append(f"![{table.title}: NDCG@10 by row, and by target popularity]({picture(name)})")
    if table.published:
        parts += ["### Published", ABOUT_PUBLISHED, published_table(published, table.published)]
        parts.append(published_protocols(published, table.published))
    if record["differences"]:
        parts += ["### Differences", ABOUT_DIFFERENCES, difference_table(rows, record)]
    if record["intervals"]:
        parts += ["### Confidence", ABOUT_INTERVALS, interval_table(measured, record)]
    if measured:
        parts += ["### By target popularity", ABOUT_POPULARITY, *group_tables(measured, record, history=False)]
        if histories := group_tables(measured, record, history=True):
            parts += ["### By history length", ABOUT_HISTORY, *histories]
        parts += ["### Cost and provenance", ABOUT_COST, cost_table(measured)]
    return "\n\n".join(filter(None, parts))


ABOUT_PUBLISHED = (
    "By others, under the protocol that is named, from their sources; not measured here and in no order with the rows "
    "above. Where the protocol is another, so are the numbers' meaning."
)
ABOUT_DIFFERENCES = (
    "One row minus another, user by user, of the users' means over seeds: bootstrap intervals and sign-flip "
    "tests over users, p-values corrected by Holm over the whole table. Over seeds: the difference of the runs of one "
    "seed, with its 95 % t interval."
)
ABOUT_INTERVALS = "Where the mean could lie with other seeds (t interval) and with other users (bootstrap), at 95 %."
ABOUT_POPULARITY = (
    "Test users by how often their target occurs in training (cold: held out of it); their number in brackets."
)
ABOUT_HISTORY = "Test users by how many events they have before the target; their number in brackets."
ABOUT_COST = "Means over seeds. Seconds an epoch hold the validation in it; seconds in all also the test."


def about(record: records.Record, measured: list[Row]) -> str:
    if not measured:
        return "No row was measured."
    users = measured[0].runs[0]["test"]["all"]["users"]
    return (
        f"{measured_on(record['identity'])}: whole catalogue ranked, history masked, ties at mid-rank, {users:.0f} "
        "test users. Mean ± sd over seeds. Target time is known where the model is told when the event to be predicted "
        "happens."
    )


def main_table(rows: list[Row], record: records.Record) -> str:
    metrics = [metric for metric in METRICS if metric in PUBLISHED or any(row.values(metric) for row in rows)]
    lines = []
    if record["popularity"] and f"{FLOOR}popularity" not in [row.name for row in rows]:
        floor = record["popularity"]["all"]
        lines.append(["popularity", "", "", "", *(f"{floor[m]:.4f}" if m in floor else "" for m in metrics)])
    for row in rows:
        if row.runs:
            lines.append([row.label, row.about_run, row.told, str(len(row.runs)), *map(row.spread, metrics)])
        else:
            lines.append([row.label, row.about, "", "", "not measured", *[""] * (len(metrics) - 1)])
    return text_table(["experiment", "what", "target time", "seeds", *metrics], lines)


def published_table(published: dict[str, Any], name: str) -> str:
    lines = [
        [
            entry["model"],
            entry["protocol"],
            entry["target_time"],
            *(f"{entry[metric]:.4f}" if metric in entry else "" for metric in PUBLISHED),
            entry["source"],
        ]
        for entry in published["tables"][name]
    ]
    return text_table(["model", "protocol", "target time", *PUBLISHED, "source"], lines)


def published_protocols(published: dict[str, Any], name: str) -> str:
    used = dict.fromkeys(entry["protocol"] for entry in published["tables"][name])
    return "\n".join(f"- {protocol}: {published['protocols'][protocol]}." for protocol in used)


def difference_table(rows: list[Row], record: records.Record) -> str:
    """In the order of the rows, the baseline's comparisons first as the record has them."""
    order = {row.name: place for place, row in enumerate(rows)}
    counts = Counter(gap["against"] for gap in record["differences"])
    return gap_table(sorted(record["differences"], key=lambda gap: (-counts[gap["against"]], order[gap["experiment"]])))


def gap_table(gaps: list[dict[str, Any]]) -> str:
    """Differences as records keep them; p-values corrected over all of them."""
    lines = []
    for gap, p in zip(gaps, holm([gap["p"] for gap in gaps]), strict=True):
        seeds = gap.get("seeds")
        over_seeds = f"{seeds['mean']:+.4f} [{seeds['low']:+.4f}, {seeds['high']:+.4f}]" if seeds else ""
        users = f"{gap['difference']:+.4f} [{gap['low']:+.4f}, {gap['high']:+.4f}]"
        names = f"`{gap['experiment']}` - `{gap['against']}`"
        metric = gap["metric"] if gap["group"] == "all" else f"{gap['metric']}, {gap['group']} targets"
        lines.append([names, metric, users, f"{p:.4f}", over_seeds])
    return text_table(["rows", "metric", "difference [95 % over users]", "p (Holm)", "over seeds [95 %]"], lines)


def interval_table(rows: list[Row], record: records.Record) -> str:
    lines = []
    for row in rows:
        cells = []
        for metric in records.COMPARED:
            found, users = seed_interval(row.values(metric)), record["intervals"].get(row.name, {}).get(metric)
            cells += [f"{found.low:.4f} to {found.high:.4f}" if len(row.runs) > 1 else ""]
            cells += [f"{users[0]:.4f} to {users[1]:.4f}" if users else ""]
        lines.append([row.label, *cells])
    header = [f"{metric}, {what}" for metric in records.COMPARED for what in ("seeds", "users")]
    return text_table(["experiment", *header], lines)


def group_tables(rows: list[Row], record: records.Record, history: bool) -> list[str]:
    """A table of NDCG and one of HR; none where no run was broken down so."""
    groups = {group: values for row in rows for group, values in row.runs[0]["test"].items() if group != "all"}
    names = [group for group in groups if group.startswith("history ") is history]
    if not names:
        return []
    header = [f"{group.removeprefix('history ')} ({groups[group]['users']:.0f})" for group in names]
    tables = []
    for metric in reversed(records.COMPARED):
        lines = [[row.label, *(row.spread(metric, group) for group in names)] for row in rows]
        floor = [record["popularity"].get(group, {}).get(metric) for group in names]
        if record["popularity"] and f"{FLOOR}popularity" not in [row.name for row in rows]:
            lines.insert(0, ["popularity", *("" if value is None else f"{value:.4f}" for value in floor)])
        tables.append(text_table([metric, *header], lines))
    return tables


def cost_table(rows: list[Row]) -> str:
    lines = []
    joint = any(run.get("speed") for row in rows for run in row.runs)
    for row in rows:
        speeds = [run["speed"] for run in row.runs if run.get("speed")]
        speed = [f"{mean(one['items_per_second'] for one in speeds):.0f}"] if speeds else [""]
        speed += [f"{max(one['peak_memory_gb'] for one in speeds):.1f}"] if speeds else [""]
        epochs = [run["epochs"] for run in row.runs if run["epochs"]]  # floors have none
        fits = [run["seconds"]["fit"] / run["epochs"] for run in row.runs if run["epochs"]]
        totals = [run["seconds"]["total"] for run in row.runs]
        days = sorted({run["date"] for run in row.runs})
        lines.append(
            [
                row.label,
                f"{mean(fits):.1f}" if fits else "",
                f"{mean(epochs):.1f}" if epochs else "",
                f"{mean(totals):.0f}",
                *(speed if joint else []),
                ", ".join(sorted({hardware(run["environment"]) for run in row.runs})),
                ", ".join(sorted({str(run["environment"]["git"]) for run in row.runs})),
                days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}",
            ]
        )
    header = ["experiment", "seconds an epoch", "epochs", "seconds in all"]
    header += ["items encoded a second", "peak GB"] if joint else []
    return text_table([*header, "hardware", "commit", "date"], lines)


def hardware(environment: dict[str, Any]) -> str:
    if environment["gpu"]:
        return str(environment["gpu"])
    threads = environment["threads"]
    return f"{environment['machine']} CPU, {threads} thread{'' if threads == 1 else 's'}"


def plot(rows: list[Row], record: records.Record, path: Path) -> None:
    """NDCG@10 of each row, its seeds and its interval over users; and means by target popularity."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    metric = records.COMPARED[1]
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 1.5 + 0.36 * len(rows)), width_ratios=(1, 1.3))
    colours = plt.get_cmap("tab20").colors
    groups = [group for group in rows[0].runs[0]["test"] if group != "all" and not group.startswith("history ")]
    for place, (row, colour) in enumerate(zip(rows, colours, strict=False)):
        values = row.values(metric)
        if interval := record["intervals"].get(row.name, {}).get(metric):
            left.plot(interval, [place, place], color=colour, linewidth=3)
        left.scatter(values, [place] * len(values), color="black", s=8, zorder=3)
        if row.values(metric, groups[0]):
            means = [mean(row.values(metric, group)) for group in groups]
            dashed = "--" if row.name.startswith(FLOOR) else "-"
            right.plot(groups, means, dashed, color=colour, marker="o", markersize=3, label=row.name)
    left.set_yticks(range(len(rows)), [row.name + " (told when)" * (row.told == "known") for row in rows])
    left.invert_yaxis()
    left.grid(axis="x", alpha=0.3)
    left.set_xlabel(f"test {metric.upper()}: each seed, and 95 % over users of their mean")
    right.grid(alpha=0.3)
    right.set_xlabel("occurrences of the target in training")
    right.set_ylabel(f"test {metric.upper()}")
    right.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def expectation(row: Row) -> str:
    """The line of a measured row's experiment file that says what to expect."""
    hr, ndcg = (row.spread(metric).replace("0.", ".") for metric in records.COMPARED)
    seeds = f"{len(row.runs)} seed{'s' if len(row.runs) > 1 else ''}"
    minutes = mean(run["seconds"]["total"] for run in row.runs) / 60
    machines = "; ".join(sorted({hardware(run["environment"]) for run in row.runs}))
    return f"# Expect test hr@10 {hr}, ndcg@10 {ndcg} ({seeds}) after {minutes:.0f} min: {machines}."


def write(name: str, table: Table, record: records.Record) -> None:
    """The section of docs/results.md with its plot, what to expect of the rows' experiments, and the short table where
    README.md has markers for it.
    """
    if measured := [row for row in rows_of(table, record) if row.runs]:
        plot(measured, record, ROOT / "docs" / picture(name))
    for row in measured:
        if told_by().get(row.name) == name:
            path = EXPERIMENTS / f"{row.name}.yaml"
            path.write_text(re.sub("^# Expect.*$", expectation(row), path.read_text(), count=1, flags=re.M))
    write_between(ROOT / "docs" / "results.md", f"table {name}", section(name, table, record, read_published()))
    if f"<!-- table {name}: scripts/reproduce -->" in (ROOT / "README.md").read_text():
        rows = [row for row in rows_of(table, record) if row.runs]
        lines = [[row.label, row.about, row.told, str(len(row.runs)), *map(row.spread, SHORT)] for row in rows]
        short = text_table(["experiment", "what", "target time", "seeds", *SHORT], lines)
        write_between(ROOT / "README.md", f"table {name}", f"{about(record, rows)}\n\n{short}")


def main() -> None:
    tables = read_tables()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", nargs="?", choices=tables, help="default: all, from their records")
    parser.add_argument("folders", nargs="*", type=Path, help="with finished runs, at any depth")
    parser.add_argument("--fresh", action="store_true", help="forget the runs that the record has")
    parser.add_argument("--experiments", action="store_true", help="print the rows' experiments and stop")
    parser.add_argument("--overrides", action="store_true", help="print the flags of the rows' runs and stop")
    parser.add_argument("--floors", action="store_true", help="print the flags of hllm.floors and stop")
    args = parser.parse_args()
    if args.table is None:
        for name, table in tables.items():
            write(name, table, records.load(name))
        orderings.write()
        return
    table = tables[args.table]
    if args.experiments:
        print("\n".join(table.rows))
    elif args.overrides:
        print(table.overrides)
    elif args.floors:
        print(" ".join(filter(None, (table.floors, table.overrides))))
    else:
        record = records.empty() if args.fresh else records.load(args.table)
        if args.folders:
            record = records.update(record, args.folders, table.baseline, table.pairs)
            records.save(args.table, record)
        elif args.fresh:
            sys.exit("error: --fresh needs the folders of runs")
        write(args.table, table, record)
        orderings.write()


if __name__ == "__main__":
    main()
