"""The text encoders of a diffusers pipeline, called as the pipeline calls them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion_core.errors import UserError, first_line
from tinyfusion_core.parsing.weights import fingerprint
from tinyfusion_core.runtime.files import digest
from tinyfusion_core.runtime.progress import quietly
from tinyfusion_diffusers.backbone import DiffusersTransformer
from tinyfusion_diffusers.pipelines.index import loggers, read_index
from tinyfusion_diffusers.shapes import TEXT_WIDTHS_2, given
from tinyfusion_diffusers.structure import class_of, construct, settings

GUIDANCE, LENGTH = "do_classifier_free_guidance", "max_sequence_length"
"""Arguments of `encode_prompt`."""


@dataclass(frozen=True)
class TextEncoders:
    """The text encoders of a pipeline, and what its transformer takes of what they give.

    Args:
        where: where the pipeline is, for messages.
        pipeline: the pipeline; of its networks only the text encoders have weights.
        length: tokens of a prompt; None for as many as the pipeline takes.
        device: where the text encoders are.
    """

    where: str
    pipeline: Any
    length: int | None
    device: torch.device

    @property
    def name(self) -> str:
        """Class of the pipeline."""
        return type(self.pipeline).__name__

    def fingerprint(self) -> str:
        """Return a hash of the text encoders' weights."""
        return digest({name: fingerprint(network) for name, network in _networks(self.pipeline).items()})

    @cached_property
    def empty(self) -> dict[str, Tensor]:
        """The embeddings of the empty prompt, as the pipeline guides away from it: by name, each (1, ...).

        Raises:
            UserError: the pipeline has no `encode_prompt` in the known form.
        """
        try:
            # Some put an instruction before a prompt, but not before the one that they guide away from.
            found = self._call([""], guided=GUIDANCE in self._takes)
            return self._padded(self._named(found, 1, which=1 if GUIDANCE in self._takes else 0))
        except (AttributeError, IndexError, LookupError, TypeError, ValueError) as e:
            raise UserError(
                f"{self.where}: encode_prompt of {self.name} is not in the known form, which takes prompts and gives "
                f"tensors of embeddings, masks and pooled embeddings ({first_line(e)})"
            ) from e

    def __call__(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Encode prompts.

        Returns:
            `text` (n, tokens, width), and `mask` (n, tokens), `pooled` (n, width), `text_2` (n, tokens, width) and
            `mask_2` (n, tokens) if the transformer takes them.
        """
        return self._padded(self._named(self._call(list(prompts), guided=False), len(prompts), which=0))

    @cached_property
    def _takes(self) -> Mapping[str, inspect.Parameter]:
        """The arguments of `encode_prompt`."""
        kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        found = inspect.signature(self.pipeline.encode_prompt).parameters
        return {name: p for name, p in found.items() if p.kind not in kinds}

    @cached_property
    def _options(self) -> dict[str, Any]:
        """The other arguments: what the pipeline itself passes when it is called with a prompt alone."""
        whole = inspect.signature(type(self.pipeline).__call__).parameters
        options = {name: whole[name].default if name in whole else p.default for name, p in self._takes.items()}
        given = {"device": self.device, **({} if self.length is None else {LENGTH: self.length})}
        options.update({name: value for name, value in given.items() if name in options})
        return options

    def _call(self, prompts: list[str], guided: bool) -> Sequence[Any]:
        """What `encode_prompt` returns."""
        own = {"prompt": prompts, GUIDANCE: guided, "batch_size": len(prompts)}
        told = {**self._options, **{name: value for name, value in own.items() if name in self._takes}}
        if missing := [name for name, value in told.items() if value is inspect.Parameter.empty]:
            raise TypeError(f"it takes '{missing[0]}'")
        with torch.no_grad(), quietly(*loggers()):
            found: Sequence[Any] = self.pipeline.encode_prompt(**told)
        return found

    @cached_property
    def _pooled(self) -> int | None:
        """Width of the pooled embeddings, if the transformer takes any."""
        return settings(self.pipeline.transformer)["pooled_projection_dim"] if "pooled" in self._wanted else None

    @cached_property
    def _wanted(self) -> set[str]:
        """The columns that the transformer takes."""
        found, config = set(given(class_of(self.pipeline.transformer)).values()), settings(self.pipeline.transformer)
        return found if any(config.get(width) for width in TEXT_WIDTHS_2) else found - {"text_2", "mask_2"}

    def _named(self, found: Sequence[Any], rows: int, which: int) -> dict[str, Tensor]:
        """The columns in what was returned, told by their shapes: those of the prompts, or of the negative prompts."""
        if "text_2" in self._wanted:  # all who give a second text give both with their masks, in this order
            columns = dict(zip(("text", "mask", "text_2", "mask_2"), found, strict=True))
            return {name: (t.bool() if "mask" in name else t).cpu() for name, t in columns.items()}
        columns = {"text": _alike(found, (rows, None, None), floats=True)[which]}
        if "mask" in self._wanted:
            shape = tuple(columns["text"].shape[:2])
            masks = _alike(found, shape, floats=False)
            # Where all tokens count, there may be none.
            columns["mask"] = masks[which].bool() if masks else torch.ones(shape, dtype=torch.bool)
        if self._pooled is not None:
            columns["pooled"] = _alike(found, (rows, self._pooled), floats=True)[which]
        return {name: column.cpu() for name, column in columns.items()}

    def _padded(self, columns: dict[str, Tensor]) -> dict[str, Tensor]:
        """With zeros up to the number of tokens that all prompts get: some pipelines pad to the longest of a batch."""
        missing = self._options.get(LENGTH, 0) - columns["text"].shape[1]
        if missing <= 0:
            return columns
        if "mask" not in columns:
            raise ValueError("texts differ in length, and the transformer takes no mask")
        pad = nn.functional.pad
        return {**columns, "text": pad(columns["text"], (0, 0, 0, missing)), "mask": pad(columns["mask"], (0, missing))}


def load_text_encoders(where: str, length: int | None, dtype: torch.dtype, device: torch.device) -> TextEncoders:
    """Load the text encoders of a pipeline; its other networks are not read.

    Args:
        where: the pipeline's folder, or its id on the Hugging Face hub.
        length: tokens of a prompt; None for as many as the pipeline takes.
        dtype: dtype of the weights.
        device: where to put them.

    Raises:
        UserError: there is no such pipeline, or it takes no prompts, or no such length.
    """
    index = read_index(where, "encode-prompts")
    if not hasattr(index.cls, "encode_prompt") or index.network is None:
        raise UserError(
            f"{where}: the pipeline {index.cls.__name__} has no encode_prompt, or no transformer; expected one of "
            "those in docs/diffusers.md that take prompts"
        )
    if length is not None and LENGTH not in inspect.signature(index.cls.encode_prompt).parameters:
        raise UserError(f"encode-prompts: text_length is {length}, but {where} takes texts of a length of its own")
    with torch.device("meta"):
        transformer = construct(DiffusersTransformer(model=where).config())
    kinds = ("text_encoder", "tokenizer")
    index.check_known(*kinds)
    given = {**{name: None for name in index.parts if not name.startswith(kinds)}, "transformer": transformer}
    try:
        with quietly(*loggers()), torch.random.fork_rng():
            # Safetensors alone: other files may hold code.
            pipeline = index.cls.from_pretrained(where, **given, dtype=dtype, use_safetensors=True)
    except Exception as e:  # damaged files make the readers fail in any way they can
        raise UserError(f"{where}: its text encoders cannot be read ({first_line(e)})") from None
    if not _networks(pipeline):
        raise UserError(f"{where}: holds no text encoder; give the pipeline's whole folder")
    for network in _networks(pipeline).values():
        network.to(device).eval()
    return TextEncoders(where, pipeline, length, device)


def _alike(found: Sequence[Any], shape: Sequence[int | None], floats: bool) -> list[Tensor]:
    """The tensors of a shape, in which None is any size."""
    tensors = [t for t in found if isinstance(t, Tensor) and t.ndim == len(shape) and t.is_floating_point() == floats]
    return [t for t in tensors if all(n in (None, size) for n, size in zip(shape, t.shape, strict=True))]


def _networks(pipeline: Any) -> dict[str, nn.Module]:
    found = {name: part for name, part in pipeline.components.items() if name.startswith("text_encoder")}
    return {name: part for name, part in sorted(found.items()) if isinstance(part, nn.Module)}
