"""The code of a page of docs, run in order; `text` blocks are what the block before them prints.

    python tests/support/doc_blocks.py docs/python_api.md

runs a page's blocks in a directory of their own and writes what they print into it.
"""

import contextlib
import io
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.paths import REAL_MODEL_NAME, REPO_ROOT, real_model_path

_BLOCK = re.compile(r"```(python|sh|text)\n(.*?)```\n", re.S)


@dataclass(frozen=True)
class Block:
    """One block of code. printed: the text block after it, None where there is none."""

    language: str
    code: str
    printed: str | None
    line: int


def blocks_of(text: str) -> list[Block]:
    """A page's python and sh blocks in order."""
    found = list(_BLOCK.finditer(text))
    result = []
    for match, after in zip(found, [*found[1:], None], strict=True):
        if match[1] != "text":
            follows = after is not None and after[1] == "text"
            line = text.count("\n", 0, match.start()) + 1
            result.append(Block(match[1], match[2], after[2] if follows else None, line))
    return result


def run(block: Block, names: dict[str, Any], directory: Path) -> str:
    """What a block prints. Python blocks share `names`; sh blocks show their stdout."""
    if block.language == "sh":
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "PYTHONPATH": str(REPO_ROOT)}
        command = ["bash", "-ec", block.code]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=directory, env=environment
        )
        assert done.returncode == 0, f"line {block.line}: {done.stderr[-2000:]}"
        return done.stdout
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block.code, f"docs, line {block.line}", "exec"), names)
    return printed.getvalue()


def working_directory(directory: Path, model: Path) -> Path:
    """Puts what the pages use, models/ and examples/, into an empty directory."""
    (directory / "models").mkdir()
    (directory / "models" / REAL_MODEL_NAME).symlink_to(model.resolve())
    (directory / "examples").symlink_to(REPO_ROOT / "examples")
    return directory


def update(page: Path) -> None:
    """Writes what the blocks print into the page's text blocks."""
    text, names = page.read_text(), dict[str, Any]()
    with tempfile.TemporaryDirectory() as temporary:
        directory = working_directory(Path(temporary), real_model_path())
        with contextlib.chdir(directory):
            for block in blocks_of(text):
                printed = run(block, names, directory)
                if block.printed is not None:
                    old = f"```{block.language}\n{block.code}```\n"
                    start = text.index(old) + len(old)
                    where = text.index("```text\n", start) + len("```text\n")
                    text = text[:where] + printed + text[text.index("```\n", where) :]
    page.write_text(text)


if __name__ == "__main__":
    update(Path(sys.argv[1]).resolve())
