"""From what a user writes as a model's path to a file on this machine."""

import re
from pathlib import Path
from typing import NamedTuple

from orcd_batch.errors import CheckpointError

_SCHEME = "hf://"
_NAME = r"[A-Za-z0-9][\w.\-]*"
_HUB_PATH = re.compile(
    rf"(?P<repo>{_NAME}/{_NAME})/(?P<file>[^@]+\.gguf)(?:@(?P<revision>[^@\s]+))?", re.ASCII
)
_MAX_LISTED = 5


class HubPath(NamedTuple):
    """One file of one revision in a model repository; revision None is the repository's newest."""

    repo: str
    file: str
    revision: str | None


def resolve_model_path(path: str) -> Path:
    """A local path, or `hf://owner/repo/file.gguf@revision`, as the path of an existing file.

    A hub file is downloaded into the cache of `huggingface_hub` unless it is there already.
    Raises CheckpointError where there is no such file or it cannot be fetched.
    """
    if str(path).startswith(_SCHEME):
        return _download(parse_hub_path(str(path)))
    local = Path(path).expanduser()
    if local.is_file():
        return local
    if local.is_dir():
        raise CheckpointError(f"{path} is a directory; name a file in it{_ggufs_in(local)}.")
    raise CheckpointError(
        f"There is no model file {path}; check the path{_ggufs_in(local.parent)}."
    )


def parse_hub_path(path: str) -> HubPath:
    """Takes `hf://owner/repo/file.gguf@revision` apart; raises CheckpointError on another form."""
    match = _HUB_PATH.fullmatch(path.removeprefix(_SCHEME))
    if match is None or any(part in ("", ".", "..") for part in match["file"].split("/")):
        raise CheckpointError(
            f"{path!r} is not a hub path; write hf://owner/repo/file.gguf or "
            "hf://owner/repo/file.gguf@revision."
        )
    return HubPath(match["repo"], match["file"], match["revision"])


def _download(wanted: HubPath) -> Path:
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise CheckpointError(
            f"{_SCHEME}{wanted.repo} needs the package huggingface_hub, which does not import "
            f"({error}); install it, or name a local file."
        ) from error
    try:
        return Path(hf_hub_download(wanted.repo, wanted.file, revision=wanted.revision))
    # The library lets errors of its HTTP client, of the file system and of its own through.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(
            f"Cannot fetch {wanted.file} of {wanted.repo}"
            f"{f' at revision {wanted.revision}' if wanted.revision else ''}: {reason[:300]}; "
            "check the name, the network, or download it yourself and name the local file."
        ) from error


def _ggufs_in(directory: Path) -> str:
    """A hint such as " (there are a.gguf, b.gguf)", empty where there is none."""
    try:
        names = sorted(entry.name for entry in directory.iterdir() if entry.suffix == ".gguf")
    except OSError:
        return ""
    more = ", …" if len(names) > _MAX_LISTED else ""
    return f" (there are {', '.join(names[:_MAX_LISTED])}{more})" if names else ""
