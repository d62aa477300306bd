"""Every file under conf/ composes and passes its checks; the help names every group."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.utils import get_class
from omegaconf import OmegaConf

from hllm.config import CONF_DIR, SCHEMAS, check, compose, from_plain, to_plain

CONF = Path(CONF_DIR)
OPTIONS = sorted(f"{path.parent.name}={path.stem}" for path in CONF.glob("*/*.yaml"))
GROUPS = sorted({option.split("=")[0] for option in OPTIONS})
REQUIRED = {
    "llm=custom": ["llm.model=folder"],
    "dataset=custom": ["dataset.interactions=ratings.csv"],
    "dataset=amazon": ["dataset.category=Beauty"],
}
"What a choice asks a person for."
SWEEPS = sorted(path.stem for path in CONF.glob("sweep/*.yaml"))


def test_the_tree_is_groups_of_files() -> None:
    assert sorted(f"{p.parent.name}={p.stem}" for p in CONF.rglob("*.yaml") if p.parent != CONF) == OPTIONS
    assert {"dataset=movielens_100k", "llm=smollm2_135m", "loss=nce", "items=id", "debug=smoke"} <= set(OPTIONS)


@pytest.mark.parametrize("option", OPTIONS)
def test_every_file_composes_and_survives_a_checkpoint(option: str) -> None:
    config = compose([option, *REQUIRED.get(option, [])])
    group, name = option.split("=")
    if group in SCHEMAS and option != "dataset=amazon":  # which goes by its category
        assert getattr(config, group).name == name
    assert from_plain(to_plain(config)) == config


@pytest.mark.parametrize(
    "option", [option for option in OPTIONS if option.split("=")[0] in ("dataset", "user", "loss")]
)
def test_every_target_is_a_class_of_ours(option: str) -> None:
    group = option.split("=")[0]
    target = getattr(compose([option, *REQUIRED.get(option, [])]), group)._target_
    assert get_class(target).__module__.startswith("hllm.")


@pytest.mark.parametrize("name", SWEEPS)
def test_every_job_of_a_sweep_composes(name: str) -> None:
    with initialize_config_dir(CONF_DIR, version_base="1.3"):
        cfg = hydra_compose("train", [f"sweep={name}"], return_hydra_config=True)
        params = OmegaConf.to_container(cfg.hydra.sweeper.params)
    assert isinstance(params, dict)
    choices = [[f"{key}={value}" for value in str(values).split(",")] for key, values in params.items()]
    jobs = list(itertools.product(*choices))
    assert len({str(compose([f"sweep={name}", *job])) for job in jobs}) == len(jobs)


@pytest.mark.parametrize("path", sorted(CONF.glob("experiment/*.yaml")), ids=lambda path: path.stem)
def test_an_experiment_names_itself_and_its_command(path: Path) -> None:
    assert compose([f"experiment={path.stem}"]).experiment_name == path.stem
    assert f"experiment={path.stem}" in path.read_text().split("defaults:")[0]


def test_the_command_line_wins_over_experiment_and_debug() -> None:
    config = compose(["debug=smoke", "user.dim=6"])
    assert (config.user.dim, config.trainer.max_epochs, config.items.name) == (6, 2, "id")


def test_the_help_names_every_group_and_choice() -> None:
    done = subprocess.run([sys.executable, "-m", "hllm.train", "--help"], capture_output=True, text=True, check=True)
    before_config = done.stdout.split("This run's config")[0]
    before_config = before_config.replace("\n               |", " |")  # a line that goes on
    lines = {line.split()[0]: line for line in before_config.splitlines() if line.strip()}
    assert set(GROUPS) <= set(lines)
    for group, option in (option.split("=") for option in OPTIONS if not option.startswith("experiment=")):
        assert option in lines[group], f"{group}={option} is not in the help"


def test_a_composed_config_is_checked_only_once_complete() -> None:
    with initialize_config_dir(CONF_DIR, version_base="1.3"):
        cfg = hydra_compose("train", [])
    assert check(cfg) == compose([])
