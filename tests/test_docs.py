"""README, docs and changelog agree with the tree and the code."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import hllm

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def listed_files() -> set[str]:
    """The Python files of README's tree, by the folder each line is indented under."""
    tree = README.partition("## Files")[2].split("```")[1]
    found, folders = set(), {}
    for line in tree.strip("\n").splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        parent = folders.get(depth - 1, "")
        if match := re.match(r"\s*(\w+/)", line):
            folders[depth] = parent + match[1]
        found |= {parent + name for name in re.findall(r"(\w+\.py)\b", line)}
    return found


def test_the_readmes_tree_names_every_module() -> None:
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "hllm").rglob("*.py") if path.name != "__init__.py"}
    assert listed_files() == modules


def test_the_readmes_commands_are_there_before_line_25() -> None:
    top = README.splitlines()[:25]
    assert any(line.startswith("make train") for line in top)
    assert any(line.startswith("make test") for line in top)


def test_the_changelog_begins_with_this_version() -> None:
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[1] == hllm.__version__


def test_the_configuration_reference_is_up_to_date() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "config_reference.py"), "--check"]
    assert subprocess.run(command, capture_output=True, text=True, check=False).stderr == ""


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(((?!http)[^)#]+)\)", README))))
def test_the_readmes_links_lead_somewhere(link: str) -> None:
    assert (ROOT / link).exists()


def test_every_experiment_of_the_results_table_has_a_file() -> None:
    tables = "".join(re.findall(r"<!-- table \w+: .*?<!-- end of table", README, re.S))
    rows = [row for row in re.findall(r"^\| `(\w+)`", tables, re.M) if not row.startswith("floor_")]
    assert rows
    assert {f"{row}.yaml" for row in rows} <= {path.name for path in (ROOT / "conf" / "experiment").iterdir()}


def test_every_test_that_the_fidelity_list_names_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", (ROOT / "docs" / "fidelity.md").read_text())
    assert len(named) > 50
    for path, name in named:
        assert f"def {name}(" in (ROOT / path).read_text(), f"{path}::{name}"


def test_every_fast_path_names_a_test_that_is_there() -> None:
    file, named = "", 0
    for path, name in re.findall(r"`(tests/[\w/.]+)?(?:::(\w+))?`", (ROOT / "docs" / "speed.md").read_text()):
        file = path or file
        assert (ROOT / file).exists(), file
        if name:
            assert f"def {name}(" in (ROOT / file).read_text(), f"{file}::{name}"
            named += 1
    assert named > 10
