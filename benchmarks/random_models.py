"""Random models of true shape for the GPU benchmarks: their files, and the engine over one."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from make_model import make_model
from true_shapes import SHAPES

from orcd_batch.checkpoint import GGUFFile, read_model_config
from orcd_batch.config import EngineOptions
from orcd_batch.engine_factory import BuiltEngine, EngineChoice, OpenModel, build_engine


@contextmanager
def models_folder(kept: Path | None) -> Iterator[Path]:
    """`kept`, made where it is missing; without it a temporary one, in memory where that can be."""
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
        yield kept
        return
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as temporary:
        yield Path(temporary)


def model_file(shape: str, folder: Path) -> Path:
    """The shape's file in the folder, written where it is missing."""
    path = folder / f"{shape}.gguf"
    if not path.exists():
        make_model(path, SHAPES[shape])
    return path


@contextmanager
def open_engine(path: Path, choice: EngineChoice, **options: Any) -> Iterator[BuiltEngine]:
    """The CUDA engine over a file, for contexts of up to 4,096 tokens; options: EngineOptions'."""
    engine_options = EngineOptions(kind="cuda", max_model_len=4096, **options)
    with GGUFFile.open(path) as gguf:
        model = OpenModel(gguf, read_model_config(gguf))
        with build_engine(model, engine_options, choice) as built:
            yield built
