"""Whole jobs through the command line, on a small random model: files in, files and hashes out."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.gguf_factory import write_model
from support.paths import REPO_ROOT

from orcd_batch.checkpoint.content_hash import remember_model_hash
from orcd_batch.cli import main

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PROMPTS = ["one", "two two", "three, and a longer prompt than the others", "four?", "ünïcode 🙂"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_model(path, num_layers=1, hidden_size=64, num_heads=2, num_kv_heads=1,
                intermediate_size=64, context_length=128, chat_template=CHATML)  # fmt: skip
    return path


@pytest.fixture
def run(model, tmp_path, monkeypatch, capsys):
    """Runs one command line in an empty directory; returns exit code, last JSON, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def command(*args, verb=()):
        options = (
            "model=smollm2", f'model.path="{model}"', "engine=numpy", "sampling.max_tokens=6",
        )  # fmt: skip
        code = main([*verb, *args] if verb else [*options, *args])
        out, err = capsys.readouterr()
        return code, json.loads(out.splitlines()[-1]) if out else None, err

    return command


def write(path, **columns):
    pq.write_table(pa.table(columns), path)
    return f"data={path}"


@pytest.fixture
def prompts(tmp_path):
    return write(tmp_path / "prompts.parquet", id=list("abcde"), prompt=PROMPTS, extra=range(5))


def rows(path):
    return pq.read_table(path).to_pylist()


def test_a_run_writes_every_column_and_its_document(run, prompts):
    code, document, err = run(prompts)
    assert code == 0, err
    assert set(document) == {
        "rows", "rows_computed", "rows_resumed", "errors", "tokens", "tokens_per_s", "run_hash",
        "output",
    }  # fmt: skip
    assert document["rows"] == document["rows_computed"] == 5
    table = pq.read_table(document["output"])
    assert table.column_names == [
        "id", "prompt", "extra", "sample_index", "completion", "completion_ids", "finish_reason",
        "prompt_tokens", "completion_tokens", "logprob", "token_logprobs", "margins",
        "fingerprints", "token_hash", "numerics_hash", "error", "error_kind",
    ]  # fmt: skip
    assert table["id"].to_pylist() == list("abcde")
    for row in table.to_pylist():
        assert row["completion_tokens"] == len(row["completion_ids"]) == len(row["fingerprints"])
        assert row["logprob"] == pytest.approx(sum(row["token_logprobs"]))
        assert row["error"] is None
    assert document["tokens"] == sum(table["completion_tokens"].to_pylist())
    assert document["run_hash"] in err.replace("\n", "")


@pytest.mark.parametrize(
    "how",
    [
        ["engine.max_num_seqs=1"],
        ["engine.max_num_seqs=2", "engine.max_num_batched_tokens=3"],
        ["engine.max_num_batched_tokens=7"],
        ["engine.prefix_caching=false"],
        ["engine.num_threads=1"],
    ],
)
@pytest.mark.parametrize("sampling", ["greedy", "default"])
def test_how_it_runs_changes_no_bit(run, prompts, how, sampling):
    common = [prompts, f"sampling={sampling}", "sampling.n=2"]
    hashes = [run(*common, "output=a.parquet")[1]["run_hash"]]
    hashes.append(run(*common, "output=b.parquet", *how)[1]["run_hash"])
    assert hashes[0] == hashes[1]
    code, comparison, err = run("a.parquet", "b.parquet", verb=["verify"])
    assert code == 0, err
    assert comparison["equal"]


def test_the_order_and_the_company_of_rows_change_no_bit(run, prompts, tmp_path):
    _, whole, _ = run(prompts, "sampling=default")
    shuffled = write(
        tmp_path / "shuffled.parquet",
        id=list("ecadb"),
        prompt=[PROMPTS[i] for i in (4, 2, 0, 3, 1)],
    )
    alone = write(tmp_path / "alone.parquet", id=["c"], prompt=[PROMPTS[2]])
    _, other, _ = run(shuffled, "sampling=default")
    assert other["run_hash"] == whole["run_hash"]
    _, one, _ = run(alone, "sampling=default")
    of_c = [r for r in rows(whole["output"]) if r["id"] == "c"]
    assert [r["numerics_hash"] for r in rows(one["output"])] == [of_c[0]["numerics_hash"]]


def test_another_seed_gives_other_tokens_and_verify_says_where(run, prompts):
    run(prompts, "sampling=default", "output=a.parquet")
    run(prompts, "sampling=default", "sampling.seed=1", "output=b.parquet")
    code, comparison, err = run("a.parquet", "b.parquet", verb=["verify"])
    assert code == 1
    assert not comparison["equal"]
    assert "sampling.seed" in err


def test_a_finished_job_is_not_computed_again(run, prompts):
    _, first, _ = run(prompts)
    code, second, err = run(prompts)
    assert code == 0
    assert second["rows_computed"] == 0
    assert second["rows_resumed"] == 5
    assert second["run_hash"] == first["run_hash"]
    assert "overwrite=true" in err
    _, third, _ = run(prompts, "overwrite=true")
    assert third["rows_computed"] == 5
    assert third["run_hash"] == first["run_hash"]


