"""Depth pruning of timm's vision transformers, with a classification loss and accuracy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tinyfusion_core as tiny
from tinyfusion_core.parsing.weights import load_strict, read_weights
from tinyfusion_core.runtime.files import sha256

tinyfusion_api = 1


@dataclass(frozen=True, kw_only=True)
class TimmViT(tiny.Backbone):
    """A vision transformer of timm, `timm.create_model(model, ...)`, whose `blocks` can be pruned.

    Args:
        model: timm's name of it, as in `timm.list_models("vit_*")`.
        options: what to give `create_model` besides, as `{img_size: 28, in_chans: 1, num_classes: 10}`.
        checkpoint: a .safetensors, .pth or .pt file of weights, such as timm publishes; none to train from scratch.
        licence: licence of the checkpoint, for the model card.
    """

    model: str = "vit_tiny_patch16_224"
    options: Mapping[str, Any] | None = None
    checkpoint: str | None = None
    licence: str = "unknown"
    _random_seed: int | None = None

    def build(self) -> nn.Module:
        if self._random_seed is not None:
            with torch.random.fork_rng():
                torch.manual_seed(self._random_seed)
                model = self.construct(self.config())
                for p in model.parameters():
                    nn.init.normal_(p, std=0.2)
            return model.eval()
        if self.checkpoint is None or not Path(self.checkpoint).is_file():
            raise tiny.UserError(
                f"backbone.checkpoint: no file '{self.checkpoint}'; expected timm's weights of {self.model}"
            )
        model = self.construct(self.config())
        load_strict(model, read_weights(Path(self.checkpoint), ("state_dict", "model")), Path(self.checkpoint))
        return model.eval()

    def config(self, model: nn.Module | None = None) -> dict[str, Any]:
        options = dict(self.options or {})
        return {"model": self.model, **options, **({} if model is None else {"depth": len(model.blocks)})}

    @classmethod
    def construct(cls, config: Mapping[str, Any]) -> nn.Module:
        import timm

        name = config["model"]
        try:
            model = timm.create_model(name, **{k: v for k, v in config.items() if k != "model"})
        except (RuntimeError, TypeError) as e:
            raise tiny.UserError(f"backbone.model: timm cannot make '{name}': {e}") from None
        if not isinstance(getattr(model, "blocks", None), (nn.Sequential, nn.ModuleList)):
            raise tiny.UserError(f"backbone.model: '{name}' has no list `blocks`; expected a plain vision transformer")
        return model

    def blocks(self, model: nn.Module) -> Sequence[str]:
        return ["blocks.*"]

    def after_prune(self, model: nn.Module, kept: Mapping[str, Sequence[int]]) -> None:
        """The depth is read off the list; timm keeps no other trace of it that the forward pass needs."""

    def example(self, num_rows: int) -> dict[str, Tensor]:
        options = {"img_size": 224, "in_chans": 3, "num_classes": 1000, **(self.options or {})}
        side = options["img_size"]
        return {
            "x": torch.zeros(num_rows, options["in_chans"], side, side),
            "y": torch.arange(num_rows) % options["num_classes"],
        }

    @classmethod
    def tiny(cls) -> "TimmViT":
        options = {
            "img_size": 8,
            "patch_size": 4,
            "in_chans": 1,
            "num_classes": 10,
            "embed_dim": 16,
            "depth": 4,
            "num_heads": 2,
        }
        return cls(options=options, _random_seed=0)

    def source(self) -> dict[str, Any]:
        if self.checkpoint is None:
            return {"licence": self.licence}
        return {"checkpoint": self.checkpoint, "sha256": sha256(Path(self.checkpoint)), "licence": self.licence}


@dataclass(frozen=True, kw_only=True)
class CrossEntropy(tiny.LossAdapter):
    """Classification of images `x` by labels `y`, in nats; distillation by KL(teacher | student) times T squared.

    Args:
        label_smoothing: share of the target that all classes divide equally.
        temperature: T of both distributions in the distance.
        shift: images are moved by up to so many pixels each way, drawn for every sample.
    """

    label_smoothing: float = 0.0
    temperature: float = 2.0
    shift: int = 0

    def prepare(self, batch: tiny.Batch, rng: tiny.Rng) -> dict[str, Tensor]:
        return {"x": self._shifted(batch["x"], rng) if self.shift else batch["x"], "y": batch["y"]}

    def predict(self, model: nn.Module, inputs: tiny.Batch) -> Tensor:
        logits: Tensor = model(inputs["x"])
        return logits

    def loss(self, prediction: Tensor, inputs: tiny.Batch) -> Tensor:
        return F.cross_entropy(prediction, inputs["y"], label_smoothing=self.label_smoothing, reduction="none")

    def distance(self, student: Tensor, teacher: Tensor, inputs: tiny.Batch) -> Tensor:
        ours, theirs = ((p / self.temperature).log_softmax(-1) for p in (student, teacher))
        return self.temperature**2 * F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)

    def _shifted(self, x: Tensor, rng: tiny.Rng) -> Tensor:
        """(B, C, H, W) images, each moved by its own draw; what comes in at an edge repeats the edge."""
        moves = rng.integers("shift", 2 * self.shift + 1, len(x), 2).to(x.device)
        rows, columns = (
            (torch.arange(side, device=x.device) + move[:, None]).clamp(self.shift, side + self.shift - 1) - self.shift
            for side, move in zip(x.shape[2:], moves.T, strict=True)
        )
        samples = torch.arange(len(x), device=x.device)[:, None, None]
        return x[samples, :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


@dataclass(frozen=True)
class Accuracy(tiny.Metric):
    """The share of held-out images that a classifier labels as they are labelled.

    Args:
        batch_size: images at once.
    """

    batch_size: int = 250

    def __call__(
        self, task: tiny.Task, models: Mapping[str, nn.Module], trainer: tiny.Trainer
    ) -> list[tiny.Measurement]:
        size = len(task.held_out)
        found: dict[str, float | None] = {}
        for name, model in models.items():
            right = 0
            for first in range(0, size, self.batch_size):
                batch = task.held_out.__getitems__(list(range(first, min(first + self.batch_size, size))))
                with torch.no_grad(), trainer.accelerator.autocast():
                    logits = model(batch["x"].to(trainer.accelerator.device))
                right += int((logits.argmax(-1).cpu() == batch["y"]).sum())
            found[name] = right / size
        return [tiny.Measurement("accuracy", found, better="higher", note=f"{size} held-out images")]


@tiny.hookimpl
def tinyfusion_register_backbones() -> list[type[tiny.Backbone]]:
    return [TimmViT]


@tiny.hookimpl
def tinyfusion_register_losses() -> list[type[tiny.LossAdapter]]:
    return [CrossEntropy]


@tiny.hookimpl
def tinyfusion_register_metrics() -> list[type[tiny.Metric]]:
    return [Accuracy]
