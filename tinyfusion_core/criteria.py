"""Selectors that do not learn. All return the same `Decision` as the search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from .decision import Decision, provenance
from .errors import UserError
from .files import sha256
from .run_folder import RunFolder
from .sampling import BlockSampler, GroupedSampler
from .search import Selector
from .task import Task
from .trainer import Trainer


@dataclass(frozen=True)
class Keep(Selector):
    """Keep the blocks that somebody has chosen: by index, or as a decision file says.

    Args:
        blocks: indices of the blocks that stay.
        decision: path of a `decision.json`, made for a checkpoint of the same architecture.
    """

    blocks: Sequence[int] = field(default_factory=tuple)
    decision: str | None = None

    def __post_init__(self) -> None:
        if bool(self.blocks) == (self.decision is not None):
            raise UserError("Keep: give blocks or decision, one of the two")
        if len(set(self.blocks)) != len(self.blocks):
            raise UserError(f"Keep: blocks {list(self.blocks)} names a block twice")

    def __call__(self, task: Task, trainer: Trainer, run: RunFolder | None = None) -> Decision:
        source = provenance(trainer.seed, task.source)
        if self.decision is None:
            kept = tuple(sorted(self.blocks))
            return Decision(blocks=tuple(task.blocks), kept=kept, method="Keep", provenance=source)
        decision = Decision.load(self.decision)
        decision.check_fits(task.blocks, type(task.teacher).__name__)
        return replace(decision, provenance={**decision.provenance, **source, "taken_from": self.decision})

    def inputs(self) -> dict[str, str]:
        return {} if self.decision is None else {"search.decision": sha256(Path(self.decision))}

    def preview(self, lists: Mapping[str, int]) -> BlockSampler:
        if self.decision is None:
            kept: Sequence[int] = self.blocks
            total = sum(lists.values())
        else:
            loaded = Decision.load(self.decision)
            kept, total = loaded.kept, len(loaded.blocks)
        if total != sum(lists.values()) or any(not 0 <= i < total for i in kept):
            raise UserError(f"Keep: blocks {list(kept)} of {total} do not fit {sum(lists.values())} blocks")
        # A group of one block that is kept or not, for each block.
        flags = [(int(i in kept), 1) for i in range(total)]
        pattern, start = {}, 0
        for name, depth in lists.items():
            pattern[name] = flags[start : start + depth]
            start += depth
        return GroupedSampler(lists, pattern)  # type: ignore[arg-type]
