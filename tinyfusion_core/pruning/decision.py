"""The decision: which blocks are kept, with what confidence, and its provenance."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..parsing.records import read_json, shaped
from ..parsing.settings import Settings
from ..runtime.files import write_json
from .interop_formats import read_kept

FORMAT_VERSION = 1


def provenance(seed: int, source: Mapping[str, Any]) -> dict[str, Any]:
    """Return the provenance of a decision: seed, source checkpoint, and versions of the libraries."""
    return {"seed": seed, "source": dict(source), "versions": versions()}


def versions() -> dict[str, str]:
    """Return the versions of the libraries that affect results."""
    found = {}
    for name in ("tinyfusion", "torch", "accelerate", "peft", "timm"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def no_order(method: str) -> str:
    """Return what to say of a method after whose decision it is not known which blocks would go next."""
    return (
        f"{method} does not say in which order more blocks would go; take a search, a race, or a criterion that scores "
        "every block, such as Taylor"
    )


@dataclass(frozen=True)
class Decision(Settings):
    """The outcome of a search or a criterion.

    Attributes:
        blocks: paths of the N blocks it is about, in execution order.
        kept: indices of the kept blocks, ascending.
        method: name of the selector that decided.
        pattern: the keep-N-of-M pattern, if there was one.
        choices: the blocks of each independent choice (for N:M, the groups).
        confidences: probability of the chosen option of each of them.
        marginals: probability that each block is kept.
        provenance: seed, steps, source checkpoint and its hash, recipe hash, library versions.
    """

    blocks: tuple[str, ...]
    kept: tuple[int, ...]
    method: str
    pattern: Any = None
    choices: tuple[tuple[int, ...], ...] = ()
    confidences: tuple[float, ...] = ()
    marginals: tuple[float, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        bad = [k for k in self.kept if not 0 <= k < len(self.blocks)]
        if bad or list(self.kept) != sorted(set(self.kept)):
            raise UserError(
                f"decision keeps {list(self.kept)}: indices must ascend, be distinct and lie in "
                f"0 to {len(self.blocks) - 1}"
            )
        if not self.kept:
            raise UserError("decision keeps no block at all")
        if any(not choice or not set(choice) <= set(range(len(self.blocks))) for choice in self.choices):
            raise UserError(f"decision chooses among {list(map(list, self.choices))}: not all are blocks")
        if len(self.marginals) not in (0, len(self.blocks)):
            raise UserError(f"decision has marginals of {len(self.marginals)} of {len(self.blocks)} blocks")

    @property
    def removed(self) -> tuple[int, ...]:
        """Indices of the blocks that are not kept, ascending."""
        return tuple(i for i in range(len(self.blocks)) if i not in self.kept)

    @property
    def beside_gaps(self) -> tuple[int, ...]:
        """Positions, among the kept blocks, of those beside a removed one in their list."""
        from ..protocols.blocks.paths import block_lists  # only here: a decision is read without torch

        pairs = [pair for members in block_lists(self.blocks).values() for pair in pairwise(members)]
        removed = set(self.removed)
        near = {a for pair in pairs for a, b in (pair, pair[::-1]) if b in removed}
        return tuple(position for position, index in enumerate(self.kept) if index in near)

    @property
    def ranking(self) -> list[float]:
        """Score of each block, by which smaller budgets keep a subset of what larger ones keep; empty if there is none.

        The decision's own blocks come before the others, each ranked by marginals, else by a criterion's scores.
        """
        if self.marginals:
            return [p + (i in self.kept) for i, p in enumerate(self.marginals)]
        scores = [float(score) for score in self.provenance.get("scores") or ()]
        largest = max(map(abs, scores), default=0.0) or 1.0
        return [score / largest + 2 * (i in self.kept) for i, score in enumerate(scores)]

    def inside(self, num: int) -> tuple[int, ...]:
        """Return which of the kept blocks a smaller student keeps, as positions among them.

        Args:
            num: how many.

        Raises:
            UserError: there are not so many, or it is not known which.
        """
        if not 1 <= num <= len(self.kept):
            raise UserError(
                f"{num} blocks: the student has {len(self.kept)}, so inside of it are 1 to {len(self.kept)}"
            )
        ranking = self.ranking
        if len(ranking) != len(self.blocks):
            raise UserError(no_order(self.method))
        order = sorted(range(len(self.kept)), key=lambda position: -ranking[self.kept[position]])
        first, *after = (ranking[self.kept[position]] for position in order[num - 1 : num + 1])
        if after == [first]:
            alike = ", ".join(str(i) for i in self.kept if ranking[i] == first)
            raise UserError(f"{num} blocks: of {alike} it is not known which should go before the others")
        return tuple(sorted(order[:num]))

    @property
    def confidence(self) -> float | None:
        """Confidence of the least certain choice."""
        return min(self.confidences, default=None)

    def check_fits(self, blocks: Sequence[str], owner: str) -> None:
        """Check that the decision is about exactly these blocks.

        Raises:
            UserError: it is about others.
        """
        if list(self.blocks) == list(blocks):
            return
        differ = next(((a, b) for a, b in zip(self.blocks, blocks, strict=False) if a != b), None)
        first = f"; the first that differs is '{differ[0]}' there and '{differ[1]}' here" if differ else ""
        raise UserError(
            f"decision.blocks: the decision is about {len(self.blocks)} blocks ({self.blocks[0]} to {self.blocks[-1]}),"
            f" {owner} has {len(blocks)} ({', '.join(blocks[:1])} to {', '.join(blocks[-1:])}){first}: "
            "apply it to a checkpoint of the architecture it was made for"
        )

    def save(self, path: Path | str) -> None:
        """Write it as JSON, atomically."""
        write_json(
            Path(path), {"format_version": FORMAT_VERSION, **dataclasses.asdict(self), "confidence": self.confidence}
        )

    @classmethod
    def load(cls, path: Path | str) -> Decision:
        """Read a decision that `save` wrote.

        Raises:
            UserError: the file is missing or is not a decision.
        """
        data = read_json(Path(path))
        if not isinstance(data, dict) or data.get("format_version") != FORMAT_VERSION:
            raise UserError(f"{path}: not a decision of format_version {FORMAT_VERSION}")
        return shaped(data, cls, path, "restore it, or let the search decide again")

    @classmethod
    def from_file(cls, path: Path | str, blocks: Sequence[str]) -> Decision:
        """Read a decision about these blocks from a `decision.json` or another tool's file; see `interop_formats`.

        Raises:
            UserError: the file is missing, of an unknown format, or about another network.
        """
        if Path(path).suffix == ".json" and isinstance(read_json(Path(path)), dict):
            decision = cls.load(path)
            decision.check_fits(blocks, "the network")
            return decision
        return cls(blocks=tuple(blocks), kept=tuple(read_kept(Path(path), len(blocks))), method="Keep")
