"""Everything that processes share when they evaluate, as plain numbers: run here, and by several processes.

`main(folder, run_dir)`, in two processes, writes folder/found.json.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch_fidelity import FeatureExtractorBase, register_feature_extractor

import tinyfusion_core as tiny
from small_run import digits_task
from tinyfusion_core.runtime.distributed import map_sharded, on_main_process, rank_and_world_size
from tinyfusion_core.runtime.seeding import generator
from tinyfusion_core.selection.criteria.calibration import Calibration
from tinyfusion_core.selection.criteria.similarity import LinearCKA, cosine, squared_error
from tinyfusion_images.fidelity import Fidelity
from tinyfusion_images.pictures import artist, gallery
from tinyfusion_images.samples import write_samples
from tinyfusion_mar import MAR, MaskedTokenDiffusion
from toys import Match, Planted, planted_data

TRAINER = tiny.Trainer(batch_size=8, precision="fp32", seed=3)


class ToyFeatures(FeatureExtractorBase):
    """A random network on the mean colours of 4x4 regions; it needs no weights, and takes them if there are any."""

    def __init__(
        self, name: str, features_list: list[str], feature_extractor_weights_path: str | None = None, **_: Any
    ):
        super().__init__(name, features_list)
        self.head = nn.Linear(48, 16)
        weight = torch.randn(16, 48, generator=generator("toy features"))
        self.head.load_state_dict({"weight": weight, "bias": torch.zeros(16)})
        self.Mixed_6d = nn.ModuleDict({"branch1x1": nn.Conv2d(3, 8, 1)})  # where Inception has its spatial features
        for p, size in zip(self.Mixed_6d.parameters(), ((8, 3, 1, 1), (8,)), strict=True):
            p.data = torch.randn(size, generator=generator("toy spatial features"))
        if feature_extractor_weights_path:
            self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=True))

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("16", "logits")

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "16"

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        assert images.dtype == torch.uint8
        assert images.shape[1] == 3
        x = nn.functional.adaptive_avg_pool2d(images.float() / 255, 4)
        self.Mixed_6d["branch1x1"](x)
        x = x.flatten(1)
        found = {"16": torch.tanh(self.head(x)), "logits": 3 * self.head(x)}
        return tuple(found[name] for name in self.features_list)


register_feature_extractor("toy", ToyFeatures)


@dataclass(frozen=True)
class Off(Match):
    """The network is not what the data want, so that its loss depends on every block that does something."""

    def loss(self, prediction, inputs):
        return super().loss(prediction + 1, inputs)


@dataclass(frozen=True)
class OnlyHere(tiny.Metric):
    """Measured by the main process alone, as a plugin's metric is that knows nothing of processes."""

    fail: bool = False

    def __call__(self, task, models, trainer):
        if self.fail:
            raise tiny.UserError(f"it failed on process {rank_and_world_size()[0]}")
        return [tiny.Measurement("where", dict.fromkeys(models, float(rank_and_world_size()[0])))]


