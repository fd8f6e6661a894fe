"""What Whisper writes of held-out speech, run by transformers, with fewer positions, and by CTranslate2.

    python benchmarks/prepare_whisper.py; python benchmarks/prepare_whisper.py --seconds 6
    python benchmarks/prepare_speech.py
    pip install --no-deps --target /opt/clients ctranslate2
    TINYFUSION_CLIENTS=/opt/clients python benchmarks/transcripts.py 20

CTranslate2 reads the files that `prepare_whisper.py` reads: it should write the same words, from the same logits.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from prepare_speech import SPEECH
from prepare_whisper import MODEL, fetch
from transformers import WhisperForConditionalGeneration

from tinyfusion_core.runtime.distributed import batches
from tinyfusion_llm import SpeechText
from tinyfusion_llm.speech.source import SpeechRows
from tinyfusion_llm.speech.words import normaliser, percent_wrong, transcripts

BATCH = 10


def rows_of(folder: Path) -> SpeechRows:
    file = str(SPEECH / "held_out.jsonl")
    return SpeechText(processor=str(folder), files=[file], held_out_files=[file], context=64).held_out()


def by_ctranslate2(rows: SpeechRows, num: int) -> tuple[list[str], np.ndarray]:
    """Transcripts, and the logits (num, vocabulary) of their first tokens."""
    import ctranslate2

    texts, logits = [], []
    with tempfile.TemporaryDirectory() as scratch:
        model = ctranslate2.models.Whisper(str(fetch(Path(scratch))), compute_type="float32", intra_threads=1)
        for numbers in batches(num, BATCH):
            batch = rows.__getitems__(list(numbers))
            features = ctranslate2.StorageView.from_array(batch["features"].numpy())
            prompts = batch["tokens"][:, : rows.num_prompt].tolist()
            made = model.generate(features, prompts, beam_size=1, max_length=rows.context, return_logits_vocab=True)
            texts += [rows.processor.tokenizer.decode(one.sequences_ids[0], skip_special_tokens=True) for one in made]
            logits += [np.array(one.logits[0][0]) for one in made]
    return texts, np.stack(logits)


def main(num: int) -> None:
    torch.set_num_threads(1)
    written = {}
    for folder in sorted(MODEL.parent.glob(f"{MODEL.name}*")):
        rows, model = rows_of(folder), WhisperForConditionalGeneration.from_pretrained(folder).eval()
        start = time.perf_counter()
        written[folder.name] = [text for part in batches(num, BATCH) for text in transcripts(model, rows, part)]
        seconds = time.perf_counter() - start
        normalise = normaliser(rows.processor.tokenizer)
        said = [normalise(one.text) for one in rows.utterances[:num]]
        wrong = percent_wrong(said, [normalise(text) for text in written[folder.name]])
        print(f"{folder}: {wrong:.1f} % of the words are wrong in {num} recordings, {seconds:.0f} s", flush=True)
    if clients := os.environ.get("TINYFUSION_CLIENTS"):
        sys.path.append(clients)
        rows, model = rows_of(MODEL), WhisperForConditionalGeneration.from_pretrained(MODEL).eval()
        texts, theirs = by_ctranslate2(rows, num)
        same = sum(a == b for a, b in zip(texts, written[MODEL.name], strict=True))
        batch = rows.__getitems__(list(range(BATCH)))
        with torch.no_grad():
            prompts = batch["tokens"][:, : rows.num_prompt]
            ours = model(batch["features"], decoder_input_ids=prompts).logits[:, -1].numpy()
        there = theirs[:BATCH] > -1e30  # the others are of tokens that may not begin a text
        most, size = np.abs(ours - theirs[:BATCH])[there].max(), np.abs(ours).max()
        print(f"CTranslate2: {same} of {num} transcripts are the same; logits differ by {most:.1e} of {size:.0f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 100)
