"""Selectors that take their choice from elsewhere: indices, or the decision of an earlier search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from typing_extensions import override

from ..errors import UserError
from ..protocols.task import Task
from ..pruning.decision import Decision, provenance
from ..runtime.files import sha256
from ..runtime.run_folder import RunFolder
from ..samplers.compiled import Constraints
from ..training.trainer import Trainer
from .base import Selector
from .criteria.base import Criterion, CriterionResult


@dataclass(frozen=True)
class Keep(Selector):
    """Keep given blocks: by index, or as in a decision file.

    Args:
        blocks: indices of the blocks to keep.
        decision: path of a `decision.json`, made for a checkpoint of the same architecture; or of a mergekit YAML, a
            list of indices or of peft's `layer_replication`, or a `--prune-layers` argument of llama.cpp.
    """

    blocks: Sequence[int] = field(default_factory=tuple)
    decision: str | None = None

    def __post_init__(self) -> None:
        if bool(self.blocks) == (self.decision is not None):
            raise UserError("Keep: give blocks or decision, one of the two")
        if len(set(self.blocks)) != len(self.blocks):
            raise UserError(f"Keep: blocks {list(self.blocks)} names a block twice")

    @override
    def __call__(self, task: Task, trainer: Trainer, run: RunFolder | None = None) -> Decision:
        decision = self.preview(task.blocks)
        taken = {} if self.decision is None else {"taken_from": self.decision}
        return replace(decision, provenance={**decision.provenance, **provenance(trainer.seed, task.source), **taken})

    @override
    def inputs(self) -> dict[str, str]:
        return {} if self.decision is None else {"search.decision": sha256(Path(self.decision))}

    @override
    def preview(self, blocks: Sequence[str]) -> Decision:
        if self.decision is None:
            return Decision(blocks=tuple(blocks), kept=tuple(sorted(self.blocks)), method="Keep")
        return Decision.from_file(self.decision, blocks)


@dataclass(frozen=True, kw_only=True)
class Nested(Criterion):
    """Keep the blocks that an earlier search kept most often: several budgets from one search.

    Blocks are ranked by the search's decision, then by its marginals: a smaller budget keeps a subset of what a larger
    one keeps, and the search's own budget keeps its decision. The search's rules are ignored; `protect` is not.

    Args:
        decision: path of the search's `decision.json`, made for a checkpoint of the same architecture.
    """

    decision: str

    @override
    def inputs(self) -> dict[str, str]:
        return {"search.decision": sha256(Path(self.decision))}

    @override
    def preview(self, blocks: Sequence[str]) -> Decision:
        Decision.load(self.decision).check_fits(blocks, "the network")
        return super().preview(blocks)

    @override
    def guess(self, constraints: Constraints) -> Sequence[int]:
        found = Decision.load(self.decision)
        if len(found.marginals) != constraints.num_blocks:
            raise UserError(
                f"{self.decision}: has marginals of {len(found.marginals)} blocks, the network "
                f"{constraints.num_blocks}; give the decision of a learned search of it"
            )
        scores = found.ranking
        kept = constraints.best(scores)
        alike = {scores[i] for i in set(kept) ^ set(constraints.best(scores, late=True))}
        if alike:
            tied = [i for i, score in enumerate(scores) if score in alike and i not in constraints.protected]
            raise UserError(
                f"{self.decision}: does not say which of the blocks {', '.join(map(str, tied))} to keep: their "
                "marginals are alike, as after a search that has settled; search with that budget"
            )
        return kept

    @override
    def decide(self, constraints: Constraints, task: Task, trainer: Trainer) -> CriterionResult:
        return CriterionResult(self.guess(constraints), provenance={"taken_from": self.decision})
