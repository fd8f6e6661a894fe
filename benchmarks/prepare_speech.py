"""Prepare the speech of recipes/whisper.yaml: `python benchmarks/prepare_speech.py`; it needs espeak-ng of Debian.

espeak-ng (`apt-get install espeak-ng`) reads sentences of The Debian Administrator's Handbook, which
`prepare_smollm2.py` fetches: 1,000 to train and 100 to hold out, in English voices of several countries, timbres and
speeds. Which voice reads which sentence is drawn from a seed. The wav files have 16 kHz, as Whisper takes them, and at
most 6 seconds.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import tempfile
from pathlib import Path

import soundfile
from prepare_smollm2 import TEXT, fetch_text
from scipy.signal import resample_poly

from tinyfusion_core.errors import UserError
from tinyfusion_core.runtime.files import write_text

SPEECH = Path("data/debian-speech")
PARTS = {"held_out": 100, "train": 1000}
RATE, SECONDS = 16000, 6.0
VOICES = ("en-us", "en-gb", "en-gb-x-rp")
TIMBRES = ("m1", "m3", "m5", "m7")
WORDS_PER_MINUTE = (130, 180)
SENTENCE = re.compile(r"(?<![^\s])[A-Z][a-z]*(?:,? [a-z][a-z'-]*){5,19}\.(?=\s|$)")
"""Six to twenty words that are no names, numbers or commands: how they are spoken is how they are written."""


def sentences() -> list[str]:
    """All of the book, each once, in its order."""
    if not TEXT.is_dir():
        with tempfile.TemporaryDirectory() as scratch:
            fetch_text(Path(scratch))
    pages = (path.read_text(encoding="utf-8") for path in sorted(TEXT.glob("*.txt")))
    return list(dict.fromkeys(found for page in pages for found in SENTENCE.findall(page)))


def spoken(text: str, rng: random.Random, scratch: Path) -> tuple[object, str]:
    """Samples (samples,) at `RATE`, and the voice that reads."""
    voice, speed = f"{rng.choice(VOICES)}+{rng.choice(TIMBRES)}", rng.randint(*WORDS_PER_MINUTE)
    file = scratch / "spoken.wav"
    try:
        subprocess.run(["espeak-ng", "-v", voice, "-s", str(speed), "-w", str(file), "--", text], check=True)
    except (OSError, subprocess.CalledProcessError) as e:
        raise UserError(f"espeak-ng cannot read aloud ({e}); `apt-get install espeak-ng`") from None
    samples, rate = soundfile.read(file)
    return resample_poly(samples, RATE, rate), voice


def main() -> None:
    rng = random.Random(0)
    texts = sentences()
    rng.shuffle(texts)
    with tempfile.TemporaryDirectory() as scratch:
        for part, num in PARTS.items():
            (SPEECH / part).mkdir(parents=True, exist_ok=True)
            rows: list[str] = []
            while len(rows) < num:
                if not texts:
                    raise UserError(f"{TEXT}: no sentence is left for {part}; delete it, to fetch the book again")
                samples, voice = spoken(text := texts.pop(), rng, Path(scratch))
                if len(samples) <= SECONDS * RATE:
                    name = f"{part}/{len(rows):04}.wav"
                    soundfile.write(SPEECH / name, samples, RATE, subtype="PCM_16")
                    rows.append(json.dumps({"audio": name, "text": text, "voice": voice}))
            write_text(SPEECH / f"{part}.jsonl", "\n".join(rows) + "\n")
            print(f"{SPEECH / part}.jsonl: {num} sentences")


if __name__ == "__main__":
    main()
