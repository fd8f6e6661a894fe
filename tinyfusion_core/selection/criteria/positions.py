"""Criteria by position alone."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from typing_extensions import override

from ...protocols.task import Task
from ...samplers.compiled import Constraints
from ...training.trainer import Trainer
from .base import Criterion, CriterionResult


class Positions(Criterion):
    """Keep the blocks at certain positions of every choice.

    A choice is a group of the pattern, a block list, or, with one number for all lists, their concatenation. If
    protected blocks take places, the blocks farthest from a wanted position are removed.
    """

    @abstractmethod
    def positions(self, num_kept: int, size: int) -> Sequence[int]:
        """Return the wanted positions among `size` blocks."""

    @override
    def guess(self, constraints: Constraints) -> Sequence[int]:
        scores = [0.0] * constraints.num_blocks
        for choice in constraints.choices:
            if choice.num_kept is None:
                return self._guess_number(constraints)
            self._score(scores, choice.blocks, choice.num_kept)
        return constraints.best(scores)

    def _guess_number(self, constraints: Constraints) -> Sequence[int]:
        """With costs: the number of blocks whose wanted positions come closest to what is allowed; the largest such."""
        blocks, found = range(constraints.num_blocks), []
        for number in range(constraints.num_blocks, 0, -1):
            scores = [0.0] * constraints.num_blocks
            wanted = self._score(scores, blocks, number)
            kept = constraints.best(scores)
            found.append((len(wanted ^ set(kept)), kept))
        return min(found, key=lambda pair: pair[0])[1]

    def _score(self, scores: list[float], blocks: Sequence[int], num_kept: int) -> set[int]:
        """Score each block by its distance from a wanted position; returns the blocks that are at one."""
        wanted = self.positions(num_kept, len(blocks))
        for position, block in enumerate(blocks):
            scores[block] = -min((abs(position - w) for w in wanted), default=0)
        return {blocks[w] for w in wanted}

    @override
    def decide(self, constraints: Constraints, task: Task, trainer: Trainer) -> CriterionResult:
        return CriterionResult(self.guess(constraints))


class Uniform(Positions):
    """Keep evenly spaced blocks: the last of each of k equal segments (of 8 blocks 1, 3, 5, 7)."""

    @override
    def positions(self, num_kept: int, size: int) -> Sequence[int]:
        return [(i + 1) * size // num_kept - 1 for i in range(num_kept)]


class FirstN(Positions):
    """Keep the first blocks."""

    @override
    def positions(self, num_kept: int, size: int) -> Sequence[int]:
        return range(num_kept)


class LastN(Positions):
    """Keep the last blocks."""

    @override
    def positions(self, num_kept: int, size: int) -> Sequence[int]:
        return range(size - num_kept, size)


class BKSDM(Positions):
    """Keep evenly spaced blocks from the first to the last (BK-SDM, arXiv:2305.15798; of 8 blocks 0, 2, 5, 7)."""

    @override
    def positions(self, num_kept: int, size: int) -> Sequence[int]:
        return [round(i * (size - 1) / max(1, num_kept - 1)) for i in range(num_kept)]
