"""Embeddings of documents by a teacher, made once."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import get_worker_info

from tinyfusion_core.errors import UserError
from tinyfusion_core.protocols.data import Samples
from tinyfusion_core.runtime.files import save_tensors
from tinyfusion_llm.encoders.backbone import TextEncoder
from tinyfusion_llm.encoders.losses import Pooling, embedded

PART, BATCH = 256, 32
"""Documents in a file, and in a batch."""


@contextmanager
def about_teacher() -> Iterator[None]:
    """Let messages about a model or tokenizer name the setting that says which teacher it is."""
    try:
        yield
    except UserError as e:
        reason = re.sub(r"^((backbone|data)\.)?(model|tokenizer): ", "", str(e))
        raise type(e)(f"data.teacher: {reason}") from None


@dataclass(frozen=True)
class Embeddings:
    """The embeddings of documents, made when one is first asked for, with its neighbours, and kept in files.

    Attributes:
        teacher: what makes them.
        samples: all documents as the teacher reads them: `tokens` and `attention`, each (rows, context).
        pooling: how they are made of its hidden states.
        folder: where they are kept; its name stands for all of this.
    """

    teacher: TextEncoder
    samples: Samples
    pooling: Pooling
    folder: Path

    def __call__(self, documents: Sequence[int]) -> Tensor:
        """Return the embeddings of documents, (rows, channels), by their numbers."""
        return torch.stack([self._part(i // PART)[i % PART] for i in documents])

    def _part(self, number: int) -> Any:
        """Embeddings of a part of the documents, of which rows can be read."""
        path = self.folder / f"{number}.safetensors"
        if not path.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            last = min(PART * (number + 1), len(self.samples))
            save_tensors(path, {"embedding": self._made(range(PART * number, last))})
        return safe_open(path, "pt").get_slice("embedding")  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _made(self, documents: range) -> Tensor:
        device = next(self._network.parameters()).device
        found = []
        for first in documents[::BATCH]:
            batch = self.samples.__getitems__(list(range(first, min(first + BATCH, documents.stop))))
            longest = int(batch["attention"].sum(1).max())
            inputs = {name: batch[name][:, :longest].to(device) for name in ("tokens", "attention")}
            found.append(embedded(self._network, inputs, self.pooling).cpu())
        return torch.cat(found)

    @cached_property
    def _network(self) -> Any:
        # Processes that read data beside the training cannot use its device.
        there = torch.accelerator.is_available() and get_worker_info() is None
        with about_teacher():
            return self.teacher.build().to(torch.accelerator.current_accelerator() if there else "cpu")
