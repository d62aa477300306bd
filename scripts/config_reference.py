"""Writes docs/configuration.md from the schemas of hllm/config.py and the files of conf/.

python scripts/config_reference.py            write it
python scripts/config_reference.py --check    fail when it is out of date (the test suite does)
"""

import ast
import inspect
import os
import sys
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING

from hllm import config

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "configuration.md"

INTRODUCTION = """# Configuration

Written by `scripts/config_reference.py` from `hllm/config.py` and `conf/`; do not edit.

`python -m hllm.train GROUP=NAME GROUP.KEY=VALUE ...` chooses a file of `conf/GROUP/` and overrides single values;
`-m` with comma lists sweeps. `python -m hllm.embed` takes the same flags. Every wrong key, type, range and combination
fails while composing, naming the flag. Defaults are those of `python -m hllm.train` without flags, or with the choice
above the table; another file of the group may set others, which `python -m hllm.train GROUP=NAME --cfg job` shows.
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


def value_text(value: Any) -> str:
    if isinstance(value, Enum):
        return f"`{value.name}` of {', '.join(f'`{choice.name}`' for choice in type(value))}"
    return "unset" if value is None else f"`{value}`"


def table(flag: str, composed: Any) -> list[str]:
    """The fields of a composed group; a nested one's after them, under its own prefix."""
    helps, rows, nested = help_strings(type(composed)), [], []
    for field in fields(composed):
        value = getattr(composed, field.name)
        if is_dataclass(value):
            nested += table(f"{flag}{field.name}.", value)
        else:
            rows.append(f"| `{flag}{field.name}` | {value_text(value)} | {helps.get(field.name, '')} |")
    return rows + nested


def own_rows(group: str, schema: type, base: type) -> list[str]:
    """The fields that a schema has beyond its group's base, with the schema's own defaults."""
    helps, common = help_strings(schema), {field.name for field in fields(base)}
    rows = []
    for field in fields(schema):
        if field.name not in common:
            default = field.default_factory() if callable(field.default_factory) else field.default
            value = "to be given" if default == MISSING else value_text(default)
            rows.append(f"| `{group}.{field.name}` | {value} | {helps.get(field.name, '')} |")
    return rows


def files_with(group: str, schema: type) -> str:
    """The choices of a group that have a schema's fields, by the schema that each file or its parent file names."""
    folder = ROOT / "conf" / group
    name = next(name for name, known in config.SCHEMAS[group].items() if known is schema)

    def names_it(path: Path) -> bool:
        defaults = yaml.safe_load(path.read_text())["defaults"]
        return any(
            default == {f"/schema/{group}@_here_": name}
            or (isinstance(default, str) and default != "_self_" and names_it(folder / f"{default}.yaml"))
            for default in defaults
        )

    return ", ".join(f"`{group}={path.stem}`" for path in sorted(folder.glob("*.yaml")) if names_it(path))


def files_of(group: str) -> list[str]:
    """A line for each file of the group: its name and its first comment."""
    lines = []
    for path in sorted((ROOT / "conf" / group).glob("*.yaml")):
        comments = [line.removeprefix("# ") for line in path.read_text().splitlines() if line.startswith("# ")]
        about = next((line for line in comments if not line.startswith("@package")), "")
        lines.append(f"- `{group}={path.stem}`{': ' if about else ''}{about}")
    return lines


def document() -> str:
    os.environ.pop("HLLM_CACHE", None)  # a person's own setting is not the default
    header = ["| flag | default | meaning |", "| --- | --- | --- |"]
    composed = config.compose([])
    groups = [field.name for field in fields(composed) if is_dataclass(getattr(composed, field.name))]
    top = [row for row in table("", composed) if "." not in row.split("`")[1]]
    parts = [INTRODUCTION, "## Top level\n", "\n".join([*header, *top]) + "\n"]
    for group in groups:
        parts.append(f"## {group}\n")
        if (ROOT / "conf" / group).is_dir():
            parts.append("\n".join(files_of(group)) + "\n")
        schemas = config.SCHEMAS.get(group, {})
        for choice in [None] if "base" in schemas or not schemas else [f"{group}={name}" for name in schemas]:
            if choice:
                parts.append(f"`{choice}`:\n")
            chosen = getattr(config.compose([choice] if choice else []), group)
            parts.append("\n".join([*header, *table(f"{group}.", chosen)]) + "\n")
        if "base" in schemas:
            for schema in schemas.values():
                if rows := own_rows(group, schema, schemas["base"]):
                    parts.append(f"{files_with(group, schema)} also:\n")
                    parts.append("\n".join([*header, *rows]) + "\n")
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
