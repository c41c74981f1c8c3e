"""The examples that start a job on a cluster: their commands compose, their formats are read."""

import re
import shlex
import shutil
import subprocess

import pytest
import yaml
from support.paths import REPO_ROOT

from orcd_batch.cli import main

EXAMPLES = REPO_ROOT / "examples" / "scale_out"
SLURM = EXAMPLES / "slurm.sbatch"


def rayjob():
    return yaml.safe_load((EXAMPLES / "rayjob.yaml").read_text())["spec"]


def command_lines():
    yield "slurm", SLURM.read_text().partition("\nexec ")[2].replace("\\\n", " ")
    yield "kuberay", rayjob()["entrypoint"]
    for block in re.findall(
        r"```sh\n(.*?)```", (REPO_ROOT / "docs" / "scale_out.md").read_text(), re.S
    ):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("orcd-batch"):
                yield "guide", line


@pytest.mark.parametrize(("where", "line"), list(command_lines()))
def test_the_command_of_an_example_is_a_job_on_ray(where, line, capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line, comments=True)
    assert words[0] == "orcd-batch"
    one_job = [word.partition(",")[0] for word in words[1:] if word != "-m"]
    assert main([*one_job, "--cfg", "job"]) == 0
    composed = yaml.safe_load(capfd.readouterr().out)
    assert composed["scale_out"]["kind"] == "ray", where


def test_bash_reads_the_slurm_script():
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed")
    done = subprocess.run(["bash", "-n", str(SLURM)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_rayjob_asks_for_as_many_gpus_as_workers():
    (group,) = rayjob()["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    gpus = group["replicas"] * int(container["resources"]["limits"]["nvidia.com/gpu"])
    assert f"scale_out.replicas={gpus}" in rayjob()["entrypoint"].split()
