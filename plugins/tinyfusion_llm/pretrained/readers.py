"""Tokenizers and processors of pretrained models, with error messages that say what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from tinyfusion_core.errors import MissingFileError, first_line, need
from tinyfusion_core.parsing.records import check_folder
from tinyfusion_llm.pretrained.reading import transformers


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
    if Path(name).is_dir():
        check_folder(Path(name))
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
    if Path(name).is_dir():
        check_folder(Path(name))
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
