"""Pictures by the published pipeline, with the network that is judged in the place of its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tinyfusion_core.errors import MissingFileError, UserError, first_line, nearest
from tinyfusion_core.parsing.settings import Settings
from tinyfusion_core.protocols.backbone import Backbone
from tinyfusion_core.runtime.progress import quietly
from tinyfusion_diffusers.pipelines.index import Index, loggers, read_index
from tinyfusion_diffusers.prompts.sources import read_prompts

KEY = "loss.pipeline"
NETWORK = "transformer"
"""The part of a pipeline in whose place teacher and students are put."""
OWN = ("self", "prompt", "class_labels", "generator", "latents", "num_images_per_prompt", "output_type", "return_dict")
"""Arguments of a pipeline's call that are no options."""
BESIDE = ("condition", "control", "image")
"""Columns without which a network makes no picture, and which a prompt does not bring."""


@dataclass(frozen=True, kw_only=True)
class PublishedPipeline(Settings):
    """The pipeline of a checkpoint, which makes pictures of prompts, or of class labels.

    Everything but the transformer is the folder's: text encoders, scheduler, guidance, autoencoder. Picture i follows
    from the seed and i alone. Of a video the frame in the middle is the picture.

    Args:
        folder: the pipeline's folder, with all of its parts; weights as safetensors.
        prompts: a text file with a prompt on each line, a .jsonl file whose lines have a `caption`, or the prompts
            themselves. Null where the pipeline takes class labels.
        options: arguments of the pipeline's call: num_inference_steps, guidance_scale, height, width and so on; by
            default the pipeline's own values.
    """

    folder: str
    prompts: str | list[str] | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def texts(self) -> list[str]:
        """The prompts in their order, without empty ones; none where the pipeline takes class labels.

        Raises:
            UserError: the file is missing, or there are none.
        """
        if self.prompts is None:
            return []
        given = self.prompts if isinstance(self.prompts, list) else read_prompts(Path(self.prompts), "caption")
        if not (found := [text for text in given if text.strip()]):
            raise UserError(f"{KEY}.prompts: holds no prompts; expected at least one")
        return found

    def check(self, backbone: Backbone) -> None:
        """Check that the folder holds a pipeline for a backbone's network, and that its call takes the options.

        Raises:
            UserError: it does not.
        """
        if not Path(self.folder).is_dir():
            raise MissingFileError(
                f"{KEY}.folder: '{self.folder}' is no folder; put the pipeline there, as `hf download ID --local-dir "
                f"{self.folder}` does"
            )
        index = read_index(self.folder, KEY)
        wanted = backbone.config().get("_class_name")
        if index.network != wanted:
            raise UserError(
                f"{KEY}.folder: the transformer of '{self.folder}' is a {index.network}, the backbone's a {wanted}; "
                "give the folder that the backbone comes from"
            )
        part = getattr(backbone, "subfolder", NETWORK)
        if part != NETWORK and part in index.parts:  # the second of two experts
            raise UserError(
                f"{KEY}: networks are put in the place of '{NETWORK}', and the backbone is the pipeline's '{part}'; "
                "leave it out"
            )
        if lacking := [name for name in BESIDE if name in backbone.example(1)]:
            raise UserError(f"{KEY}: {wanted} as configured takes '{lacking[0]}', which no prompt brings; leave it out")
        self._check_call(index)
        self._check_parts(index)

    def _check_call(self, index: Index) -> None:
        takes = inspect.signature(index.cls.__call__).parameters
        name = index.cls.__name__
        if "prompt" not in takes and "class_labels" not in takes:
            raise UserError(f"{KEY}: {name} takes neither prompts nor class labels; leave it out")
        if ("prompt" in takes) != bool(self.texts):
            raise UserError(
                f"{KEY}.prompts: {name} takes "
                + ("prompts; name a file of them, one on each line" if "prompt" in takes else "class labels; set null")
            )
        for option in self.options:
            if option in OWN or option not in takes:
                known = [one for one in takes if one not in OWN]
                raise UserError(f"{KEY}.options.{option}: {name} has no such option{nearest(option, known)}")
        for argument, p in list(takes.items())[1:]:
            plain = p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
            if plain and p.default is p.empty and argument not in (*OWN, *self.options):
                raise UserError(f"{KEY}: {name} wants '{argument}' besides prompts; leave it out")

    def _check_parts(self, index: Index) -> None:
        index.check_known("")
        decoder = inspect.signature(index.cls.__init__).parameters.get("vae")
        if decoder is not None and decoder.default is decoder.empty and index.parts.get("vae", (None,))[0] is None:
            raise MissingFileError(f"{KEY}.folder: '{self.folder}' has no autoencoder, its model_index.json says")
        for name, (library, _) in index.parts.items():
            inside = Path(self.folder) / name
            if library is None or name == NETWORK:
                continue
            if not inside.is_dir():
                raise MissingFileError(f"{KEY}.folder: '{inside}' is missing, and {index.cls.__name__} needs it")
            if (inside / "config.json").is_file() and not any(inside.glob("*.safetensors")):
                raise MissingFileError(f"{KEY}.folder: '{inside}' holds no weights as safetensors")

    def opened(self) -> Callable[[nn.Module, Sequence[int], Sequence[torch.Generator]], Tensor]:
        """Return what makes pictures; it reads the pipeline when it is first called.

        It takes a network, for every picture the number of its prompt or its class label, and a generator. It returns
        (batch, 3, height, width) values in [0, 1].

        Raises:
            UserError: when called: a part cannot be read, or the pipeline refuses its options.
        """
        read: dict[torch.dtype, Any] = {}

        def draw(model: nn.Module, numbers: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
            weight = next(model.parameters())
            if weight.dtype not in read:
                read.clear()
                read[weight.dtype] = self._read(model, weight.dtype)
            pipeline = read[weight.dtype]
            pipeline.register_modules(transformer=model)
            pipeline.to(weight.device)
            told: Mapping[str, Any] = (
                {"prompt": [self.texts[i] for i in numbers]} if self.texts else {"class_labels": list(numbers)}
            )
            how = {**self.options, "generator": list(generators), "output_type": "np", "return_dict": False}
            try:
                with quietly(*loggers()):
                    found = np.asarray(pipeline(**told, **how)[0])
            except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError) as e:
                raise UserError(
                    f"{KEY}: {type(pipeline).__name__} makes no picture with these options ({first_line(e)})"
                ) from e
            if found.ndim == 5:
                found = found[:, found.shape[1] // 2]
            return torch.from_numpy(found).float().movedim(-1, 1)

        return draw

    def _read(self, model: nn.Module, dtype: torch.dtype) -> Any:
        """The pipeline with a network in it, its other parts in a dtype."""
        cls = read_index(self.folder, KEY).cls
        how = {"dtype": dtype, "use_safetensors": True, "local_files_only": True}
        try:
            with quietly(*loggers()), torch.random.fork_rng():
                pipeline = cls.from_pretrained(self.folder, transformer=model, **how)
        except Exception as e:  # damaged files make the readers fail in any way they can
            raise UserError(f"{KEY}.folder: '{self.folder}' cannot be read ({first_line(e)})") from None
        pipeline.set_progress_bar_config(disable=True)
        return pipeline
