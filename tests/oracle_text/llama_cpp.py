"""llama.cpp's tokenizer out of the xllamacpp wheel, through ctypes; only to write answers."""

import ctypes
from pathlib import Path
from typing import Any

_PARAMETER_BYTES = 80
_VOCAB_ONLY_AT = 72
_ROOM = 16


class _Parameters(ctypes.Structure):
    _fields_ = [("raw", ctypes.c_uint8 * _PARAMETER_BYTES)]


class LlamaCpp:
    """The vocabulary of one GGUF (weights are not read), encoding as llama.cpp does.

    `llama_model_params` is passed as bytes; where its flag `vocab_only` lies was read off the
    version named in README.md.
    """

    def __init__(self, path: Path) -> None:
        import xllamacpp.xllamacpp as wheel

        self._library: Any = ctypes.CDLL(wheel.__file__)
        self._library.llama_model_default_params.restype = _Parameters
        load = self._library.llama_model_load_from_file
        load.argtypes, load.restype = [ctypes.c_char_p, _Parameters], ctypes.c_void_p
        get_vocabulary = self._library.llama_model_get_vocab
        get_vocabulary.argtypes, get_vocabulary.restype = [ctypes.c_void_p], ctypes.c_void_p
        parameters = self._library.llama_model_default_params()
        parameters.raw[_VOCAB_ONLY_AT] = 1
        model = load(str(path).encode(), parameters)
        if not model:
            raise RuntimeError(f"llama.cpp cannot read {path}")
        self._vocabulary = ctypes.c_void_p(get_vocabulary(model))

    def encode(self, text: str, parse_special: bool) -> list[int]:
        """Token ids of `text` without BOS."""
        raw = text.encode()
        room = len(raw) + _ROOM
        ids = (ctypes.c_int32 * room)()
        count = self._library.llama_tokenize(
            self._vocabulary, raw, len(raw), ids, room, False, parse_special
        )
        if count < 0:
            raise RuntimeError(f"llama.cpp needs room for {-count} tokens, it had {room}")
        return list(ids[:count])
