"""Sections of pages that scripts write, between markers."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def write_between(path: Path, name: str, text: str) -> None:
    """Replace what stands between the markers of that name.

    Raises:
        SystemExit: the file has no such markers.
    """
    begin, end = f"<!-- {name}: scripts/reproduce -->", f"<!-- end of {name} -->"
    before, found, rest = path.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"error: {path.name} needs the markers {begin} and {end}, with what is between to be replaced")
    path.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")