def figures() -> dict[str, Any]:
    """Numbers that must not depend on how many processes there are."""
    found: dict[str, Any] = {}
    task = digits_task()
    models = {"teacher": task.teacher, "pruned": tiny.prune(task, tiny.Keep([0, 1, 6, 7])(task, TRAINER))}
    metrics = [
        tiny.HeldOutLoss(draws=2, batch_size=64),  # 10 parts
        tiny.HeldOutLoss(draws=1, batch_size=1000),  # one: less than there are processes
        tiny.Frechet(num_samples=29, batch_size=8),
        tiny.CachedSampling(thresholds=[0.5], num_samples=29, batch_size=8, calibration=3, rounds=1),
        Fidelity(num_samples=21, batch_size=6, num_reference=30, features="toy", pruned=True),
        Fidelity(num_samples=12, batch_size=100, num_reference=11, features="toy"),
        OnlyHere(),
    ]
    for i, m in enumerate(tiny.evaluate(task, models, metrics, TRAINER)):
        if "speed-up" not in m.name:  # times are never the same
            found[f"{i} {m.name}"] = m.values
    drawn, _ = gallery(task, models["teacher"], TRAINER, artist(task, TRAINER), 7, 2, "samples")
    found["pictures"] = drawn.flatten()[::31].tolist()
    tiny.check_teacher(task, TRAINER)
    fresh = task.backbone.construct(task.backbone.config())
    try:
        tiny.check_teacher(replace(task, model=fresh), TRAINER)
    except tiny.UserError as e:
        found["untrained"] = str(e)
    # What is drawn once for a batch, the mask rate of MAR, does not depend on the processes either.
    mar = MAR.tiny()
    columns = {"x": torch.randn(20, 3, 4, 4, generator=generator("mar")), "y": torch.arange(20) % 10}
    samples = tiny.Tensors(columns)
    small = tiny.Task(backbone=mar, loss=MaskedTokenDiffusion(), train=samples, held_out=samples)
    (held_out,) = tiny.HeldOutLoss(draws=2, batch_size=6)(small, {"teacher": small.teacher}, TRAINER)
    found["mar"] = held_out.values
    return {**found, **criteria()}


def criteria() -> dict[str, Any]:
    found: dict[str, Any] = {}
    data = planted_data()
    task = tiny.Task(backbone=Planted(), loss=Off(), train=data, held_out=data)
    spans = [(0, 0), (1, 3), (4, 4)]
    masks = torch.tensor([[1.0] * 8, [1, 1, 1, 0, 1, 1, 1, 1], [0, 1, 0, 1, 1, 0, 0, 1]])
    for samples, batch_size in ((40, 16), (8, 64)):  # three batches for two processes, and one
        calibration = Calibration(task, TRAINER, samples, batch_size)
        found[f"losses of {samples}"] = calibration.losses(masks)
        found[f"gradients of {samples}"] = calibration.gradients()
        for measure in (cosine, squared_error, LinearCKA):
            found[f"{measure.__name__} of {samples}"] = calibration.compare(spans, measure)
        found[f"evaluations with {samples}"] = calibration.evaluations
    for criterion in (
        tiny.Greedy(keep=4, samples=20, batch_size=8),
        tiny.Taylor(keep=4, samples=20, batch_size=8),
        tiny.LeaveOneOut(keep=4, samples=20, batch_size=8),
        tiny.Random(keep=4, draws=3, samples=20, batch_size=8),
        tiny.BlockInfluence(keep=4, samples=20, batch_size=8),
        tiny.SpanSimilarity(keep=5, measure="cka", samples=20, batch_size=8),
    ):
        decision = criterion(task, TRAINER)
        found[f"{decision.method} keeps"] = list(decision.kept)
        found[f"{decision.method} looked"] = decision.provenance["evaluations"]
    return found


def main(folder: Path, run_dir: Path) -> None:
    assert TRAINER.accelerator.num_processes == 2
    assert rank_and_world_size() == (TRAINER.accelerator.process_index, 2)
    found = figures()
    # All processes hold the same, the one that measured nothing too.
    assert map_sharded(range(2), lambda i: json.dumps(found, sort_keys=True)) == [json.dumps(found, sort_keys=True)] * 2
    task = digits_task()
    try:
        tiny.evaluate(task, {"teacher": task.teacher}, [OnlyHere(fail=True)], TRAINER)
    except tiny.UserError as e:
        message = str(e)
        found["failure"] = map_sharded(range(2), lambda i: message)
    latency = tiny.evaluate(task, {"teacher": task.teacher}, [tiny.Latency(rounds=1, warmup=0)], TRAINER)[-1]
    found["latency"] = latency.note
    write_samples(tiny.RunFolder(run_dir), 11, 5, folder / "pictures", batch_size=3)
    write_samples(tiny.RunFolder(run_dir), 11, 5, folder / "set.npz", batch_size=3)
    on_main_process(lambda: (folder / "found.json").write_text(json.dumps(found)))
