"""The examples that schedule a nightly check: their commands compose, their formats are read."""

import configparser
import shlex
import shutil
import subprocess

import pytest
import yaml
from support.paths import REPO_ROOT

from orcd_batch.cli import main

EXAMPLES = REPO_ROOT / "examples" / "nightly"
SHELL_OPERATORS = (">>", "2>>", "||", "&&")


def service():
    parser = configparser.ConfigParser(strict=False)
    parser.optionxform = str
    parser.read(EXAMPLES / "orcd-nightly.service")
    return parser


def workflow_steps():
    document = yaml.safe_load((EXAMPLES / "github-workflow.yml").read_text())
    return {step.get("name"): step for step in document["jobs"]["nightly"]["steps"]}


def command_lines():
    crontab = (EXAMPLES / "orcd-nightly.crontab").read_text().splitlines()[-1]
    yield "cron", crontab.split(maxsplit=5)[5].partition(" && ")[2]
    yield "systemd", service()["Service"]["ExecStart"]
    yield "workflow", workflow_steps()["The check"]["run"]


@pytest.mark.parametrize(("where", "line"), list(command_lines()))
def test_the_command_of_an_example_is_a_nightly_check(where, line, capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line)
    ends = [words.index(operator) for operator in SHELL_OPERATORS if operator in words]
    words = words[words.index("--config-dir") : min(ends, default=None)]
    assert main([*words, "--cfg", "job"]) == 0
    composed = yaml.safe_load(capfd.readouterr().out)
    assert composed["check"]["runs"] >= 2, where
    assert composed["check"]["timeout_s"] is not None


def test_systemd_finds_nothing_wrong_with_the_units(tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    for name in ("orcd-nightly.service", "orcd-nightly.timer"):
        text = (EXAMPLES / name).read_text()
        text = text.replace("/srv/orcd-nightly/.venv/bin/orcd-batch", "/bin/true")
        (tmp_path / name).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", *map(str, tmp_path.iterdir())], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_workflow_keeps_the_history_of_a_night_that_failed():
    steps = workflow_steps()
    kept = steps["History and baseline for the next night, also when this one failed"]
    restored = steps["History and baseline of the nights before"]
    assert kept["if"] == "always()"
    assert kept["with"]["path"] == restored["with"]["path"]
    assert kept["with"]["key"] == restored["with"]["key"]
    assert kept["with"]["key"].startswith(restored["with"]["restore-keys"])
