"""Decoder-only language models of transformers as backbones; students are plain transformers folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from tinyfusion_core.errors import UserError, first_line, need, require
from tinyfusion_core.protocols.backbone import Backbone
from tinyfusion_core.protocols.blocks.branches import REMOVED, Branch, removed_branches
from tinyfusion_core.protocols.blocks.streams import Unneeded
from tinyfusion_core.protocols.data import Lookup
from tinyfusion_core.runtime.files import NEUTRAL, digest, sha256
from tinyfusion_core.runtime.seeding import generator
from tinyfusion_llm.converters import CLIENTS, clients
from tinyfusion_llm.hidden import IGNORED
from tinyfusion_llm.layers.building import as_plain, config_of, construct, randomised, steady
from tinyfusion_llm.layers.finding import close_ranks, find_branches, find_layers
from tinyfusion_llm.layers.limits import limits
from tinyfusion_llm.layers.shortening import shorten, try_out
from tinyfusion_llm.pretrained import (
    as_json,
    ask_to_dequantise,
    auto_class,
    check_causal,
    check_keys,
    check_kind,
    encoding_of,
    explained,
    load_processor,
    load_tokenizer,
    tell_size,
    transformers,
    vocabulary_size,
)
from tinyfusion_llm.separate import check_separate


@dataclass(frozen=True, kw_only=True)
class CausalLM(Backbone):
    """A decoder-only model that `AutoModelForCausalLM` or `AutoModelForImageTextToText` of transformers loads.

    A student is saved as such a model with fewer layers: configs, weights, tokenizer and processor, in the dtype in
    which it was loaded. Of one that reads images, the layers of the text's decoder can go.

    Args:
        model: a folder, or the id of a model on the Hugging Face hub; its weights must be safetensors or GGUF.
        revision: branch, tag or commit of a model on the hub.
        gguf_file: name of a GGUF file in it, to read instead; it is expanded to `dtype`.
        dtype: dtype of the weights; `auto` is that of the checkpoint. Full-precision training needs float32.
        context: tokens per example, as in the data's option of that name; affects only FLOPs and latency.
        separate: tokens see their own document alone, as the data's option of that name says; the model is tried first.
        network: the model's config, to plan where the model is not available, or to train a fresh one. With a
            model, its entries must agree with the model's.
        licence: licence of the checkpoint, for the model card.
    """

    # What the decoder only collects, such as attention weights; but ZAYA's router and GLM's indices go on.
    unneeded: ClassVar[Unneeded] = {1: ("prev_router_hidden_states", "prev_topk_indices"), 2: (), 3: ()}
    library: ClassVar[str] = "transformers"
    loading: ClassVar[str] = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")\n'
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")\n'
        "# One that reads images: AutoModelForImageTextToText and AutoProcessor"
    )

    model: str | None = None
    revision: str | None = None
    gguf_file: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    context: int = 512
    separate: bool = field(default=False, metadata={NEUTRAL: False})
    network: dict[str, Any] | None = None
    licence: str = "unknown"
    _random_seed: int | None = None  # set by `tiny`, which has no checkpoint

    def __post_init__(self) -> None:
        require(self.context >= 2, "backbone.context", self.context, "at least 2 tokens")
        if self.model is None and self.network is None:
            raise UserError("backbone: give model, a folder or hub id; or network, a config, to train a fresh one")
        if self.network is not None and "model_type" not in self.network:
            raise UserError("backbone.network: a transformers config names its model_type")

    @override
    def build(self) -> nn.Module:
        """Load the model, or make the random one of `tiny`. Draws nothing from the global generator.

        Raises:
            UserError: no such model, not a decoder-only one, weights that do not fit its config, or one that cannot
                `separate` documents.
        """
        model = self._random() if self.model is None else self._read(strict=False)
        check_causal(model)
        find_layers(model)
        if self.separate:
            check_separate(model.eval())
        return _evaluating(model)

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
            UserError: `config` is not that of a decoder-only model.
        """
        kind = config.get("model_type")
        try:
            made = config_of(config)
        except (ValueError, TypeError) as e:
            raise UserError(
                f"backbone: transformers cannot read a config of model_type '{kind}': {first_line(e)}"
            ) from None
        check_kind(made, str(kind))
        model: nn.Module = construct(config, str(torch.get_default_device()))
        return model

    @override
    def blocks(self, model: nn.Module) -> Sequence[str]:
        return [f"{find_layers(model)}.*"]

    @override
    def branches(self, model: nn.Module) -> Mapping[str, Branch]:
        return find_branches(model)

    @override
    def after_prune(self, model: nn.Module, kept: Mapping[str, Sequence[int]]) -> None:
        ((path, indices),) = kept.items()
        shorten(model, path, indices)
        try_out(model, indices)

    @override
    def limits(self, model: nn.Module) -> Mapping[str, Sequence[Any]]:
        return {} if self.units else limits(as_json(model.config))

    @override
    def clients(self, model: nn.Module, student: nn.Module, kept: Sequence[int]) -> Mapping[str, str]:
        if self.units:
            return dict.fromkeys(CLIENTS, "it knows whole layers only, not attention or mlp without the other")
        return clients(model, student, kept)

    @override
    def example(self, num_rows: int) -> dict[str, Tensor]:
        """Return token ids `tokens`, (batch, context), `labels`, the same, and `positions`, of two documents."""
        tokens = torch.arange(num_rows * self.context).view(num_rows, -1) % min(100, vocabulary_size(self.config()))
        places = (torch.arange(self.context) % -(-self.context // 2)).expand(num_rows, -1)
        return {"tokens": tokens, "labels": tokens.clone(), **({"positions": places.clone()} if self.separate else {})}

    @override
    def lookups(self, model: nn.Module) -> Mapping[str, Lookup]:
        size = int(model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
        remedy = "take the model's own tokenizer"
        found = {"tokens": Lookup(size, "tokens", remedy), "labels": Lookup(size, "tokens", remedy, ignored=IGNORED)}
        if not self.separate:
            return {**found, "positions": Lookup(0, "documents to keep apart", "set backbone.separate, as in data")}
        if self.model is None:  # it will be trained before it is built
            check_separate(_evaluating(randomised(self.network or {}, generator(0, "documents apart"))))
        return found

    @classmethod
    @override
    def tiny(cls) -> CausalLM:
        network = {
            "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "vocab_size": 97,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        }  # fmt: skip
        return cls(network=network, context=16, _random_seed=0)

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
                model = super().load(folder, config)
            close_ranks(model)
            return _evaluating(model)
        return _evaluating(cls(model=str(folder))._read(strict=True))

    def tokenizer(self) -> Any:
        """Return the model's tokenizer; None if it has none."""
        return None if self.model is None else load_tokenizer(self.model, self.revision, self.gguf_file, required=False)

    def _read(self, strict: bool) -> Any:
        """The pretrained model. Raises UserError if its weights do not fit its config, see `check_keys`."""
        assert self.model is not None
        config = self._pretrained_config()
        self._agreed(config)
        encoding = encoding_of(config, self.dtype)
        given: dict[str, Any] = {} if self.gguf_file else {"config": config, "use_safetensors": True}
        with torch.random.fork_rng(), explained(self.model):
            found: Any = auto_class(config).from_pretrained(
                self.model,
                **self._where(),
                **given,
                dtype=self.dtype,
                ignore_mismatched_sizes=True,  # refused below, by name
                output_loading_info=True,
            )
        model, loading = found
        check_keys(model, loading, self.model, strict)
        if not encoding and not self.gguf_file:
            return model
        # Of quantised weights transformers gives the config's dtype to those alone that it dequantises.
        plain = as_plain(model, model.config.dtype if encoding else model.dtype)
        if encoding:
            tell_size(plain, self.model, encoding)
        return plain

    def _random(self) -> nn.Module:
        if self._random_seed is None:
            raise UserError("backbone.model: not set; a fresh network has to be trained first, add a train stage")
        return _evaluating(randomised(self.network or {}, generator(self._random_seed, "tiny language model")))

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
        check_kind(config, self.model)
        return steady(config)


def _evaluating(model: Any) -> nn.Module:
    evaluating: nn.Module = model.eval()
    return evaluating
