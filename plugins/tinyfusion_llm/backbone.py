"""Decoder-only language models of transformers as backbones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from tinyfusion_core.errors import UserError, first_line
from tinyfusion_core.protocols.blocks.branches import Branch
from tinyfusion_core.protocols.blocks.streams import Unneeded
from tinyfusion_core.protocols.data import Lookup
from tinyfusion_core.runtime.files import NEUTRAL
from tinyfusion_core.runtime.seeding import generator
from tinyfusion_llm.converters import CLIENTS, clients
from tinyfusion_llm.hidden import IGNORED
from tinyfusion_llm.layers.building import randomised
from tinyfusion_llm.layers.finding import close_ranks, find_branches, find_layers
from tinyfusion_llm.pretrained.backbone import Pretrained
from tinyfusion_llm.pretrained.reading import Autos, as_json, vocabulary_size
from tinyfusion_llm.separate import check_separate
from tinyfusion_llm.seq2seq.columns import SOURCE


@dataclass(frozen=True, kw_only=True)
class CausalLM(Pretrained):
    """A decoder-only model that `AutoModelForCausalLM` or `AutoModelForImageTextToText` of transformers loads.

    A student is saved as such a model with fewer layers. Of one that reads images, the layers of the text's decoder can
    go.

    Args:
        separate: tokens see their own document alone, as the data's option of that name says; the model is tried first.
    """

    # What the decoder only collects, such as attention weights; but ZAYA's router and GLM's indices go on.
    unneeded: ClassVar[Unneeded] = {1: ("prev_router_hidden_states", "prev_topk_indices"), 2: (), 3: ()}
    loading: ClassVar[str] = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")\n'
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")\n'
        "# One that reads images: AutoModelForImageTextToText and AutoProcessor"
    )
    autos: ClassVar[Autos] = ("AutoModelForCausalLM", "AutoModelForImageTextToText")
    kind: ClassVar[str] = "a decoder-only language model"

    separate: bool = field(default=False, metadata={NEUTRAL: False})

    @classmethod
    @override
    def check_config(cls, config: Any, name: str) -> None:
        if getattr(config, "is_encoder_decoder", False):
            raise UserError(
                f"backbone.model: '{name}' ({config.model_type}) is an encoder-decoder; take the backbone "
                "EncoderDecoder, or a decoder-only model"
            )
        super().check_config(config, name)

    @override
    def check_model(self, model: nn.Module) -> None:
        _check_causal(model)
        find_layers(model)
        if self.separate:
            check_separate(model)

    @override
    def blocks(self, model: nn.Module) -> Sequence[str]:
        return [f"{find_layers(model)}.*"]

    @override
    def branches(self, model: nn.Module) -> Mapping[str, Branch]:
        return find_branches(model)

    @override
    def limits(self, model: nn.Module) -> Mapping[str, Sequence[Any]]:
        return {} if self.units else super().limits(model)

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
        found[SOURCE] = Lookup(0, "texts for an encoder", "take the backbone EncoderDecoder, or the data TextTokens")
        if not self.separate:
            return {**found, "positions": Lookup(0, "documents to keep apart", "set backbone.separate, as in data")}
        if self.model is None:  # it will be trained before it is built
            check_separate(randomised(self.network or {}, self.autos, generator(0, "documents apart")).eval())
        return found

    @classmethod
    @override
    def tiny(cls) -> CausalLM:
        network = {
            "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "vocab_size": 97,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        }  # fmt: skip
        return cls(network=network, context=16, _random_seed=0)

    @classmethod
    @override
    def load(cls, folder: Path, config: Mapping[str, Any]) -> nn.Module:
        model = super().load(folder, config)
        close_ranks(model)
        return model


def _check_causal(model: Any) -> None:
    """Check that no token sees later ones: BERT and similar models load as causal models too.

    Raises:
        UserError: predictions depend on later tokens, or on more than tokens.
    """
    tokens = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]]) % vocabulary_size(as_json(model.config))
    try:
        with torch.no_grad():
            logits = model(input_ids=tokens, use_cache=False).logits[:, :3].float()
    except (TypeError, ValueError) as e:
        kind = type(model).__name__
        raise UserError(f"backbone.model: {kind} does not read text alone ({first_line(e)}); expected a decoder") from e
    rounding = max(1e-5, 4 * torch.finfo(model.dtype).eps)
    if (logits[0] - logits[1]).abs().max() > rounding * logits.abs().max():
        raise UserError(
            f"backbone.model: {type(model).__name__} is not decoder-only: its predictions depend on later tokens"
        )
