"""Images and text as samples, made by the model's own processor while they are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from tinyfusion_core.errors import UserError, first_line
from tinyfusion_llm.documents import Row, text_of
from tinyfusion_llm.hidden import IGNORED
from tinyfusion_llm.images.columns import columns
from tinyfusion_llm.sources.parted import RowSource, file_beside


@dataclass(frozen=True)
class Example:
    """Images, what is asked about them, and what is to be said.

    Attributes:
        images: their files.
        prompt: the text before, in which the processor puts the images.
        text: prompt and answer.
        where: the row that it is from, for messages.
    """

    images: Sequence[Path]
    prompt: str
    text: str
    where: str


@dataclass(frozen=True)
class ImageRows:
    """Examples as samples of T tokens; see `ImageText`.

    Attributes:
        examples: all of them, in order.
        processor: of transformers.
        context: T.
    """

    examples: Sequence[Example]
    processor: Any
    context: int

    def __len__(self) -> int:
        return len(self.examples)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Return `tokens` and `labels` (rows, context), and columns of the images, see `columns`.

        Raises:
            UserError: an image cannot be read, or prompt and images leave no room for the text.
        """
        made = [self._processed(self.examples[i]) for i in indices]
        filler = self.processor.tokenizer.pad_token_id or 0
        tokens, labels = [], []
        for inputs, first in made:
            ids = inputs["input_ids"][0, : self.context]
            missing = (0, self.context - len(ids))
            counted = torch.where(torch.arange(len(ids)) < first, IGNORED, ids)
            tokens.append(F.pad(ids, missing, value=filler))
            labels.append(F.pad(counted, missing, value=IGNORED))
        further = columns([inputs for inputs, _ in made], self.context)
        return {"tokens": torch.stack(tokens), "labels": torch.stack(labels), **further}

    def fullest(self, num_rows: int) -> dict[str, Tensor]:
        """Return a batch of the first sample with the most images, repeated: by name, each (rows, ...)."""
        most = max(range(len(self)), key=lambda i: len(self.examples[i].images))
        return self.__getitems__([most] * num_rows)

    def where(self, name: str, index: int) -> str:
        """Return the row that a sample is from."""
        return self.examples[index].where

    def extremes(self, name: str) -> Sequence[tuple[int, str]]:
        """Return nothing: tokens are made when they are read."""
        return []

    def _processed(self, example: Example) -> tuple[Mapping[str, Tensor], int]:
        """What the processor makes of an example, and how many of its first tokens are the prompt's."""
        images = [_image(path, example.where) for path in example.images]
        try:
            found = self.processor(text=[example.text], images=[images] if images else None, return_tensors="pt")
        except Exception as e:  # of any family's code
            raise UserError(
                f"{example.where}: the processor refuses it ({type(e).__name__}: {first_line(e)})"
            ) from None
        inputs = {name: value for name, value in found.items() if name != "attention_mask"}
        ids, (prompt, whole) = inputs["input_ids"][0].tolist(), self._plain(example)
        same = (a == b for a, b in zip(prompt, whole, strict=False))
        said = len(whole) - next((i for i, equal in enumerate(same) if not equal), min(len(prompt), len(whole)))
        if ids[len(ids) - said :] != whole[len(whole) - said :]:
            raise UserError(f"{example.where}: an image stands in the text; put images into the prompt")
        if (first := len(ids) - said) >= self.context:
            raise UserError(
                f"{example.where}: prompt and images take {first} tokens, data.context is {self.context}; make it "
                "larger (backbone.context must be the same), or the images smaller in the processor's files"
            )
        return inputs, first

    def _plain(self, example: Example) -> list[list[int]]:
        """Tokens of the prompt and of the whole text, each image one of them."""
        found: list[list[int]] = self.processor.tokenizer([example.prompt, example.text])["input_ids"]
        return found


@dataclass(frozen=True, kw_only=True)
class ImageText(RowSource):
    """Images and text as samples of T = `context` tokens, by the processor of a model that reads images.

    A sample is a row of a JSONL file: images, a prompt that follows them, and a text, which alone counts in losses. The
    chat template of the processor writes prompt and text as turns of user and assistant, with the images in the first.
    Without a template they are put together as they are, with an end-of-text token, and the prompt names the images by
    the processor's own tokens. A longer text is cut at the end. Images are read anew each time.

    Args:
        image_field: key of the images: a list of files, or one; relative to the JSONL file. A row may have none.
        prompt_field: key of the prompt. A row may have none.
        context: tokens per sample, those of its images among them.
    """

    reads: ClassVar[Literal["images", "audio"]] = "images"
    holding: ClassVar[str] = "images and text"
    order: ClassVar[str] = "images and text"

    image_field: str = "images"
    prompt_field: str = "prompt"

    @override
    def _samples(self, processor: Any, examples: Sequence[Example]) -> ImageRows:
        rows = ImageRows(examples, processor, self.context)
        rows.fullest(1)  # what does not fit at all shows before anything is spent
        return rows

    @override
    def _examples(self, processor: Any, rows: Iterable[Row]) -> list[Example]:
        return [self._example(processor, row) for row in rows]

    def _example(self, processor: Any, row: Row) -> Example:
        settings, values = "data.text_field, data.prompt_field", {self.prompt_field: "", **row.values}
        prompt = text_of(values, self.prompt_field, row.where, settings)
        text = text_of(row.values, self.text_field, row.where, settings, empty=False)
        images = row.values.get(self.image_field, [])
        images = [images] if isinstance(images, str) else images
        if not isinstance(images, list) or not all(isinstance(name, str) for name in images):
            raise UserError(
                f"{row.where}: '{self.image_field}' is no list of files; give their names, or set data.image_field"
            )
        files = [file_beside(row, name, "image") for name in images]
        return Example(files, *_written(processor, len(files), prompt, text, row.where), row.where)


def _written(processor: Any, num_images: int, prompt: str, text: str, where: str) -> tuple[str, str]:
    """The prompt, and prompt and text, as the processor's chat template writes them."""
    if not processor.chat_template:
        return prompt, prompt + text + (processor.tokenizer.eos_token or "")
    asked = [{"type": "text", "text": prompt}] if prompt else []
    user = {"role": "user", "content": [*({"type": "image"} for _ in range(num_images)), *asked]}
    assistant = {"role": "assistant", "content": [{"type": "text", "text": text}]}
    try:
        before: str = processor.apply_chat_template([user], add_generation_prompt=True, tokenize=False)
        whole: str = processor.apply_chat_template([user, assistant], tokenize=False)
    except Exception as e:  # whatever a template raises
        raise UserError(f"{where}: the processor's chat template refuses it ({first_line(e)})") from None
    if not whole.startswith(before):
        raise UserError(
            f"{where}: the processor's chat template writes the prompt otherwise when a text follows, so the two "
            "cannot be told apart; correct chat_template.jinja of the processor"
        )
    return before, whole


def _image(path: Path, where: str) -> Any:
    from PIL import Image  # which no command needs that reads no image

    try:
        with Image.open(path) as opened:
            return opened.convert("RGB")
    except (OSError, ValueError) as e:
        raise UserError(f"{where}: {path} is damaged or no image ({first_line(e)}); copy it again") from None
