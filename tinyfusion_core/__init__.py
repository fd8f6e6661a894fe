"""Make transformers shallower: learn which blocks can go, remove them, recover.

`import tinyfusion_core as tiny`. Names are imported when they are first used, so that the command line
answers at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backbone import Backbone as Backbone
    from .backbone import Stream as Stream
    from .criteria import Keep as Keep
    from .data import DataSource as DataSource
    from .data import Tensors as Tensors
    from .decision import Decision as Decision
    from .errors import UserError as UserError
    from .evaluation import Frechet as Frechet
    from .evaluation import HeldOutLoss as HeldOutLoss
    from .evaluation import Latency as Latency
    from .evaluation import Measurement as Measurement
    from .evaluation import Metric as Metric
    from .evaluation import evaluate as evaluate
    from .gating import Gates as Gates
    from .losses import LossAdapter as LossAdapter
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
    from .run import run_recipe as run_recipe
    from .run_folder import RunFolder as RunFolder
    from .sampling import BlockSampler as BlockSampler
    from .sampling import Draw as Draw
    from .sampling import GroupedSampler as GroupedSampler
    from .search import Search as Search
    from .search import Selector as Selector
    from .task import Task as Task
    from .trainer import Trainer as Trainer

_HOMES = {
    "backbone": ("Backbone", "Stream"),
    "criteria": ("Keep",),
    "data": ("DataSource", "Tensors"),
    "decision": ("Decision",),
    "errors": ("UserError",),
    "evaluation": ("Frechet", "HeldOutLoss", "Latency", "Measurement", "Metric", "evaluate"),
    "gating": ("Gates",),
    "losses": ("LossAdapter",),
    "pruning": ("load_pretrained", "prune", "push_to_hub", "save_pretrained"),
    "randomness": ("Rng",),
    "recipe": ("load_recipe",),
    "recover": ("Recover",),
    "recoverability": ("Frozen", "Full", "LoRA", "WeightUpdate"),
    "run": ("run_recipe",),
    "run_folder": ("RunFolder",),
    "sampling": ("BlockSampler", "Draw", "GroupedSampler"),
    "search": ("Search", "Selector"),
    "task": ("Task",),
    "trainer": ("Trainer",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME_OF)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
