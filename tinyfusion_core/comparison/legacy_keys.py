"""Keys of cached results as they were when they contained module paths.

They find the results of version 0.1.0 and earlier. This module, and the uses of `then` in `cache.py`, can be removed
with the first release that may recompute such comparisons.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self


class Name(str):
    """The name of a class or function in a key, independent of its module: `package:qualname`.

    Attributes:
        path: where it is defined, `package.module.qualname`, as in old keys.
    """

    __slots__ = ("path",)
    path: str

    @classmethod
    def of(cls, value: type[Any] | Callable[..., Any]) -> Self:
        """Return the name of a class or function."""
        name = cls(f"{value.__module__.partition('.')[0]}:{value.__qualname__}")
        name.path = f"{value.__module__}.{value.__qualname__}"
        return name


PATHS = {
    "tinyfusion_core:BKSDM": "tinyfusion_core.criteria.BKSDM",
    "tinyfusion_core:BlockInfluence": "tinyfusion_core.similarity.BlockInfluence",
    "tinyfusion_core:ExactK": "tinyfusion_core.subset_samplers.ExactK",
    "tinyfusion_core:Finals": "tinyfusion_core.finals.Finals",
    "tinyfusion_core:FirstN": "tinyfusion_core.criteria.FirstN",
    "tinyfusion_core:Frechet": "tinyfusion_core.frechet.Frechet",
    "tinyfusion_core:Frozen": "tinyfusion_core.recoverability.Frozen",
    "tinyfusion_core:Full": "tinyfusion_core.recoverability.Full",
    "tinyfusion_core:Greedy": "tinyfusion_core.sensitivity.Greedy",
    "tinyfusion_core:GroupedSampler": "tinyfusion_core.sampling.GroupedSampler",
    "tinyfusion_core:GumbelTopK": "tinyfusion_core.subset_samplers.GumbelTopK",
    "tinyfusion_core:HeldOutLoss": "tinyfusion_core.evaluation.HeldOutLoss",
    "tinyfusion_core:InputOutputMSE": "tinyfusion_core.similarity.InputOutputMSE",
    "tinyfusion_core:Keep": "tinyfusion_core.criteria.Keep",
    "tinyfusion_core:LastN": "tinyfusion_core.criteria.LastN",
    "tinyfusion_core:Latency": "tinyfusion_core.latency.Latency",
    "tinyfusion_core:LeaveOneOut": "tinyfusion_core.sensitivity.LeaveOneOut",
    "tinyfusion_core:LoRA": "tinyfusion_core.recoverability.LoRA",
    "tinyfusion_core:MaskedKD": "tinyfusion_core.distill.MaskedKD",
    "tinyfusion_core:Nested": "tinyfusion_core.criteria.Nested",
    "tinyfusion_core:OutputKD": "tinyfusion_core.distill.OutputKD",
    "tinyfusion_core:Random": "tinyfusion_core.sensitivity.Random",
    "tinyfusion_core:Recover": "tinyfusion_core.recover.Recover",
    "tinyfusion_core:Rules": "tinyfusion_core.rules.Rules",
    "tinyfusion_core:ScoreFunction": "tinyfusion_core.subset_samplers.ScoreFunction",
    "tinyfusion_core:Search": "tinyfusion_core.search.Search",
    "tinyfusion_core:Size": "tinyfusion_core.evaluation.Size",
    "tinyfusion_core:SpanSimilarity": "tinyfusion_core.similarity.SpanSimilarity",
    "tinyfusion_core:Taylor": "tinyfusion_core.sensitivity.Taylor",
    "tinyfusion_core:Trainer": "tinyfusion_core.trainer.Trainer",
    "tinyfusion_core:Uniform": "tinyfusion_core.criteria.Uniform",
    "tinyfusion_diffusers:DiffusersTransformer": "tinyfusion_diffusers.backbone.DiffusersTransformer",
    "tinyfusion_diffusers:RectifiedFlow": "tinyfusion_diffusers.objectives.RectifiedFlow",
    "tinyfusion_diffusers:ScheduledDiffusion": "tinyfusion_diffusers.objectives.ScheduledDiffusion",
    "tinyfusion_dit:DiT": "tinyfusion_dit.backbone.DiT",
    "tinyfusion_dit:GaussianDiffusion": "tinyfusion_dit.diffusion.GaussianDiffusion",
    "tinyfusion_images:Fidelity": "tinyfusion_core.fidelity.Fidelity",
    "tinyfusion_images:SmallCNN": "tinyfusion_images.features.SmallCNN",
    "tinyfusion_llm:CausalLM": "tinyfusion_llm.backbone.CausalLM",
    "tinyfusion_llm:NextToken": "tinyfusion_llm.loss.NextToken",
    "tinyfusion_mar:MAR": "tinyfusion_mar.backbone.MAR",
    "tinyfusion_mar:MaskedTokenDiffusion": "tinyfusion_mar.masked.MaskedTokenDiffusion",
    "tinyfusion_sit:FlowMatching": "tinyfusion_sit.flow.FlowMatching",
    "tinyfusion_sit:SiT": "tinyfusion_sit.backbone.SiT",
}
"""Current name -> old path, of every class that occurs in a key. A class that is renamed keeps its path here."""

FIELDS: dict[str, dict[str, str]] = {}
"""Current name of a class -> its renamed fields: current -> old."""


def then(key: Any) -> Any:
    """Return a key, or a part of one, in its old spelling. What is not in the tables has not moved since."""
    if isinstance(key, Name):
        return PATHS.get(key, key.path)
    if isinstance(key, Mapping):
        of = key.get("class")
        fields = FIELDS.get(of, {}) if isinstance(of, Name) else {}
        return {fields.get(name, name): then(value) for name, value in key.items()}
    return [then(value) for value in key] if isinstance(key, (list, tuple)) else key