def test_a_different_job_does_not_take_over_an_output(run, prompts):
    run(prompts, "output=a.parquet")
    code, _, err = run(prompts, "output=a.parquet", "sampling.seed=3")
    assert code == 2
    assert "sampling.seed" in err
    assert "overwrite=true" in err
    assert run(prompts, "output=a.parquet", "sampling.seed=3", "overwrite=true")[0] == 0


def test_rows_that_cannot_be_run_become_error_rows(run, tmp_path):
    data = write(
        tmp_path / "bad.parquet",
        prompt=["fine", None, "much too long " * 60, "", "also fine"],
    )
    code, document, err = run(data, "model.chat=false", "sampling.n=2")
    assert code == 0, err
    assert document["errors"] == 6
    table = rows(document["output"])
    assert len(table) == 10
    for row in table[2:8]:
        assert row["finish_reason"] == "error"
        assert row["error_kind"] == "input"
        assert row["completion"] is row["token_hash"] is row["prompt_tokens"] is None
    assert "128" in table[4]["error"]
    assert table[0]["error"] is None
    assert table[9]["error"] is None


def test_on_error_raise_stops_with_exit_code_1_and_keeps_finished_rows(run, tmp_path):
    data = write(tmp_path / "bad.parquet", prompt=[*PROMPTS, None])
    code, document, err = run(data, "dataset.on_error=raise", "output=o.parquet")
    assert code == 1
    assert document is None
    assert "Row 5" in err
    code, document, _ = run(data, "output=o.parquet")
    assert code == 0
    assert document["errors"] == 1


def test_on_error_raise_counts_the_error_rows_of_an_earlier_run(run, tmp_path):
    data = write(tmp_path / "bad.parquet", prompt=["fine", None])
    assert run(data, "output=o.parquet")[0] == 0
    code, document, err = run(data, "output=o.parquet", "dataset.on_error=raise")
    assert code == 1
    assert document is None
    assert "1 output rows" in err


def test_a_model_file_that_is_not_the_one_remembered_leaves_nothing_behind(
    run, prompts, model, tmp_path
):
    remember_model_hash(model, tmp_path / "cache" / "orcd_batch", "0" * 64)
    code, document, err = run(prompts, "output=o.parquet")
    assert code == 2
    assert document is None
    assert "changed while its size and time stayed the same" in err
    assert not list(tmp_path.glob("o.parquet*"))
    assert run(prompts, "output=o.parquet")[0] == 0


def test_a_long_stretch_of_bad_rows_is_committed_like_any_other(run, tmp_path):
    data = write(tmp_path / "bad.parquet", prompt=[*[None] * 300, "fine", *["x " * 200] * 300])
    code, document, err = run(data, "engine.max_num_seqs=2", "sampling.n=2")
    assert code == 0, err
    assert (document["rows"], document["errors"]) == (1202, 1200)


def test_bytes_that_are_no_text_spoil_their_own_row_only(run, tmp_path):
    spoilt = pa.Array.from_buffers(
        pa.string(),
        2,
        [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"ok\xff")],
    )
    code, document, err = run(write(tmp_path / "bytes.parquet", prompt=spoilt))
    assert code == 0, err
    assert document["errors"] == 1
    assert "UTF-8" in pq.read_table(document["output"], columns=["error"])["error"][1].as_py()


def test_what_a_model_says_cannot_steer_the_terminal(run, tmp_path):
    data = write(tmp_path / "escape.parquet", prompt=["red \x1b[31m and \x1b]0;title\x07"])
    code, _, err = run(data)
    assert code == 0
    assert "\x1b]0;" not in err
    assert "\x1b[31m" not in err


def test_a_number_of_samples_that_would_fill_memory_is_refused(run, prompts, tmp_path):
    code, _, err = run(prompts, "sampling.n=2000000000")
    assert code == 2
    assert "between 1 and 16384" in err
    data = write(tmp_path / "many.parquet", prompt=["x"], n=[2_000_000_000])
    code, document, _ = run(data, "dataset.sampling_columns=[n]")
    assert code == 0
    assert document["rows"] == document["errors"] == 1


def test_each_row_may_bring_its_own_sampling_and_samples(run, tmp_path):
    data = write(
        tmp_path / "own.parquet",
        prompt=["x", "x", "x", "x"],
        max_tokens=pa.array([1, 2, None, 3]),
        n=pa.array([1, 3, 1, -1]),
    )
    code, document, err = run(data, "dataset.sampling_columns=[max_tokens,n]")
    assert code == 0, err
    table = rows(document["output"])
    assert [r["sample_index"] for r in table] == [0, 0, 1, 2, 0, 0]
    limits = [1, 2, 2, 2, 6]
    assert all(r["completion_tokens"] <= m for r, m in zip(table, limits, strict=False))
    assert table[0]["finish_reason"] == "length"
    assert "n holds -1" in table[5]["error"]


