"""Errors as one line, and key=value arguments."""

import errno
from dataclasses import dataclass

import pytest
from omegaconf import MISSING

from hllm.cli import parse, report_errors, split_own
from hllm.errors import ConfigError, DataError


@dataclass
class Options:
    path: str = MISSING
    k: int = 10
    note: str | None = None


def test_values_are_taken_as_they_stand() -> None:
    title = "Seven (a.k.a. Se7en) [1995], ${x}: 'a=b' \"c\" {d}"
    assert parse(Options, ["path=a,b", f"note={title}", "--k=3"], "usage") == Options("a,b", 3, title)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["path=x", "q=1"], "q"),
        (["path=x", "k=many"], "many"),
        (["k=3"], "path= is missing"),
        (["path"], "'path' is not of the form key=value"),
    ],
)
def test_wrong_arguments_are_refused_with_the_usage(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"(?s){message}.*\nusage: here"):
        parse(Options, arguments, "usage: here")


def test_own_arguments_are_taken_out_of_those_of_hydra_as_they_stand() -> None:
    arguments = ["user=hstu", "item=Se7en, [1995] = x", "-m", "user.num_layers=2", "item"]
    assert split_own(arguments[:4], ("item", "plot")) == (
        {"item": "Se7en, [1995] = x", "plot": ""},
        ["user=hstu", "-m", "user.num_layers=2"],
    )


def test_an_error_that_a_person_can_mend_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    @report_errors
    def fails() -> None:
        raise DataError("u.data: row 3 is torn")

    with pytest.raises(SystemExit) as exit_:
        fails()
    assert exit_.value.code == 1
    assert capsys.readouterr().err == "error: u.data: row 3 is torn\n"


def test_a_defect_keeps_its_traceback() -> None:
    @report_errors
    def breaks() -> None:
        raise ValueError("ours")

    with pytest.raises(ValueError, match="ours"):
        breaks()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_full_disk_or_missing_rights_are_one_line(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    @report_errors
    def writes() -> None:
        raise OSError(number, "no", "/run/metrics.json")

    with pytest.raises(SystemExit):
        writes()
    assert capsys.readouterr().err == f"error: [Errno {number}] no: '/run/metrics.json'\n"


def test_another_failure_of_the_system_keeps_its_traceback() -> None:
    @report_errors
    def breaks() -> None:
        raise FileNotFoundError(errno.ENOENT, "no", "ours")

    with pytest.raises(FileNotFoundError):
        breaks()
