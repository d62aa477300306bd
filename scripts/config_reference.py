"""Writes docs/configuration.md from the schemas of hllm/config.py and the files of conf/.

python scripts/config_reference.py            write it
python scripts/config_reference.py --check    fail when it is out of date (the test suite does)
"""

import ast
import inspect
import sys
from dataclasses import MISSING, fields
from enum import Enum
from pathlib import Path
from typing import Any

from hllm import config

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "configuration.md"

INTRODUCTION = """# Configuration

Written by `scripts/config_reference.py` from `hllm/config.py` and `conf/`; do not edit.

`python -m hllm.train GROUP=NAME GROUP.KEY=VALUE ...` chooses a file of `conf/GROUP/` and overrides single values;
`-m` with comma lists sweeps. `python -m hllm.embed` takes the same flags. Every wrong key, type, range and combination
fails while composing, naming the flag. A default in a table is the schema's; files of the group may set another one,
which `python -m hllm.train --cfg job` shows.
"""


def help_strings(schema: type) -> dict[str, str]:
    """Field -> the string that stands below it in the source."""
    found: dict[str, str] = {}
    for base in reversed(schema.__mro__[:-1]):
        body = ast.parse(inspect.getsource(base)).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, below in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                found[ast.unparse(field.target)] = str(below.value.value)
    return found


def default_text(field: Any) -> str:
    value = field.default if field.default is not MISSING else None
    if field.default_factory is not MISSING:
        value = field.default_factory()
    if value == "???":
        return "set by the group's file"
    if isinstance(value, Enum):
        return f"`{value.name}` of {', '.join(f'`{choice.name}`' for choice in type(value))}"
    return "unset" if value is None else f"`{value}`"


def table(flag: str, schema: type) -> list[str]:
    """The schema's fields; a nested schema's after them, under its own prefix."""
    helps, rows, nested = help_strings(schema), [], []
    for field in fields(schema):
        inner = next(
            (t for t in (field.type, *getattr(field.type, "__args__", ())) if hasattr(t, "__dataclass_fields__")), None
        )
        if inner is not None:
            nested += table(f"{flag}{field.name}.", inner)
        else:
            rows.append(f"| `{flag}{field.name}` | {default_text(field)} | {helps.get(field.name, '')} |")
    return rows + nested


def files_of(group: str) -> list[str]:
    """A line for each file of the group: its name and its first comment."""
    lines = []
    for path in sorted((ROOT / "conf" / group).glob("*.yaml")):
        comments = [line.removeprefix("# ") for line in path.read_text().splitlines() if line.startswith("# ")]
        about = next((line for line in comments if not line.startswith("@package")), "")
        lines.append(f"- `{group}={path.stem}`{': ' if about else ''}{about}")
    return lines


def document() -> str:
    header = ["| flag | default | meaning |", "| --- | --- | --- |"]
    parts = [INTRODUCTION, "## Top level\n"]
    groups = {field.name: field.type for field in fields(config.Config) if hasattr(field.type, "__dataclass_fields__")}
    top = [row for row in table("", config.Config) if "." not in row.split("`")[1]]
    parts.append("\n".join([*header, *top]) + "\n")
    for group, base in groups.items():
        parts.append(f"## {group}\n")
        if (ROOT / "conf" / group).is_dir():
            parts.append("\n".join(files_of(group)) + "\n")
        for name, schema in config.SCHEMAS.get(group, {"base": base}).items():
            if name != "base":
                parts.append(f"`{group}={name}`:\n")
            parts.append("\n".join([*header, *table(f"{group}.", schema)]) + "\n")
    for group in ("experiment", "sweep", "debug"):
        parts.append(f"## {group}\n")
        parts.append("\n".join(files_of(group)) + "\n")
    return "\n".join(parts)


def main() -> None:
    if "--check" not in sys.argv:
        DOCUMENT.write_text(document())
    elif DOCUMENT.read_text() != document():
        sys.exit("docs/configuration.md is out of date: run python scripts/config_reference.py")


if __name__ == "__main__":
    main()