def test_messages_and_chat_prompts_are_rendered_by_the_files_template(run, tmp_path):
    messages = [[{"role": "user", "content": text}] for text in PROMPTS]
    as_messages = write(tmp_path / "messages.parquet", messages=messages)
    as_prompts = write(tmp_path / "prompts.parquet", prompt=PROMPTS)
    rendered = [f"<|im_start|>user\n{p}<|im_end|>\n<|im_start|>assistant\n" for p in PROMPTS]
    as_text = write(tmp_path / "text.parquet", prompt=rendered)
    hashes = {
        run(as_messages)[1]["run_hash"],
        run(as_prompts)[1]["run_hash"],
        run(as_text, "model.chat=false")[1]["run_hash"],
    }
    assert len(hashes) == 1


def test_messages_that_make_no_sense_become_error_rows(run, tmp_path):
    good, alien = {"role": "user", "content": "x"}, {"role": "alien", "content": "x"}
    silent = {"role": "user", "content": None}
    data = write(tmp_path / "messages.parquet", messages=[[good], [alien], [silent], [], None])
    code, document, err = run(data)
    assert code == 0, err
    errors = [r["error"] for r in rows(document["output"])]
    assert errors[0] is None
    assert "'alien'" in errors[1]
    assert all(errors[1:])


def test_token_ids_run_as_they_are_and_are_checked(run, tmp_path):
    data = write(tmp_path / "ids.parquet", token_ids=[[5, 6, 7], [], [10**6], [-1], None])
    code, document, _ = run(data)
    assert code == 0
    table = rows(document["output"])
    assert table[0]["prompt_tokens"] == 3
    assert [r["error_kind"] for r in table] == [None, "input", "input", "input", "input"]
    assert "1000000" in table[2]["error"]


def test_a_stop_string_ends_a_completion_and_is_cut_off(run, prompts):
    _, free, _ = run(prompts, "sampling.max_tokens=12")
    text = max((r["completion"] for r in rows(free["output"])), key=len)
    stop = text[2:4]
    quoted = stop.replace("\\", "\\\\").replace('"', '\\"')
    code, document, err = run(prompts, "sampling.max_tokens=12", f'sampling.stop=["{quoted}"]')
    assert code == 0, err
    stopped = [r for r in rows(document["output"]) if r["finish_reason"] == "stop"]
    assert stopped
    assert all(stop not in r["completion"] for r in stopped)


def test_a_multirun_gives_each_job_what_it_gives_alone(run, prompts):
    code, documents, err = run("-m", prompts, "sampling.temperature=0,0.7", "sampling.seed=1,2")
    assert code == 0, err
    assert len({d["output"] for d in documents}) == 4
    _, alone, _ = run(prompts, "sampling.temperature=0.7", "sampling.seed=2")
    assert documents[3]["run_hash"] == alone["run_hash"]


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["data=nowhere.parquet"], "nowhere.parquet"),
        (["model.path=nowhere.gguf", "data=prompts.parquet"], "nowhere.gguf"),
        (["data=prompts.parquet", "dataset.prompt_column=text"], "id, prompt, extra"),
        (["data=prompts.parquet", "model.architectures=[phi3]"], "holds architecture 'llama'"),
        (["data=prompts.parquet", "engine=cuda"], "engine"),
        (["data=prompts.parquet", "sampling.top_p=0"], "top_p=0"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(run, prompts, args, sentence):
    code, document, err = run(*args)
    assert code == 2
    assert document is None
    assert sentence in err
    assert "Traceback" not in err


def test_an_input_column_named_like_an_output_column_is_refused_with_the_way_out(run, tmp_path):
    data = write(tmp_path / "again.parquet", prompt=["x"], completion=["old"])
    code, _, err = run(data)
    assert code == 2
    assert "dataset.drop_columns" in err
    assert "dataset.output_prefix" in err
    assert run(data, "dataset.output_prefix=new_")[0] == 0
    assert run(data, "dataset.drop_columns=[completion]")[0] == 0


def test_an_input_without_rows_gives_an_output_without_rows(run, tmp_path):
    data = write(tmp_path / "empty.parquet", prompt=pa.array([], pa.string()))
    code, document, err = run(data)
    assert code == 0, err
    assert document["rows"] == 0
    assert "completion_ids" in pq.read_schema(document["output"]).names


def test_ctrl_c_keeps_finished_rows_and_the_same_command_continues(model, tmp_path):
    write(tmp_path / "in.parquet", prompt=[f"row {i}" for i in range(600)])
    command = [
        sys.executable, "-m", "orcd_batch", "model=smollm2", f"model.path={model}",
        "data=in.parquet", "output=out.parquet", "engine=numpy", "sampling.max_tokens=8",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(REPO_ROOT), "XDG_CACHE_HOME": str(tmp_path)}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    log = tmp_path / "outputs"
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not _is_generating(log):
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err.decode()
    assert b"the same command continues" in err
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, check=True, timeout=120
    )
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["rows"] == 600
    assert document["rows_resumed"] > 0


def _is_generating(outputs: Path) -> bool:
    return any("numpy engine" in log.read_text() for log in outputs.glob("*/orcd_batch.log"))
