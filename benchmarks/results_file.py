"""Where results go: benchmarks/results/<date>-<card>-<what>.json, with what they depend on."""

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

from orcd_batch.engine_factory import EngineChoice
from orcd_batch.reproducibility.environment import code_hash, environment

RESULTS = Path(__file__).parent / "results"


def _command() -> str:
    """The command that ran, from the checkout, without the folder of its results."""
    words = list(sys.argv)
    if "--results" in words:
        first = words.index("--results")
        del words[first : first + 2]
    script = Path(words[0]).resolve()
    return " ".join(["python", f"{script.parent.name}/{script.name}", *words[1:]])


def write_results(folder: Path, what: str, choice: EngineChoice, facts: dict[str, Any]) -> Path:
    """Stores the facts and says where on stderr. choice: the engine they were found on."""
    card = choice.device if choice.kind == "cuda" else "cpu"
    slug = re.sub(r"[^a-z0-9]+", "-", card.lower().replace("nvidia", "")).strip("-")
    path = folder / f"{time.strftime('%Y-%m-%d')}-{slug}-{what}.json"
    document = {
        "what": what,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": _command(),
        "engine": choice.kind,
        "device": choice.device,
        "environment": {**environment(choice.kind), **choice.versions},
        "code_hash": code_hash(),
        **facts,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(f"stored in {path}", file=sys.stderr, flush=True)
    return path
