"""Encodes prompts to shards of embeddings, with any number of processes; it can be interrupted and resumed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from tinyfusion_core.dataloading.encoding import DTYPES, Encoding, Record, folder_kind
from tinyfusion_core.dataloading.shards import FORMAT_VERSION
from tinyfusion_core.errors import require
from tinyfusion_core.parsing.settings import Settings
from tinyfusion_core.runtime.distributed import device_of_this_process
from tinyfusion_core.runtime.files import digest
from tinyfusion_core.runtime.seeding import generator
from tinyfusion_diffusers.prompts.sources import read_prompts
from tinyfusion_diffusers.prompts.text_encoders import TextEncoders, load_text_encoders


@dataclass(frozen=True, kw_only=True)
class EncodePrompts(Settings):
    """Encode prompts by the text encoders of a diffusers pipeline, to shards that `EncodedPrompts` reads.

    The rows are in the order of the prompts. They are `text` (rows, L, D), and those that the pipeline's transformer
    takes of `mask` (rows, L), `pooled` (rows, D), and of a second encoder `text_2` (rows, L, D) and `mask_2` (rows, L).
    The pipeline's own `encode_prompt` makes them, as a call of the
    pipeline with a prompt alone would.

    With several processes each makes its share of the shards. Finished shards are verified, and not made again.

    Args:
        model: the pipeline's folder, or its id on the Hugging Face hub.
        field: the entry of each line of a .jsonl file that is the prompt.
        text_length: tokens of a prompt, where the pipeline lets one choose; by default as many as it takes.
        empty: share of the prompts whose rows get the embeddings of the empty prompt, for classifier-free guidance.
        dtype: dtype of the text encoders, and of the embeddings in the files.
        shard_size: prompts in a shard.
        batch_size: prompts per batch; affects results by rounding only.
        seed: seed of the choice of the prompts that are replaced by the empty one.
    """

    model: str
    field: str = "caption"
    text_length: int | None = None
    empty: float = 0.0
    dtype: Literal["float32", "float16", "bfloat16"] = "bfloat16"
    shard_size: int = 32
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("shard_size", "batch_size"):
            require(getattr(self, name) >= 1, f"encode-prompts: {name}", getattr(self, name), "at least 1")
        enough = self.text_length is None or self.text_length >= 1
        require(enough, "encode-prompts: text_length", self.text_length, "at least 1")
        require(0 <= self.empty < 1, "encode-prompts: empty", self.empty, "a share, from 0 to below 1")

    def __call__(self, prompts: Path, out: Path) -> dict[str, Any]:
        """Encode the prompts that are not encoded yet.

        Args:
            prompts: a text file with a prompt on each line, or a .jsonl file of mappings.
            out: the folder of the embeddings.

        Returns:
            The content of `out/metadata.json`.

        Raises:
            UserError: the prompts or the pipeline cannot be read, the folder is in use or holds others, the disk is
                too small, or a written shard is damaged.
            Interrupted: a signal arrived; finished shards are kept.
        """
        device = device_of_this_process()
        read = read_prompts(prompts, self.field)
        encoders = load_text_encoders(self.model, self.text_length, self.torch_dtype, device)
        return _Encoding(out, self.shard_size, self.batch_size, self, read, encoders).run()

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of that name."""
        return DTYPES[self.dtype]


@dataclass
class _Encoding(Encoding):
    """One call of `EncodePrompts`."""

    command = "encode-prompts"
    kind = folder_kind("embeddings of prompts", "encoders_sha256")

    how: EncodePrompts
    prompts: Sequence[str]
    encoders: TextEncoders

    @cached_property
    @override
    def settings(self) -> dict[str, Any]:
        how = self.how
        return {
            "format_version": FORMAT_VERSION,
            "pipeline": self.encoders.name,
            "encoders_sha256": self.encoders.fingerprint(),
            "row": {name: list(column.shape[1:]) for name, column in self._empty.items()},
            "empty": how.empty,
            "dtype": how.dtype,
            "seed": how.seed,
            "shard_size": how.shard_size,
            "source": {"prompts": len(self.prompts), "sha256": digest(self.prompts)},
        }

    @property
    @override
    def order(self) -> list[int]:
        return list(range(len(self.prompts)))

    @override
    def bytes_per_example(self) -> int:
        return sum(column.nbytes for column in self._empty.values())

    @override
    def encode(self, batches: Sequence[list[int]]) -> Iterator[tuple[dict[str, Tensor], list[str]]]:
        for batch in batches:
            rows = {name: column.repeat_interleave(len(batch), 0) for name, column in self._empty.items()}
            told = [place for place, i in enumerate(batch) if not (self._dropped[i] or not self.prompts[i])]
            if told:
                for name, column in self._stored(self.encoders([self.prompts[batch[place]] for place in told])).items():
                    rows[name][told] = column
            yield rows, []

    @override
    def fault(self, items: Sequence[int], skipped: Sequence[str], tensors: Mapping[str, Tensor]) -> str:
        shapes = {name: list(column.shape) for name, column in tensors.items()}
        expected = {name: [len(items), *shape] for name, shape in self.settings["row"].items()}
        return "" if shapes == expected else f"it holds {shapes}, not {expected}"

    @override
    def summary(self, records: Sequence[Record]) -> dict[str, Any]:
        return {"num_prompts": sum(record.shard.count for record in records)}

    @cached_property
    def _empty(self) -> dict[str, Tensor]:
        return self._stored(self.encoders.empty)

    @cached_property
    def _dropped(self) -> list[bool]:
        """Whether a prompt is replaced by the empty one."""
        num = len(self.prompts)
        drawn = torch.rand(num, generator=generator("encode-prompts", self.how.seed, "empty", num)) < self.how.empty
        replaced: list[bool] = drawn.tolist()
        return replaced

    def _stored(self, columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """In the dtype of the files."""
        dtype = self.how.torch_dtype
        return {name: t.to(dtype) if t.is_floating_point() else t for name, t in columns.items()}
