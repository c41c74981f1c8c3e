"""Wrong command lines end with one sentence, the nearest valid name, and exit code 2."""

import json
import subprocess
import sys
from dataclasses import fields

import pytest
from support.paths import REPO_ROOT

from orcd_batch import job
from orcd_batch.cli import main
from orcd_batch.config import JobOptions, option_names
from orcd_batch.data import DatasetOptions


@pytest.fixture
def jobs(monkeypatch, tmp_path):
    """The options of every job that would have run."""
    seen: list[JobOptions] = []

    def record(wanted, view=None, interrupts=None):
        seen.extend(options for options, _ in wanted)
        counts = dict.fromkeys(("rows", "rows_computed", "errors", "tokens", "tokens_per_s"), 0)
        return [{**counts, "run_hash": "", "directory": d.name} for _, d in wanted]

    monkeypatch.setattr(job, "run_jobs", record)
    monkeypatch.chdir(tmp_path)
    return seen


def run(capsys, *args):
    code = main(args)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["data=a.parquet"], "model is not set: add model=NAME, one of llama2, llama3, phi3"),
        (["model=smollm2"], "data is not set: add data=FILE"),
        (["model=smol", "data=a"], "did you mean model=smollm2?"),
        (["model=phi3", "data=a", "engine=cudda"], "did you mean engine=cuda?"),
        (["model=phi3", "data=a", "sampling.temperatur=1"], "did you mean sampling.temperature?"),
        (["model=phi3", "data=a", "temperature=1"], "did you mean sampling.temperature?"),
        (["model=phi3", "data=a", "+sampling.tmp=1"], "There is no option sampling.tmp"),
        (["model=phi3", "data=a", "+max_token=1"], "did you mean sampling.max_tokens?"),
        (["model=phi3", "data=a", "sampling.temperature=hot"], "could not be converted to Float"),
        (["model=phi3", "data=a", "sampling.seed=null"], "sampling.seed cannot be null"),
        (["model=phi3", "data=a", "dataset.on_error=stop"], "it must be record or raise"),
        (["model=phi3", "data=a", "engine.max_num_seqs=0"], "it must be at least 1, or null"),
        (["model=phi3", "data=a", "dataset.sampling_columns=[heat]"], "among temperature, top_k"),
        (["model=phi3", "data=a (1).parquet"], """'data="a (1).parquet"'"""),
        (["model=phi3", "data=a=b.parquet"], """'data="a=b.parquet"'"""),
        (["model=phi3", "data=[a[1].parquet]"], """'data=["a[1].parquet"]'"""),
        (["verfy", "a", "b"], "'verfy' is no verb and no KEY=VALUE"),
        (["model=phi3", "data=7"], "data=7 must be a path"),
        (["model=phi3", "data=a", "check.runs=2"], "add --config-dir jobs --config-name nightly"),
        (["model=phi3", "data=a", "sampling.stop.x=1"], "`orcd-batch --help` lists them"),
    ],
)
def test_a_wrong_command_line_gets_one_sentence(capsys, jobs, args, sentence):
    code, out, err = run(capsys, *args)
    assert code == 2
    assert sentence in err
    assert len(err.strip().splitlines()) == 1
    assert not out
    assert not jobs


def test_debug_shows_the_traceback_before_the_sentence_and_keeps_the_exit_code(capsys, jobs):
    code, _, err = run(capsys, "model=phi3", "debug=true")
    assert code == 2
    assert "Traceback" in err
    assert err.strip().splitlines()[-1].startswith("orcd-batch: data is not set")


def test_what_hydra_does_not_expect_is_still_a_sentence(capsys, jobs):
    code, out, err = run(capsys, "model=phi3", "data=a", "sampling=null")
    assert code == 2
    assert not out
    assert "Traceback" not in err


def test_an_ill_typed_value_refuses_a_sweep_before_any_job_runs(capsys, jobs):
    code, out, err = run(capsys, "-m", "model=phi3", "data=a", "sampling.temperature=0,abc")
    assert code == 2
    assert "could not be converted" in err
    assert not out
    assert not jobs


@pytest.mark.parametrize(
    "path", ["a=b.parquet", "my (1) file.parquet", "a[1].parquet", "ü ☃.parquet"]
)
def test_a_quoted_path_may_hold_any_character(capsys, jobs, path):
    code, _, _ = run(capsys, "model=phi3", f'data="{path}"', f'output="{path}"')
    assert code == 0
    assert jobs[0].data == [path]
    assert jobs[0].output == path


