"""Tokenizers and processors of pretrained models, with error messages that say what to do; texts as their tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from tinyfusion_core.errors import MissingFileError, first_line, need
from tinyfusion_core.parsing.records import check_folder
from tinyfusion_core.runtime.files import digest
from tinyfusion_llm.pretrained.reading import check_path, transformers


def load_tokenizer(name: str, revision: str | None, gguf_file: str | None, required: bool = True) -> Any:
    """Load the tokenizer of a model.

    Args:
        name: folder or hub id.
        revision: branch, tag or commit on the hub.
        gguf_file: name of a GGUF file that holds it.
        required: whether a missing one is an error.

    Returns:
        The tokenizer; None if it is missing and not required.

    Raises:
        UserError: it is missing though required.
    """
    reader = transformers("data.tokenizer").AutoTokenizer
    if gguf_file:
        need("gguf", "tinyfusion[gguf]", "gguf_file")
    more = {"gguf_file": gguf_file} if gguf_file else {}
    _check_place(name, "data.tokenizer", required)
    try:
        made = reader.from_pretrained(name, revision=revision or "main", **more)
        made("a")  # some damage shows only then
        return made
    except Exception as e:  # damaged files make the readers fail in any way they can
        if not required:
            return None
        raise MissingFileError(
            f"data.tokenizer: no tokenizer in '{name}' ({first_line(e)}); expected tokenizer.json or what "
            "AutoTokenizer of transformers reads. Copy the original model's tokenizer files there"
        ) from None


READERS = {"images": "image_processor", "audio": "feature_extractor"}
"""What a processor has that takes them."""


def load_processor(
    name: str, revision: str | None, required: bool = True, reads: Literal["images", "audio"] | None = None
) -> Any:
    """Load what makes the inputs of a model that reads images or hears audio.

    Args:
        name: folder or hub id.
        revision: branch, tag or commit on the hub.
        required: whether a missing one is an error.
        reads: which of them it has to take; None for either.

    Returns:
        The processor; None if it is missing and not required.

    Raises:
        UserError: it is missing or damaged, or takes no such inputs, though required.
    """
    reader = transformers("data.processor").AutoProcessor
    what = reads or "images or audio"
    _check_place(name, "data.processor", required)
    try:
        made = reader.from_pretrained(name, revision=revision or "main")
        takes = any(hasattr(made, part) for kind, part in READERS.items() if reads in (kind, None))
        reason = "" if takes else f"{type(made).__name__} takes no {what}"
    except Exception as e:  # damaged files make the readers fail in any way they can
        reason = first_line(e)
    if not reason:
        return made
    if not required:
        return None
    raise MissingFileError(
        f"data.processor: no processor of {what} and text in '{name}' ({reason}); expected what AutoProcessor of "
        "transformers reads. Copy the original model's processor and tokenizer files there"
    )


def said_by(name: str, key: str) -> Any:
    """Return what a model's generation config says, or else its config; None if neither does.

    Args:
        name: folder or hub id of the model.
        key: the setting.
    """
    for reader in (transformers().GenerationConfig, transformers().AutoConfig):
        with suppress(OSError, ValueError):  # what is missing or damaged says nothing
            if (said := getattr(reader.from_pretrained(name), key, None)) is not None:
                return said
    return None


def encode(tokenizer: Any, texts: Sequence[str], special: bool = True, target: bool = False) -> list[list[int]]:
    """Return the token ids of texts. What is spelled like a special token in a text is text as any other.

    Args:
        tokenizer: of transformers.
        texts: the texts.
        special: whether the tokenizer puts its special tokens around each.
        target: whether they are what a decoder writes, which some tokenizers read as another language.
    """
    given = {"text_target" if target else "text": list(texts)}
    backend: Any = getattr(tokenizer, "_tokenizer", None)  # of transformers' own there is none
    if type(getattr(backend, "model", None)).__name__ == "Unigram" and any(map(special_of(tokenizer).search, texts)):
        kind: Any = type(backend)  # of tokenizers, which only transformers depends on
        tokenizer._tokenizer = _without_special_pieces(kind, backend.to_str())
    try:
        encoded: list[list[int]] = tokenizer(
            **given, add_special_tokens=special, split_special_tokens=True, verbose=False
        )["input_ids"]
    finally:
        if backend is not None:
            tokenizer._tokenizer = backend
    return encoded


def special_of(tokenizer: Any) -> re.Pattern[str]:
    """Return a pattern that finds the special tokens of a tokenizer in a text."""
    names = sorted(str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    return re.compile("|".join(map(re.escape, names)) or "(?!)")


@lru_cache(maxsize=2)
def _without_special_pieces(kind: type[Any], told: str) -> Any:
    """A tokenizer in whose vocabulary of pieces no special token is found; all have the numbers that they had.

    SentencePiece, too, looks for none of them in a text; a Unigram model of `tokenizers` takes them for likely words.
    """
    settings = json.loads(told)
    special = {token["content"] for token in settings["added_tokens"] if token["special"]}
    pieces = settings["model"]["vocab"]
    hidden = special.intersection(piece for piece, _ in pieces)
    settings["model"]["vocab"] = [
        [f"\0{i}" if piece in hidden else piece, score] for i, (piece, score) in enumerate(pieces)
    ]
    settings["added_tokens"] = [token for token in settings["added_tokens"] if token["content"] not in hidden]
    return kind.from_str(json.dumps(settings))


def identity_of(tokenizer: Any) -> str:
    """Return a hash of all that decides which tokens a tokenizer makes of a text."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    return digest([fast.to_str() if fast is not None else tokenizer.get_vocab(), tokenizer.eos_token_id])


def filler_of(tokenizer: Any) -> int:
    """Return the token that samples are padded with."""
    numbers = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(number for number in numbers if number is not None)


def _check_place(name: str, key: str, required: bool) -> None:
    if required:
        check_path(name, key)
    if Path(name).is_dir():
        check_folder(Path(name))
