"""How well pictures fit their prompts, by a network that embeds both: CLIP score, PickScore, win rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from tinyfusion_core.errors import MissingFileError, UserError, first_line, need, require
from tinyfusion_core.evaluation.metrics import Measurement, Metric, Models
from tinyfusion_core.parsing.records import check_folder, read_json
from tinyfusion_core.parsing.weights import read_weights
from tinyfusion_core.protocols.loss import LossAdapter
from tinyfusion_core.protocols.task import Task
from tinyfusion_core.runtime.distributed import batches
from tinyfusion_core.runtime.progress import quietly
from tinyfusion_core.training.trainer import Trainer
from tinyfusion_images.fidelity import kept_parts, resumed_aside
from tinyfusion_images.image_sets import rgb
from tinyfusion_images.pictures import artist, asked_for, published_by

KEY = "evaluate: PromptScore"


@dataclass(frozen=True)
class PromptScore(Metric):
    """How well pictures fit their prompts, by a CLIP model, and how often a student's fit better than the teacher's.

    The score of a picture is s · max(cos, 0), with the cosine of the embeddings of picture and prompt, and the factor s
    that the model has learned: 100 for the published ones. With a CLIP of OpenAI's that is the CLIP score (Hessel et
    al., arXiv:2104.08718); with the weights of PickScore v1 it is PickScore (Kirstain et al., arXiv:2305.01569). The
    rows carry the name of the model's folder.

    The win rate is the share of prompts for which a student's picture has the larger cosine, where teacher and student
    begin with the same noise; ties count half.

    Args:
        model: folder of a CLIP model of transformers, with its tokenizer and image processor; weights as safetensors.
        num_prompts: of the prompts of `loss.pipeline`, the first ones; one picture each.
        batch_size: pictures per batch.
        pruned: also evaluate networks right after pruning.
    """

    model: str
    num_prompts: int = 256
    batch_size: int = 4
    pruned: bool = False
    together = True

    def __post_init__(self) -> None:
        require(self.num_prompts >= 2, f"{KEY}.num_prompts", self.num_prompts, "at least 2")
        require(self.batch_size >= 1, f"{KEY}.batch_size", self.batch_size, "at least 1")

    @property
    @override
    def column(self) -> str:
        return f"prompt score ({Path(self.model).name})"

    @override
    def check_task(self, task: Task) -> None:
        self._texts(task.loss)
        need("transformers", "tinyfusion[images]", KEY)
        folder = Path(self.model)
        config = folder / "config.json"
        found = read_json(config) if config.is_file() else None
        if not isinstance(found, dict) or found.get("model_type") != "clip":
            raise MissingFileError(
                f"{KEY}.model: '{self.model}' holds no CLIP model; expected a folder of transformers' CLIPModel, as "
                f"`hf download openai/clip-vit-large-patch14 --local-dir {self.model}` makes"
            )
        for pattern in ("*.safetensors", "tokenizer*", "*processor_config.json"):
            if not any(folder.glob(pattern)):
                raise MissingFileError(
                    f"{KEY}.model: '{self.model}' lacks {pattern}; copy the whole folder of the model"
                )
        check_folder(folder)

    @override
    def __call__(self, task: Task, models: Models, trainer: Trainer) -> list[Measurement]:
        return resumed_aside(self, task, models, trainer)

    @override
    def resume(self, task: Task, models: Models, trainer: Trainer, folder: Path) -> list[Measurement]:
        texts, draw = self._texts(task.loss)[: self.num_prompts], artist(task, trainer)
        judge = _Judge(self.model, trainer.accelerator.device)

        def measure(number: int, name: str, model: nn.Module) -> Tensor | None:
            """The cosines, (prompts,); None when the network was not to be sampled, or has diverged."""
            if name.endswith("pruned") and not self.pruned:
                return None

            def work(rows: range) -> dict[str, Tensor]:
                images, finite = draw(model, rows, asked_for(task, model, rows))
                return {"cosine": judge(rgb(images), texts[rows.start : rows.stop]), "finite": finite}

            parts = batches(len(texts), self.batch_size)
            files = kept_parts(folder / str(number), parts, work, f"pictures of {name}", trainer.progress)
            found = [read_weights(path) for path in files]
            return (
                torch.cat([part["cosine"] for part in found]) if all(part["finite"].all() for part in found) else None
            )

        return self._rows({name: measure(i, name, net) for i, (name, net) in enumerate(models.items())}, judge.scale)

    def _rows(self, cosines: Mapping[str, Tensor | None], scale: float) -> list[Measurement]:
        """The rows of the table, from the cosines of each network, (prompts,)."""
        (reference, first), *others = cosines.items()
        judge = Path(self.model).name
        scores = {n: None if c is None else scale * float(c.clamp(min=0).mean()) for n, c in cosines.items()}
        wins = {name: _wins(found, first) for name, found in others if found is not None and first is not None}
        shares = {name: float(wins[name].mean()) if name in wins else None for name in cosines}
        errors = ", ".join(f"{name} {float(won.std() / len(won) ** 0.5):.2g}" for name, won in wins.items())
        count = max((len(found) for found in cosines.values() if found is not None), default=0)
        note = f"one picture for each of {count} prompts, judged by {judge}"
        if idle := [name for name, found in cosines.items() if found is None]:
            note += f"; not sampled, or not finite: {', '.join(idle)}"
        won = f"share of prompts whose picture fits better, ties half; standard error: {errors or 'none'}"
        return [
            Measurement(self.column, scores, better="higher", note=note),
            Measurement(f"win rate over the {reference} ({judge})", shares, better="higher", note=won),
        ]

    def _texts(self, loss: LossAdapter) -> Sequence[str]:
        """The prompts. Raises UserError if there are none."""
        pipeline = published_by(loss)
        if pipeline is None or not pipeline.texts:
            raise UserError(f"{KEY} needs pictures of prompts; name a pipeline and its prompts in loss.pipeline")
        if len(pipeline.texts) < 2:
            raise UserError(f"{KEY} needs at least 2 prompts, and loss.pipeline.prompts has one")
        return pipeline.texts


def _wins(found: Tensor, reference: Tensor) -> Tensor:
    """Which cosines, (prompts,), are larger than others, (prompts,): 1, and a half for ties."""
    return (found > reference).double() + (found == reference).double() / 2


class _Judge:
    """A CLIP model with what prepares its inputs.

    Raises:
        UserError: the files are damaged, or are another model's.
    """

    def __init__(self, where: str, device: torch.device) -> None:
        import transformers
        from transformers.utils import logging

        self.device = device
        try:
            with quietly(logging), torch.random.fork_rng():
                # Safetensors alone: other files may hold code.
                model: Any = transformers.CLIPModel.from_pretrained(where, use_safetensors=True, local_files_only=True)
                self.processor: Any = transformers.CLIPProcessor.from_pretrained(where, local_files_only=True)
        except Exception as e:  # damaged files make the readers fail in any way they can
            raise UserError(f"{KEY}.model: '{where}' cannot be read ({first_line(e)})") from None
        self.model = model.float().to(device).eval().requires_grad_(False)
        self.length = self.model.config.text_config.max_position_embeddings

    @property
    def scale(self) -> float:
        """The factor on cosines that the model has learned."""
        found: float = self.model.logit_scale.exp().item()
        return found

    def __call__(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """Return the cosines of pictures (n, 3, height, width) uint8 and their texts, (n,) on the CPU."""
        how = {"padding": True, "truncation": True, "max_length": self.length, "return_tensors": "pt"}
        told = self.processor(text=list(texts), images=list(images), **how).to(self.device)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            found = self.model(**told)
        cosines: Tensor = nn.functional.cosine_similarity(found.image_embeds, found.text_embeds).cpu()
        return cosines
