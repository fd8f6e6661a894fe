"""The classes that the core registers, by the same hooks as a plugin; a plugin cannot reuse their names.

Imports stand inside the hooks, because `tinyfusion --help` only asks for the commands.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .registry.hooks import hookimpl

if TYPE_CHECKING:
    from .evaluation.metrics import Metric
    from .protocols.command import Command
    from .protocols.data import DataSource
    from .pruning.weight_update import WeightUpdate
    from .samplers.base import BlockSampler
    from .selection.base import Selector
    from .training.distillation import OutputKD
    from .training.starts.base import Start


@hookimpl
def tinyfusion_register_metrics() -> list[type[Metric]]:
    """Metrics: model size, held-out loss, loss on other data, Fréchet distance, also with caches, latency."""
    from .evaluation.cached_sampling import CachedSampling
    from .evaluation.frechet import Frechet
    from .evaluation.latency import Latency
    from .evaluation.metrics import HeldOutLoss, Size
    from .evaluation.retention import Retention

    return [Size, HeldOutLoss, Retention, Frechet, CachedSampling, Latency]


@hookimpl
def tinyfusion_register_selectors() -> list[type[Selector]]:
    """Selectors: the search, the race, co-trained weights, successive halving, and the criteria."""
    from .selection import given
    from .selection.criteria import positions, sensitivity, similarity
    from .selection.learning.cotrained import CoTrained
    from .selection.quality import Shallowest
    from .selection.race import Race
    from .selection.search import Search
    from .selection.successive_halving import Finals

    return [
        Search,
        Race,
        CoTrained,
        Shallowest,
        Finals,
        given.Keep,
        given.Nested,
        positions.Uniform,
        positions.FirstN,
        positions.LastN,
        positions.BKSDM,
        sensitivity.Random,
        sensitivity.LeaveOneOut,
        sensitivity.Greedy,
        sensitivity.Taylor,
        similarity.BlockInfluence,
        similarity.InputOutputMSE,
        similarity.SpanSimilarity,
    ]


@hookimpl
def tinyfusion_register_data() -> list[type[DataSource]]:
    """Data sets made of others, and what a network has made."""
    from .dataloading.generated import Generated
    from .dataloading.mixture import Mixture

    return [Mixture, Generated]


@hookimpl
def tinyfusion_register_samplers() -> list[type[BlockSampler]]:
    """Samplers of block masks."""
    from .samplers.grouped import GroupedSampler
    from .samplers.subset import ExactK, GumbelTopK, ScoreFunction

    return [GroupedSampler, ExactK, ScoreFunction, GumbelTopK]


@hookimpl
def tinyfusion_register_weight_updates() -> list[type[WeightUpdate]]:
    """Which weights move in a search or a recovery."""
    from .pruning.weight_update import Frozen, Full, LastBlocks, LoRA, Matching

    return [Frozen, LoRA, LastBlocks, Matching, Full]


@hookimpl
def tinyfusion_register_distillations() -> list[type[OutputKD]]:
    """Distillation losses."""
    from .training.distillation import MaskedKD, OutputKD
    from .training.distilling.kinds import AttentionKD, AttentionMapKD, RelationalKD

    return [OutputKD, MaskedKD, RelationalKD, AttentionKD, AttentionMapKD]


@hookimpl
def tinyfusion_register_starts() -> list[type[Start]]:
    """What a recovery begins with."""
    from .training.starts.fuse import Fuse
    from .training.starts.inherit import Inherit
    from .training.starts.refit import Refit

    return [Fuse, Inherit, Refit]


@hookimpl
def tinyfusion_register_commands() -> list[type[Command]]:
    """Commands, in the order of `tinyfusion --help`."""
    from .cli import COMMANDS

    return list(COMMANDS)
