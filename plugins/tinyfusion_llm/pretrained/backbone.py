"""Pretrained networks of transformers as backbones; students are plain transformers folders."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from typing_extensions import override

from tinyfusion_core.errors import UserError, first_line, need, require
from tinyfusion_core.protocols.backbone import Backbone
from tinyfusion_core.protocols.blocks.branches import REMOVED, removed_branches
from tinyfusion_core.protocols.blocks.streams import Stream
from tinyfusion_core.runtime.files import digest, sha256
from tinyfusion_core.runtime.progress import quietly
from tinyfusion_core.runtime.seeding import generator
from tinyfusion_llm.layers.building import as_plain, config_of, construct, randomised, steady
from tinyfusion_llm.layers.limits import limits
from tinyfusion_llm.layers.shortening import shorten, try_out
from tinyfusion_llm.layers.streams import layer_streams
from tinyfusion_llm.pretrained.readers import load_processor, load_tokenizer
from tinyfusion_llm.pretrained.reading import (
    Autos,
    as_json,
    ask_to_dequantise,
    auto_class,
    check_keys,
    check_kind,
    check_path,
    encoding_of,
    explained,
    tell_size,
    transformers,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Pretrained(Backbone):
    """A network that a class of transformers loads.

    A student is saved as such a model with fewer layers: configs, weights, tokenizer and processor, in the dtype in
    which it was loaded.

    Args:
        model: a folder, or the id of a model on the Hugging Face hub; its weights must be safetensors or GGUF.
        revision: branch, tag or commit of a model on the hub.
        gguf_file: name of a GGUF file in it, to read instead; it is expanded to `dtype`.
        dtype: dtype of the weights; `auto` is that of the checkpoint. Full-precision training needs float32.
        network: the model's config, to plan where the model is not available, or to train a fresh one. With a
            model, its entries must agree with the model's.
        licence: licence of the checkpoint, for the model card.
        context: tokens per example, as in the data's option of that name; affects only FLOPs and latency.
    """

    library: ClassVar[str] = "transformers"
    #: The classes of transformers that load such networks, and what such a network is called in messages.
    autos: ClassVar[Autos]
    kind: ClassVar[str]

    model: str | None = None
    revision: str | None = None
    gguf_file: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    network: dict[str, Any] | None = None
    licence: str = "unknown"
    context: int = 512
    _random_seed: int | None = None  # set by `tiny`, which has no checkpoint

    def __post_init__(self) -> None:
        require(self.context >= 2, "backbone.context", self.context, "at least 2 tokens")
        if self.model is None and self.network is None:
            raise UserError("backbone: give model, a folder or hub id; or network, a config, to train a fresh one")
        if self.network is not None and "model_type" not in self.network:
            raise UserError("backbone.network: a transformers config names its model_type")

    @classmethod
    def check_config(cls, config: Any, name: str) -> None:
        """Check that a config of transformers is that of such a network, and names no code to fetch and run.

        Raises:
            UserError: it is not, or does.
        """
        check_kind(config, name, cls.autos, cls.kind)

    @abstractmethod
    def check_model(self, model: nn.Module) -> None:
        """Check a network that has its weights, in eval mode.

        Raises:
            UserError: it is not such a network, or lacks what the options ask for.
        """

    @override
    def build(self) -> nn.Module:
        """Load the model, or make the random one of `tiny`. Draws nothing from the global generator.

        Raises:
            UserError: no such model, not one of this kind, or weights that do not fit its config.
        """
        model: nn.Module = (self._random() if self.model is None else self._read(strict=False)).eval()
        self.check_model(model)
        return model

    @override
    def check_weights(self) -> None:
        """Read the headers of a folder's files, and compare names and shapes with the network's; of GGUF nothing."""
        if self.model is None:
            return
        check_path(self.model, "backbone.model")
        if Path(self.model).is_dir() and not self.gguf_file:
            with quietly(transformers().logging):
                self._loaded(strict=False, device_map={"": "meta"})  # which reads no number

    @override
    def config(self, model: nn.Module | None = None) -> dict[str, Any]:
        """Return the transformers config.

        Raises:
            UserError: the model has none, or `network` disagrees with it.
        """
        if model is not None:
            return as_json(model.config)
        if self.model is None:
            return dict(self.network or {})
        if self.network is not None and not Path(self.model).is_dir():
            return dict(self.network)  # planning asks no hub
        return self._agreed(self._pretrained_config())

    @classmethod
    @override
    def construct(cls, config: Mapping[str, Any]) -> nn.Module:
        """Build the untrained model of a config.

        Raises:
            UserError: `config` is not that of such a network.
        """
        kind = config.get("model_type")
        try:
            made = config_of(config)
        except (ValueError, TypeError) as e:
            raise UserError(
                f"backbone: transformers cannot read a config of model_type '{kind}': {first_line(e)}"
            ) from None
        cls.check_config(made, str(kind))
        model: nn.Module = construct(config, cls.autos, str(torch.get_default_device()))
        return model

    @override
    def after_prune(self, model: nn.Module, kept: Mapping[str, Sequence[int]]) -> None:
        shorten(model, kept)
        try_out(model, kept)

    @override
    def limits(self, model: nn.Module) -> Mapping[str, Sequence[Any]]:
        return limits(model)

    @cached_property
    @override
    def streams(self) -> Mapping[str, Sequence[Stream]]:  # type: ignore[override]  # not every network has the same
        return layer_streams(self.config(), self.autos)

    @property
    @override
    def origin(self) -> str | None:
        return self.model

    @override
    def source(self) -> dict[str, Any]:
        if self.model is None:
            return {"licence": self.licence}
        found = {"checkpoint": self.model, "licence": self.licence}
        folder = Path(self.model)
        if not folder.is_dir():  # on the hub, where a revision says what it is
            return {**found, "revision": self.revision or "main"}
        files = [folder / self.gguf_file] if self.gguf_file else [*folder.glob("*.safetensors"), folder / "config.json"]
        if encoding := encoding_of(self._pretrained_config(), self.dtype):
            found["weights"] = encoding
        return {**found, "sha256": digest({path.name: sha256(path) for path in sorted(files) if path.is_file()})}

    @override
    def save(self, model: nn.Module, folder: Path) -> list[str]:
        """Write a transformers folder: configs, weights named as in its checkpoints, tokenizer, processor.

        Of a model that lacks branches inside its layers transformers would draw them at random: its weights are written
        as any network's, for `tinyfusion_core.load_pretrained` alone.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if removed_branches(model):
            super().save(model, folder)
        else:
            model.save_pretrained(folder)  # type: ignore[operator]
        readers = () if self.model is None else (self.tokenizer(), load_processor(self.model, self.revision, False))
        for reader in filter(None, readers):
            reader.save_pretrained(folder)
        written = sorted(path for path in folder.iterdir() if path.is_file())
        for path in written:
            path.chmod(0o644)  # transformers keeps weights to their owner
        return [path.name for path in written]

    @classmethod
    @override
    def load(cls, folder: Path, config: Mapping[str, Any]) -> nn.Module:
        if REMOVED in config:
            with torch.random.fork_rng():
                return super().load(folder, config).eval()
        read: nn.Module = cls(model=str(folder))._read(strict=True).eval()
        return read

    def tokenizer(self) -> Any:
        """Return the model's tokenizer; None if it has none."""
        return None if self.model is None else load_tokenizer(self.model, self.revision, self.gguf_file, required=False)

    def _read(self, strict: bool) -> Any:
        """The pretrained model, its weights decoded. Raises UserError as `_loaded` does."""
        model, encoding = self._loaded(strict)
        if not encoding and not self.gguf_file:
            return model
        # Of quantised weights transformers gives the config's dtype to those alone that it dequantises.
        plain = as_plain(model, model.config.dtype if encoding else model.dtype)
        if encoding:
            tell_size(plain, str(self.model), encoding)
        return plain

    def _loaded(self, strict: bool, **where: Any) -> tuple[Any, str]:
        """What transformers loads, and how its files hold the weights.

        Raises:
            UserError: files are missing or damaged, or the weights do not fit the config, see `check_keys`.
        """
        assert self.model is not None
        config = self._pretrained_config()
        self._agreed(config)
        encoding = encoding_of(config, self.dtype)
        given: dict[str, Any] = {} if self.gguf_file else {"config": config, "use_safetensors": True}
        with torch.random.fork_rng(), explained(self.model):
            found: Any = auto_class(config, self.autos).from_pretrained(
                self.model,
                **self._where(),
                **given,
                dtype=self.dtype,
                ignore_mismatched_sizes=True,  # refused below, by name
                output_loading_info=True,
                **where,
            )
        model, loading = found
        check_keys(model, loading, self.model, strict)
        return model, encoding

    def _random(self) -> nn.Module:
        if self._random_seed is None:
            raise UserError("backbone.model: not set; a fresh network has to be trained first, add a train stage")
        random: nn.Module = randomised(
            self.network or {}, self.autos, generator(self._random_seed, "tiny language model")
        )
        return random

    def _where(self) -> dict[str, Any]:
        return {"revision": self.revision or "main", **({"gguf_file": self.gguf_file} if self.gguf_file else {})}

    def _agreed(self, config: Any) -> dict[str, Any]:
        """The config as JSON. Raises UserError if `network` disagrees."""
        found = as_json(config)
        for key, value in (self.network or {}).items():
            if found.get(key, value) != value:
                raise UserError(f"backbone.network: {key} is {value!r}, in {self.model} it is {found[key]!r}")
        return found

    def _pretrained_config(self) -> Any:
        assert self.model is not None
        reader = transformers().AutoConfig
        if self.gguf_file:
            need("gguf", "tinyfusion[gguf]", "backbone.gguf_file")
        with explained(self.model):
            config = reader.from_pretrained(self.model, **self._where())
            ask_to_dequantise(config, self.model)
        self.check_config(config, self.model)
        return steady(config)
