"""The hashes: what they cover, what they ignore, and that they stay the same for ever."""

import hashlib
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orcd_batch.reproducibility import RunHash, numerics_hash, stream_digest, token_hash
from orcd_batch.reproducibility.environment import code_hash, cpu_name, environment

ids = st.integers(-(2**63), 2**64 - 1) | st.text(max_size=8)
tokens = st.lists(st.integers(0, 2**31 - 1), max_size=6)


def test_an_integer_id_and_its_text_have_different_streams() -> None:
    assert stream_digest(5, 0) != stream_digest("5", 0)
    assert stream_digest(5, 0) != stream_digest(5, 1)
    assert stream_digest("i5", 0) != stream_digest(5, 0)


@given(ids, st.integers(0, 1000))
def test_a_stream_is_the_head_of_a_sha256(row_id: int | str, sample: int) -> None:
    typed = ("s" + row_id if isinstance(row_id, str) else f"i{row_id}").encode()
    message = b"orcd_batch stream\n" + struct.pack("<q", sample) + typed
    expected = struct.unpack("<Q", hashlib.sha256(message).digest()[:8])[0]
    assert stream_digest(row_id, sample) == expected


@given(tokens, tokens)
def test_the_token_hash_covers_lengths_and_ids(prompt: list[int], completion: list[int]) -> None:
    message = b"orcd_batch tokens\n" + struct.pack("<qq", len(prompt), len(completion))
    message += struct.pack(f"<{len(prompt) + len(completion)}i", *prompt, *completion)
    assert token_hash(prompt, completion) == hashlib.sha256(message).hexdigest()


def test_moving_a_token_from_prompt_to_completion_changes_the_hash() -> None:
    assert token_hash([1, 2], [3]) != token_hash([1], [2, 3])
    with pytest.raises(OverflowError):
        token_hash([2**31], [])


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=6))
def test_the_numerics_hash_covers_the_fingerprints(fingerprints: list[int]) -> None:
    message = struct.pack(f"<{len(fingerprints)}q", *fingerprints)
    assert numerics_hash(fingerprints) == hashlib.sha256(message).hexdigest()


records = st.tuples(ids, st.integers(0, 3), st.sampled_from(["t", "u"]), st.just("n"))


@given(st.lists(records, max_size=12), st.randoms(use_true_random=False))
def test_the_run_hash_ignores_order_and_nothing_else(
    rows: list[tuple[int | str, int, str, str]], chance: object
) -> None:
    first, second = RunHash(), RunHash()
    for row in rows:
        first.add(*row)
    shuffled = list(rows)
    chance.shuffle(shuffled)  # type: ignore[attr-defined]
    for row in shuffled:
        second.add(*row)
    assert first.hexdigest() == second.hexdigest()
    assert len(first) == len(rows)
    second.add("one more", 0, "t", "n")
    assert first.hexdigest() != second.hexdigest()


def test_an_error_row_counts_as_its_kind() -> None:
    def run_hash(kind: str | None, token: str | None = None) -> str:
        run = RunHash()
        run.add(1, 0, token, token, kind)
        return run.hexdigest()

    assert run_hash("input") == run_hash("input", "ignored")
    assert len({run_hash("input"), run_hash("infrastructure"), run_hash(None, "t")}) == 3


STREAM = 16205443382221326987
RUN = "2208fb549ba89d095df2749cc21022e3bea56cf27b939152f4c71e9b50180002"


def test_published_values_never_change() -> None:
    run = RunHash()
    run.add(7, 0, token_hash([1], [2]), numerics_hash([3]))
    run.add("7", 1, None, None, "input")
    assert stream_digest(7, 0) == STREAM
    assert run.hexdigest() == RUN


def test_the_environment_names_versions_blas_and_cpu() -> None:
    found = environment("numpy")
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"numpy", "tokenizers", "pyarrow", "git_commit", "cpu"} <= set(found)
    assert found["cpu"] == cpu_name() != ""
    assert all(set(build) >= {"version", "architecture"} for build in found["blas"])
    assert "blas" not in environment("cuda")


def test_the_code_hash_does_not_depend_on_the_directory_it_runs_from(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parent.parent
    program = (
        f"import sys; sys.path.insert(0, {str(root)!r});"
        "from orcd_batch.reproducibility.environment import code_hash; print(code_hash())"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == code_hash()
