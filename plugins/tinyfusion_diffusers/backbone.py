"""Transformers of the diffusers library as backbones, from the hub or a folder; students are diffusers folders."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from typing_extensions import override

from tinyfusion_core.errors import MissingFileError, UserError, first_line, require
from tinyfusion_core.parsing.records import check_folder, check_regular
from tinyfusion_core.protocols.backbone import Backbone
from tinyfusion_core.protocols.blocks.streams import Stream
from tinyfusion_core.protocols.checkpoint_backbone import randomise
from tinyfusion_core.protocols.data import Lookup
from tinyfusion_core.runtime.files import NEUTRAL, digest, save_tensors, sha256, write_json
from tinyfusion_core.runtime.seeding import generator
from tinyfusion_diffusers.files.checkpoints import (
    FILES,
    GGUF,
    WEIGHTS,
    check_agreement,
    check_kind,
    dtype_of,
    network,
    patterns,
    read_file,
    read_folder,
    saved_dtype,
    shipped,
    weights_in,
)
from tinyfusion_diffusers.files.original import renamed
from tinyfusion_diffusers.files.quantised import encoding_of
from tinyfusion_diffusers.library import diffusers
from tinyfusion_diffusers.shapes import example
from tinyfusion_diffusers.structure import (
    check_copies,
    completed,
    construct,
    lists_of,
    network_class,
    prepared,
    settings,
    shorten,
    streams_by_list,
)

SINGLE_FILE = "single-file"
"""The form of an export that has the names of the publisher."""


@dataclass(frozen=True, kw_only=True)
class DiffusersTransformer(Backbone):
    """The transformer of a diffusers pipeline; `docs/diffusers.md` lists the families that are tested.

    A student is a folder that the transformer's class reads, and that can replace `transformer/` in the folder of the
    pipeline.

    Args:
        model: a pipeline's folder or the transformer's own, or the id of a pipeline on the Hugging Face hub; or a
            single file of weights, in the names of diffusers or of their publisher; one in GGUF is dequantised.
        config_from: for a single file: the folder or id on the hub whose config says how large the network is.
        subfolder: where the transformer is in it; empty on the hub if it stands alone.
        revision: branch, tag or commit on the hub.
        variant: which of several copies of the weights, such as `fp16`.
        dtype: dtype of the weights; `auto` is that of most of them in the file, float32 for GGUF. Full-precision
            training needs float32.
        latent: height and width of the latents, for a video frames, height and width; default that of the network's
            config.
        text_length: tokens of a prompt, as in the data; default that of the network's config, else 77.
        text_length_2: tokens of what a second text encoder gives; default as many.
        lists: paths of the lists whose blocks may go, and the arguments that these blocks return, in this order. By
            default both are found: the lists that the config can say shorter, and what the blocks' source returns.
        gradient_checkpointing: recompute blocks in the backward pass instead of storing their activations.
        licence: licence of the checkpoint, for the model card.
    """

    library: ClassVar[str] = "diffusers"
    loading: ClassVar[str] = (
        "from diffusers import AutoModel\n\n"
        'transformer = AutoModel.from_pretrained("path/to/this/folder")  # pipeline(..., transformer=transformer)'
    )

    model: str | None = None
    config_from: str | None = field(default=None, metadata={NEUTRAL: None})
    subfolder: str = "transformer"
    revision: str | None = None
    variant: str | None = field(default=None, metadata={NEUTRAL: None})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    latent: list[int] | None = None
    text_length: int | None = None
    text_length_2: int | None = field(default=None, metadata={NEUTRAL: None})
    lists: dict[str, list[str]] = field(default_factory=dict, metadata={NEUTRAL: {}})
    gradient_checkpointing: bool = False
    licence: str = "unknown"
    _random: str | None = None  # a config as JSON, set by `random`, which has no checkpoint

    def __post_init__(self) -> None:
        for name in ("text_length", "text_length_2"):
            length = getattr(self, name)
            require(length is None or length >= 1, f"backbone.{name}", length, "at least 1")
        require(
            self.latent is None or (len(self.latent) in (2, 3) and min(self.latent) >= 1),
            "backbone.latent",
            self.latent,
            "[height, width] or [frames, height, width] of the latents",
        )

    @override
    def build(self) -> nn.Module:
        """Load the transformer, or make a random one. Draws nothing from the global generator.

        Raises:
            UserError: no such transformer, its weights do not fit its config, or its blocks cannot be removed.
        """
        model: Any = self._pretrained() if self._random is None else self._fresh()
        if self.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        return model.eval()  # type: ignore[no-any-return]

    @override
    def config(self, model: nn.Module | None = None) -> dict[str, Any]:
        """Return the transformer's diffusers config: the model's, or the one that comes with this package."""
        if model is not None:
            found = settings(model)
        elif self._random is not None:
            found = json.loads(self._random)
        else:
            found = self._stored_config()
        plain: dict[str, Any] = json.loads(json.dumps(completed(found)))  # tuples as the lists that JSON has
        return plain

    @classmethod
    @override
    def construct(cls, config: Mapping[str, Any]) -> nn.Module:
        """Build the untrained transformer of a config; UserError if diffusers has no such network."""
        return construct(config)

    @cached_property
    @override
    def streams(self) -> Mapping[str, Sequence[Stream]]:  # type: ignore[override]  # not every network has the same
        return streams_by_list(self.config(), self.lists)

    @override
    def blocks(self, model: nn.Module) -> Sequence[str]:
        found = lists_of(settings(model), tuple(self.lists))
        return [f"{path}.{i}" for path, told in found.items() for i in told.free]

    @override
    def after_prune(self, model: nn.Module, kept: Mapping[str, Sequence[int]]) -> None:
        shorten(model, kept)

    @override
    def example(self, num_rows: int) -> dict[str, Tensor]:
        """Return latents `x` (batch, ...), and what the network takes beside them: `calling` lists it."""
        config = self.config()
        lengths = self.text_length, self.text_length_2
        return example(config, network_class(config), num_rows, self.latent, lengths)

    @override
    def lookups(self, model: nn.Module) -> Mapping[str, Lookup]:
        return {"y": Lookup(n)} if (n := self.config(model).get("num_embeds_ada_norm")) else {}

    @classmethod
    @override
    def tiny(cls) -> Self:
        sizes = {
            "patch_size": 1, "in_channels": 16, "num_layers": 3, "num_single_layers": 3, "attention_head_dim": 8,
            "num_attention_heads": 2, "joint_attention_dim": 12, "pooled_projection_dim": 10,
            "axes_dims_rope": [2, 2, 4],
        }  # fmt: skip
        return cls.random({"_class_name": "FluxTransformer2DModel", **sizes}, latent=[4, 4], text_length=5)

    @classmethod
    def random(cls, config: Mapping[str, Any], **options: Any) -> Self:
        """Return a backbone whose network has random non-zero weights."""
        return cls(_random=json.dumps(config), **options)

    @property
    @override
    def origin(self) -> str | None:
        return self.model

    @override
    def source(self) -> dict[str, Any]:
        if self.model is None:
            return {"licence": self.licence}
        found = {"checkpoint": self.model, "licence": self.licence}
        if self._file is not None:
            check_regular(self._file)
            encoded = self._file.suffix == GGUF
            weights = {"weights": encoding_of(self._file, dtype_of([self._file], self.dtype))} if encoded else {}
            return {**found, **weights, "sha256": sha256(self._file)}
        if not Path(self.model).is_dir():  # on the hub, where a revision says what it is
            return {**found, "revision": self.revision or "main"}
        folder = self._folder(Path(self.model))
        files = [folder / "config.json", *weights_in(folder, self.variant)]
        return {**found, "sha256": digest({path.name: sha256(path) for path in files})}

    @override
    def check_weights(self) -> None:
        """Read the headers of a folder's files, or of a single one, if they are safetensors."""
        if self._file is not None:
            saved_dtype([self._file])
        elif self.model is not None and Path(self.model).is_dir():
            saved_dtype(weights_in(self._folder(Path(self.model)), self.variant))

    @override
    def save(self, model: nn.Module, folder: Path) -> list[str]:
        write_json(folder / "config.json", {**self.config(model), "_diffusers_version": diffusers().__version__})
        save_tensors(folder / WEIGHTS, model.state_dict(), {"format": "pt"})
        return ["config.json", WEIGHTS]

    @override
    def export(self, model: nn.Module, library: str, folder: Path) -> None:
        if library != SINGLE_FILE:
            return super().export(model, library, folder)
        save_tensors(folder / "model.safetensors", renamed(model), {"format": "pt"})

    @classmethod
    @override
    def load(cls, folder: Path, config: Mapping[str, Any]) -> nn.Module:
        return cls(model=str(folder)).build()

    def _fresh(self) -> Any:
        assert self._random is not None
        with torch.random.fork_rng():
            model = construct(json.loads(self._random))
        randomise(model, generator(0, "random transformer"))
        return model

    def _pretrained(self) -> nn.Module:
        if self._file is not None:
            return prepared(read_file(self._file, self._stored_config(), self.dtype))
        folder = self._fetched(*patterns("safetensors", self.variant), "*.json")
        if not any(folder.glob("*.safetensors")):
            folder = self._fetched(*patterns("bin", self.variant), "*.json")
        config = network(folder / "config.json")
        if self.model is not None and (planned := shipped(self.model)) is not None:
            check_agreement(planned, config, folder / "config.json")
        model = read_folder(folder, config, self.dtype, self.variant)
        check_copies(model, str(folder))
        return prepared(model)

    def _stored_config(self) -> dict[str, Any]:
        if self._file is not None:
            if self.config_from is None:
                raise UserError(
                    f"backbone.config_from: not set, and {self._file} does not say how large the network is; give a "
                    "folder with the config.json of the transformer or its pipeline, or the pipeline's id on the hub"
                )
            sizes = replace(self, model=self.config_from, config_from=None)._stored_config()
            check_kind(sizes)
            return sizes
        planned = None if self.model is None or Path(self.model).is_dir() else shipped(self.model)
        return network(self._fetched("config.json") / "config.json") if planned is None else planned

    @property
    def _file(self) -> Path | None:
        """The single file that `model` names."""
        return Path(self.model) if self.model is not None and Path(self.model).suffix in FILES else None

    def _fetched(self, *patterns: str) -> Path:
        """The folder with these files of the transformer, downloaded from the hub if necessary."""
        if self.model is None:
            raise UserError(
                "backbone.model: not set; expected a folder, or the id of a pipeline on the Hugging Face hub"
            )
        if Path(self.model).is_dir():
            return self._folder(Path(self.model))
        from huggingface_hub import snapshot_download

        wanted = [f"{self.subfolder}/{pattern}".lstrip("/") for pattern in patterns]
        try:
            root = snapshot_download(self.model, revision=self.revision, allow_patterns=wanted)
        except (OSError, ValueError) as e:
            raise MissingFileError(
                f"backbone.model: '{self.model}' is no folder, and the Hugging Face hub does not give it "
                f"({first_line(e)}). Give a folder, or an id that you have access to (`hf auth login`)"
            ) from None
        return self._folder(Path(root))

    def _folder(self, root: Path) -> Path:
        """Where the transformer is in a pipeline's folder, or that folder if it is the transformer's own."""
        inner = root / self.subfolder
        folder = inner if (inner / "config.json").is_file() else root
        if not (folder / "config.json").is_file():
            raise MissingFileError(
                f"backbone.model: neither {inner} nor {root} holds a config.json; expected a pipeline's folder, with "
                f"the transformer in '{self.subfolder}' (set backbone.subfolder if it is elsewhere)"
            )
        check_folder(folder)
        return folder
