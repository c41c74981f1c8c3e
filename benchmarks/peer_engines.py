"""Other engines behind one face: load a model, run samples greedily to their full length.

Each says why it cannot run here (`missing`). vLLM gets the model's shape with random weights of its
own (load_format="dummy"): it reads no GGUF with fused Phi-3 tensors; its speed does not depend on
their values.
"""

import json
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from true_shapes import Shape
from workloads import Work


class Peer(Protocol):
    """name, package: as users know it, and what must be installed."""

    name: str
    package: str

    def load(self, model: Path, shape: Shape, works: Sequence[Work], max_running: int) -> None: ...
    def run(self, works: Sequence[Work]) -> int:
        """Runs every sample; returns the tokens that came back."""
        ...

    def close(self) -> None: ...


def missing(peer: Peer) -> str | None:
    """Why the peer cannot run here, or None."""
    if find_spec(peer.package) is None:
        return f"{peer.name} is not installed here (no module {peer.package})"
    return None


def version_of(peer: Peer) -> str:
    return f"{peer.package} {version(peer.package.replace('_', '-'))}"


class XLlamaCpp:
    """llama.cpp's server inside this process (xllamacpp), one slot per running sample."""

    name, package = "llama.cpp", "xllamacpp"

    def load(self, model: Path, shape: Shape, works: Sequence[Work], max_running: int) -> None:
        xllamacpp: Any = import_module(self.package)
        params = xllamacpp.CommonParams()
        params.model.path = str(model)
        params.n_gpu_layers = 999
        params.n_parallel = self._slots = min(len(works), max_running)
        longest = max(len(work.prompt) + work.num_new for work in works) + 8
        params.n_ctx = self._slots * longest
        params.n_batch = params.n_ubatch = 2048
        params.cont_batching, params.warmup = True, True
        params.verbosity = -1
        self._server = xllamacpp.Server(params)

    def run(self, works: Sequence[Work]) -> int:
        with ThreadPoolExecutor(self._slots) as pool:
            return sum(pool.map(self._complete, works))

    def close(self) -> None:
        del self._server

    def _complete(self, work: Work) -> int:
        answer = self._server.handle_completions(
            {
                "prompt": list(work.prompt),
                "n_predict": work.num_new,
                "temperature": 0,
                "ignore_eos": True,
                "return_tokens": True,
                "cache_prompt": True,
            }
        )
        found = json.loads(answer) if isinstance(answer, str | bytes) else answer
        if "tokens_predicted" in found:
            return int(found["tokens_predicted"])
        return int(found["usage"]["completion_tokens"])


class LlamaCppPython:
    """llama-cpp-python: one sequence at a time is all that its interface offers."""

    name, package = "llama.cpp (llama-cpp-python)", "llama_cpp"

    def load(self, model: Path, shape: Shape, works: Sequence[Work], max_running: int) -> None:
        if len(works) > 1:
            raise NotImplementedError("llama-cpp-python runs one sequence at a time: w1 alone")
        longest = len(works[0].prompt) + works[0].num_new + 8
        self._llama: Any = import_module(self.package).Llama(
            str(model), n_gpu_layers=-1, n_ctx=longest, n_batch=2048, verbose=False
        )

    def run(self, works: Sequence[Work]) -> int:
        count = 0
        for _ in self._llama.generate(works[0].prompt, temp=0.0, reset=True):
            count += 1
            if count == works[0].num_new:
                break
        return count

    def close(self) -> None:
        self._llama.close()


class Vllm:
    """vLLM's offline engine: CUDA graphs and prefix caching on, as in PERFORMANCE.md."""

    name, package = "vLLM", "vllm"

    def load(self, model: Path, shape: Shape, works: Sequence[Work], max_running: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        config = Path(self._folder.name) / "config.json"
        config.write_text(json.dumps(huggingface_config(shape)))
        vllm: Any = import_module(self.package)
        self._vllm = vllm
        self._llm = vllm.LLM(
            self._folder.name,
            dtype="float16",
            load_format="dummy",
            skip_tokenizer_init=True,
            enable_prefix_caching=True,
            max_num_seqs=min(len(works), max_running),
            max_model_len=max(len(work.prompt) + work.num_new for work in works) + 8,
        )

    def run(self, works: Sequence[Work]) -> int:
        prompts = [{"prompt_token_ids": list(work.prompt)} for work in works]
        params = [
            self._vllm.SamplingParams(
                temperature=0, max_tokens=work.num_new, ignore_eos=True, detokenize=False
            )
            for work in works
        ]
        done = self._llm.generate(prompts, params, use_tqdm=False)
        return sum(len(one.outputs[0].token_ids) for one in done)

    def close(self) -> None:
        del self._llm
        self._folder.cleanup()


def huggingface_config(shape: Shape) -> dict[str, Any]:
    """The config.json of a model of this shape."""
    names = {"phi3": "Phi3ForCausalLM", "qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}
    return {
        "architectures": [names[shape.architecture]],
        "model_type": shape.architecture,
        "num_hidden_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.context_length,
        "original_max_position_embeddings": shape.context_length,
        "rope_theta": shape.rope_theta,
        "rms_norm_eps": shape.rms_norm_eps,
        "tie_word_embeddings": shape.tied,
        "torch_dtype": "float16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def timed(peer: Peer, works: Sequence[Work]) -> tuple[float, int]:
    """Seconds and tokens of one run, after a short one that warms up."""
    peer.run([Work(work.prompt[::-1], min(work.num_new, 4)) for work in works[:64]])
    started = time.perf_counter()
    tokens = peer.run(works)
    return time.perf_counter() - started, tokens


PEERS: tuple[Peer, ...] = (XLlamaCpp(), LlamaCppPython(), Vllm())
