"""Paths: local ones are checked, hub ones taken apart and fetched through huggingface_hub."""

import sys
from pathlib import Path
from types import ModuleType

import pytest

from orcd_batch.checkpoint.hub import parse_hub_path, resolve_model_path
from orcd_batch.errors import CheckpointError


def install_hub(monkeypatch: pytest.MonkeyPatch, download: object) -> None:
    module = ModuleType("huggingface_hub")
    module.hf_hub_download = download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)


def test_a_local_file_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a = (b) [c].gguf"
    path.touch()
    assert resolve_model_path(str(path)) == path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model_path("~/a = (b) [c].gguf") == path


def test_a_missing_file_is_reported_with_those_beside_it(tmp_path: Path) -> None:
    (tmp_path / "other.gguf").touch()
    with pytest.raises(CheckpointError, match=r"no model file .*this.gguf.*there are other.gguf"):
        resolve_model_path(str(tmp_path / "this.gguf"))
    with pytest.raises(CheckpointError, match=r"is a directory.*other.gguf"):
        resolve_model_path(str(tmp_path))
    with pytest.raises(CheckpointError, match="no model file"):
        resolve_model_path(str(tmp_path / "no" / "such.gguf"))


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("hf://a/b/c.gguf", ("a/b", "c.gguf", None)),
        ("hf://Qwen/Qwen2.5-0.5B/q8_0/m.gguf@refs/pr/1", ("Qwen/Qwen2.5-0.5B", "q8_0/m.gguf")),
        ("hf://a/b/c.gguf@main", ("a/b", "c.gguf", "main")),
    ],
)
def test_a_hub_path_has_a_repository_a_file_and_maybe_a_revision(
    path: str, expected: tuple[str | None, ...]
) -> None:
    assert parse_hub_path(path)[: len(expected)] == expected


@pytest.mark.parametrize(
    "path",
    [
        "hf://a/b",
        "hf://a/b.gguf",
        "hf://a/b/../../c.gguf",
        "hf://a/b/c.bin",
        "hf://a/b/c.gguf@",
        "hf://a//c.gguf",
        "hf:///a/b/c.gguf",
        "hf://a/b//c.gguf",
        "hf://../b/c.gguf",
    ],
)
def test_another_form_of_hub_path_is_refused(path: str) -> None:
    with pytest.raises(CheckpointError, match="not a hub path"):
        parse_hub_path(path)


def test_a_hub_file_is_fetched_at_its_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(repo: str, file: str, revision: str | None) -> str:
        asked.append((repo, file, revision))
        return str(tmp_path / file)

    install_hub(monkeypatch, download)
    assert resolve_model_path("hf://a/b/c.gguf@v1") == tmp_path / "c.gguf"
    assert asked == [("a/b", "c.gguf", "v1")]


def test_a_download_that_fails_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(repo: str, file: str, revision: str | None) -> str:
        raise RuntimeError("no\nsuch\nhost")

    install_hub(monkeypatch, download)
    with pytest.raises(CheckpointError, match=r"Cannot fetch c\.gguf of a/b: no such host; check"):
        resolve_model_path("hf://a/b/c.gguf")


def test_without_the_hub_library_the_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="needs the package huggingface_hub"):
        resolve_model_path("hf://a/b/c.gguf")