def test_stop_strings_may_hold_bars_angles_commas_and_newlines(capsys, jobs):
    code, _, _ = run(capsys, "model=phi3", "data=a", 'sampling.stop=["<|end|>","a, b","x\ny"]')
    assert code == 0
    assert jobs[0].sampling.stop == ["<|end|>", "a, b", "x\ny"]


def test_the_last_line_of_stdout_is_the_json_of_the_run(capsys, jobs):
    code, out, _ = run(capsys, "model=phi3", "data=a")
    assert code == 0
    assert json.loads(out.splitlines()[-1])["rows"] == 0
    assert len(out.splitlines()) == 1


def test_a_multirun_prints_one_list_and_runs_every_combination(capsys, jobs):
    code, out, err = run(
        capsys, "-m", "model=phi3", "data=a", "sampling.temperature=0,0.7", "sampling.seed=range(2)"
    )
    assert code == 0
    documents = json.loads(out.splitlines()[-1])
    assert len(documents) == 4
    assert len({d["directory"] for d in documents}) == 4
    assert [(j.sampling.temperature, j.sampling.seed) for j in jobs] == [
        (0.0, 0), (0.0, 1), (0.7, 0), (0.7, 1),
    ]  # fmt: skip
    assert "[HYDRA]" in err
    assert "[HYDRA]" not in out


def test_one_bad_job_of_a_multirun_does_not_stop_the_others(capsys, jobs):
    code, out, err = run(capsys, "-m", "model=phi3", "data=a", "engine.max_num_seqs=0,4")
    assert code == 2
    first, second = json.loads(out.splitlines()[-1])
    assert "max_num_seqs=0" in first["error"]
    assert second["rows"] == 0
    assert "max_num_seqs=0" in err


def test_a_sweep_over_a_column_of_each_row_is_refused(capsys, jobs):
    code, _, err = run(
        capsys, "-m", "model=phi3", "data=a", "sampling.seed=1,2", "dataset.sampling_columns=[seed]"
    )
    assert code == 2
    assert "sampling.seed is swept" in err
    assert not jobs


def test_the_run_directory_depends_on_the_job_and_not_on_the_time_or_the_speed(capsys, jobs):
    names = [
        json.loads(run(capsys, "model=phi3", "data=a", *more)[1])["directory"]
        for more in ([], [], ["engine.max_num_seqs=7"], ["overwrite=true"], ["sampling.seed=1"])
    ]
    assert names[0] == names[1] == names[2] == names[3]
    assert names[4] != names[0]


def test_the_same_sweep_finds_its_directory_again(capsys, jobs, tmp_path):
    for order in (["sampling.seed=1,2", "data=a"], ["data=a", "sampling.seed=1,2"]):
        assert run(capsys, "-m", "model=phi3", *order)[0] == 0
    assert len(list((tmp_path / "outputs").glob("sweep-*"))) == 1


def test_help_names_every_option(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    unnamed = {"model", "sampling", "dataset", "engine"}
    unnamed |= {"model.name", "model.hub", "model.architectures", "engine.kind"}
    unnamed |= {"scale_out.kind"}
    missing = [n for n in option_names() if n not in unnamed and n.split(".")[-1] not in text]
    assert not missing


def test_help_is_ours_wherever_it_is_asked_for(capsys):
    assert main(["model=smollm2", "data=prompts.parquet", "--help"]) == 0
    assert "Exit codes" in capsys.readouterr().out


def test_the_data_room_knows_every_dataset_option():
    ours = {name.split(".")[1] for name in option_names() if name.startswith("dataset.")}
    theirs = {field.name for field in fields(DatasetOptions)}
    assert ours - theirs == {"on_error"}
    assert theirs <= ours


def test_help_answers_within_a_second_and_imports_nothing_heavy():
    code = (
        "import sys, time; t = time.perf_counter(); from orcd_batch.cli import main; "
        "assert main(['--help']) == 0; assert time.perf_counter() - t < 1; "
        "heavy = {'hydra', 'numpy', 'pyarrow', 'tokenizers', 'rich'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO_ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Exit codes" in done.stdout
