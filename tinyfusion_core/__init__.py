"""Make transformers shallower: learn which blocks can go, remove them, recover.

`import tinyfusion_core as tiny`. Names are imported when they are first used, so that the command line
answers at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backbone import Backbone as Backbone
    from .backbone import Batch as Batch
    from .backbone import Stream as Stream
    from .budgets import budgets_of as budgets_of
    from .calibration import Calibrated as Calibrated
    from .calibration import Calibration as Calibration
    from .checkpoints import CheckpointBackbone as CheckpointBackbone
    from .comparison import Audit as Audit
    from .comparison import Compare as Compare
    from .comparison_report import write_comparison as write_comparison
    from .criteria import BKSDM as BKSDM
    from .criteria import Criterion as Criterion
    from .criteria import FirstN as FirstN
    from .criteria import Keep as Keep
    from .criteria import LastN as LastN
    from .criteria import Nested as Nested
    from .criteria import Uniform as Uniform
    from .data import DataSource as DataSource
    from .data import Tensors as Tensors
    from .decision import Decision as Decision
    from .distill import MaskedKD as MaskedKD
    from .distill import OutputKD as OutputKD
    from .distill import derive_taps as derive_taps
    from .embedding import wrap as wrap
    from .errors import UserError as UserError
    from .evaluation import Frechet as Frechet
    from .evaluation import HeldOutLoss as HeldOutLoss
    from .evaluation import Latency as Latency
    from .evaluation import Measurement as Measurement
    from .evaluation import Metric as Metric
    from .evaluation import check_teacher as check_teacher
    from .evaluation import evaluate as evaluate
    from .export import export_run as export_run
    from .finals import Finals as Finals
    from .findings import Findings as Findings
    from .gating import Gates as Gates
    from .hookspecs import API_VERSION as API_VERSION
    from .hookspecs import hookimpl as hookimpl
    from .losses import LossAdapter as LossAdapter
    from .plugins import load_plugin as load_plugin
    from .pruning import load_pretrained as load_pretrained
    from .pruning import prune as prune
    from .pruning import push_to_hub as push_to_hub
    from .pruning import save_pretrained as save_pretrained
    from .randomness import Rng as Rng
    from .recipe import load_recipe as load_recipe
    from .recover import Recover as Recover
    from .recoverability import Frozen as Frozen
    from .recoverability import Full as Full
    from .recoverability import LoRA as LoRA
    from .recoverability import WeightUpdate as WeightUpdate
    from .rules import Rules as Rules
    from .run import run_recipe as run_recipe
    from .run_folder import RunFolder as RunFolder
    from .sampling import BlockSampler as BlockSampler
    from .sampling import Draw as Draw
    from .sampling import GroupedSampler as GroupedSampler
    from .search import Search as Search
    from .search import Selector as Selector
    from .sensitivity import Greedy as Greedy
    from .sensitivity import LeaveOneOut as LeaveOneOut
    from .sensitivity import Random as Random
    from .sensitivity import Taylor as Taylor
    from .similarity import BlockInfluence as BlockInfluence
    from .similarity import InputOutputMSE as InputOutputMSE
    from .similarity import SpanSimilarity as SpanSimilarity
    from .subset_samplers import ExactK as ExactK
    from .subset_samplers import GumbelTopK as GumbelTopK
    from .subset_samplers import ScoreFunction as ScoreFunction
    from .task import Task as Task
    from .trainer import Trainer as Trainer

_HOMES = {
    "backbone": ("Backbone", "Batch", "Stream"),
    "budgets": ("budgets_of",),
    "calibration": ("Calibrated", "Calibration"),
    "checkpoints": ("CheckpointBackbone",),
    "comparison": ("Audit", "Compare"),
    "comparison_report": ("write_comparison",),
    "criteria": ("BKSDM", "Criterion", "FirstN", "Keep", "LastN", "Nested", "Uniform"),
    "data": ("DataSource", "Tensors"),
    "decision": ("Decision",),
    "distill": ("MaskedKD", "OutputKD", "derive_taps"),
    "embedding": ("wrap",),
    "errors": ("UserError",),
    "evaluation": ("Frechet", "HeldOutLoss", "Latency", "Measurement", "Metric", "check_teacher", "evaluate"),
    "export": ("export_run",),
    "finals": ("Finals",),
    "findings": ("Findings",),
    "gating": ("Gates",),
    "hookspecs": ("API_VERSION", "hookimpl"),
    "losses": ("LossAdapter",),
    "plugins": ("load_plugin",),
    "pruning": ("load_pretrained", "prune", "push_to_hub", "save_pretrained"),
    "randomness": ("Rng",),
    "recipe": ("load_recipe",),
    "recover": ("Recover",),
    "recoverability": ("Frozen", "Full", "LoRA", "WeightUpdate"),
    "run": ("run_recipe",),
    "run_folder": ("RunFolder",),
    "rules": ("Rules",),
    "sampling": ("BlockSampler", "Draw", "GroupedSampler"),
    "search": ("Search", "Selector"),
    "sensitivity": ("Greedy", "LeaveOneOut", "Random", "Taylor"),
    "similarity": ("BlockInfluence", "InputOutputMSE", "SpanSimilarity"),
    "subset_samplers": ("ExactK", "GumbelTopK", "ScoreFunction"),
    "task": ("Task",),
    "trainer": ("Trainer",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME_OF)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
