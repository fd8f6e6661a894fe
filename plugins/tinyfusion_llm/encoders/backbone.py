"""Encoders of transformers as backbones; students are plain transformers folders."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from tinyfusion_core.errors import UserError, first_line, require
from tinyfusion_core.protocols.blocks.streams import Unneeded
from tinyfusion_core.protocols.data import Lookup
from tinyfusion_core.protocols.undisturbed import evaluating
from tinyfusion_llm.encoders.folder import copy_modules
from tinyfusion_llm.hidden import IGNORED
from tinyfusion_llm.layers.building import config_of
from tinyfusion_llm.layers.finding import find_layers, text_config
from tinyfusion_llm.layers.shortening import shorten
from tinyfusion_llm.pretrained.backbone import Pretrained
from tinyfusion_llm.pretrained.reading import Autos, vocabulary_size


@dataclass(frozen=True, kw_only=True)
class Encoder(Pretrained):
    """An encoder of text that transformers loads: every token sees all others, but padding.

    Args:
        context: tokens per example, as in the data's option of that name, padding among them.
    """

    unneeded: ClassVar[Unneeded] = (1, 2)  # attention weights

    context: int = 128

    @classmethod
    @override
    def check_config(cls, config: Any, name: str) -> None:
        if getattr(config, "is_encoder_decoder", False):
            raise UserError(
                f"backbone.model: '{name}' ({config.model_type}) is an encoder-decoder; expected {cls.kind}"
            )
        super().check_config(config, name)

    @override
    def check_model(self, model: nn.Module) -> None:
        find_layers(model)
        if failure := _failure(model, self.context):
            raise UserError(
                f"backbone.model: {type(model).__name__} does not read {self.context} tokens ({failure}); expected an "
                "encoder of text, and a backbone.context that it has positions for (data.context must be the same)"
            )
        if _is_causal(model):
            name = type(model).__name__
            raise UserError(
                f"backbone.model: no token of {name} sees a later one, as in a decoder; expected {self.kind}"
            )
        _freeze_unreached(model)

    @override
    def blocks(self, model: nn.Module) -> Sequence[str]:
        return [f"{find_layers(model)}.*"]

    @override
    def after_prune(self, model: nn.Module, kept: Mapping[str, Sequence[int]]) -> None:
        shorten(model, kept)
        if not next(model.parameters()).is_meta and (failure := _failure(model, 2)):
            kind, left = text_config(model).model_type, " and ".join(str(list(indices)) for indices in kept.values())
            raise UserError(f"backbone: a '{kind}' of the layers {left} alone does not run ({failure}); keep others")

    @override
    def example(self, num_rows: int) -> dict[str, Tensor]:
        """Return `tokens` and `attention`, (batch, context), the end of which is padding; and what losses need."""
        tokens = torch.arange(num_rows * self.context).view(num_rows, -1) % min(100, vocabulary_size(self.config()))
        attention = torch.ones_like(tokens)
        attention[:, self.context - self.context // 4 - 1 :] = 0
        return {"tokens": tokens, "attention": attention, **self._told(tokens, attention)}

    @abstractmethod
    def _told(self, tokens: Tensor, attention: Tensor) -> dict[str, Tensor]:
        """What data tell of examples beside their tokens."""

    @override
    def lookups(self, model: nn.Module) -> Mapping[str, Lookup]:
        positions = getattr(text_config(model), "max_position_embeddings", None)
        require(
            not isinstance(positions, int) or positions < 1 or self.context <= positions,
            "backbone.context", self.context, f"at most {positions}, the network's positions (and data.context alike)",
        )  # fmt: skip
        embeddings = model.get_input_embeddings()  # type: ignore[operator]
        size = int(getattr(embeddings, "weight", embeddings).shape[0])
        return {name: Lookup(size, "tokens", _REMEDY, ignored) for name, ignored in self._looked_up().items()}

    def _looked_up(self) -> Mapping[str, int | None]:
        """Columns of token ids, and a further value that is ignored in each."""
        return {"tokens": None}


_REMEDY = "take the model's own tokenizer"
_TINY = {
    "model_type": "bert", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "vocab_size": 97,
    "num_attention_heads": 4, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MaskedLM(Encoder):
    """A masked language model that `AutoModelForMaskedLM` of transformers loads: BERT, RoBERTa, ModernBERT and others.

    See `Encoder` and `Pretrained` for the options.
    """

    autos: ClassVar[Autos] = ("AutoModelForMaskedLM",)
    kind: ClassVar[str] = "a masked language model"
    loading: ClassVar[str] = (
        "from transformers import AutoModelForMaskedLM, AutoTokenizer\n\n"
        'model = AutoModelForMaskedLM.from_pretrained("path/to/this/folder")\n'
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")'
    )

    @override
    def _told(self, tokens: Tensor, attention: Tensor) -> dict[str, Tensor]:
        constant = tokens.new_ones(len(tokens))
        labels = tokens.masked_fill(attention == 0, IGNORED)
        return {"labels": labels, "mask_token": 3 * constant, "last_token": 50 * constant}

    @override
    def _looked_up(self) -> Mapping[str, int | None]:
        return {**super()._looked_up(), "labels": IGNORED, "mask_token": None, "last_token": None}

    @classmethod
    @override
    def tiny(cls) -> MaskedLM:
        return cls(network=_TINY, context=16, _random_seed=0)


@dataclass(frozen=True, kw_only=True)
class TextEncoder(Encoder):
    """An encoder without a head that `AutoModel` of transformers loads, such as that of a sentence encoder.

    A folder of sentence-transformers keeps its other files, so that this library reads the student. Weights that no
    embedding comes from, such as a pooler's, are left as they are. See `Encoder` and `Pretrained` for the options.
    """

    autos: ClassVar[Autos] = ("AutoModel",)
    kind: ClassVar[str] = "an encoder"
    loading: ClassVar[str] = (
        "from transformers import AutoModel, AutoTokenizer\n\n"
        'model = AutoModel.from_pretrained("path/to/this/folder")\n'
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")\n'
        '# With the files of sentence-transformers: SentenceTransformer("path/to/this/folder")'
    )

    @override
    def save(self, model: nn.Module, folder: Path) -> list[str]:
        """Write a transformers folder, and the files of sentence-transformers that the model came with."""
        written = super().save(model, folder)
        return [*written, *(copy_modules(Path(self.model), folder) if self.model else ())]

    @override
    def _told(self, tokens: Tensor, attention: Tensor) -> dict[str, Tensor]:
        return {"embedding": torch.zeros(len(tokens), config_of(self.config()).get_text_config().hidden_size)}

    @classmethod
    @override
    def tiny(cls) -> TextEncoder:
        return cls(network=_TINY, context=16, _random_seed=0)


def _run(model: nn.Module, num_tokens: int, last: int | None = None) -> Tensor:
    """Its logits or final hidden states, of a text of so many tokens, the last of which is padding.

    The one before it can be set.
    """
    device = next(model.parameters()).device
    tokens = torch.arange(num_tokens, device=device)[None] % 50
    if last is not None:
        tokens[:, -2] = last
    attention = (torch.arange(num_tokens, device=device) < num_tokens - 1).long()[None]
    with torch.random.fork_rng(), evaluating(model):
        found = model(input_ids=tokens, attention_mask=attention)
    states: Tensor = found.get("logits", found.get("last_hidden_state"))
    if states.shape[:2] != tokens.shape:
        raise ValueError("it has no states of its tokens")
    return states


@torch.no_grad()
def _is_causal(model: nn.Module) -> bool:
    """Whether no token sees a later one: what it changes there is nothing but rounding beside what it is itself."""
    one, other = (_run(model, 8, last)[0].double() for last in (10, 11))
    changed = (one - other).abs().amax(1)
    return bool(changed[:6].max() <= 1e-5 * changed[6])


def _failure(model: nn.Module, num_tokens: int) -> str:
    """Why a network does not read so many tokens; empty if it does."""
    try:
        with torch.no_grad():
            _run(model, num_tokens)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        return f"{type(e).__name__}: {first_line(e)}"
    return ""


def _freeze_unreached(model: nn.Module) -> None:
    """Keep weights as they are that no prediction reaches, such as a pooler's: processes would wait for gradients."""
    with torch.enable_grad():
        left: list[Any] = [_run(model, 8).grad_fn]
    reached, seen = set(), set(left)
    while left:
        node = left.pop()
        if hasattr(node, "variable"):  # a weight
            reached.add(id(node.variable))
        before = {earlier for earlier, _ in node.next_functions if earlier is not None} - seen
        seen |= before
        left.extend(before)
    for p in model.parameters():
        p.requires_grad_(id(p) in reached)
