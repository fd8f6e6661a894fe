"""Encoder-decoders of transformers as backbones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from tinyfusion_core.errors import UserError, require
from tinyfusion_core.protocols.blocks.streams import Unneeded
from tinyfusion_core.protocols.data import Lookup
from tinyfusion_core.pruning.removal import same_but_for_rounding
from tinyfusion_llm.converters import CLIENTS
from tinyfusion_llm.hidden import IGNORED, run_to_head
from tinyfusion_llm.layers.building import class_of
from tinyfusion_llm.layers.edits import is_int
from tinyfusion_llm.layers.finding import vocabulary_of
from tinyfusion_llm.layers.inputs import short_inputs, source_of
from tinyfusion_llm.layers.stacks import find_stacks
from tinyfusion_llm.pretrained.backbone import Pretrained
from tinyfusion_llm.pretrained.reading import Autos
from tinyfusion_llm.seq2seq.columns import FEATURES, MASK, SOURCE


@dataclass(frozen=True, kw_only=True)
class EncoderDecoder(Pretrained):
    """An encoder-decoder that `AutoModelForSeq2SeqLM` or `AutoModelForSpeechSeq2Seq` of transformers loads.

    Layers of both can go; a student is saved as such a model with fewer layers.

    Args:
        source_context: tokens, samples of a waveform or frames of features that the encoder reads of an example;
            affects only FLOPs and latency, and of some networks the config decides it.
        context: tokens that the decoder reads of an example, as in the data's option of that name; affects only FLOPs
            and latency.
    """

    # T5 computes the bias of positions in its first layers and hands it on; LongT5 has attention weights between both.
    # Pegasus-X has global tokens beside its own.
    unneeded: ClassVar[Unneeded] = {
        1: ("position_bias", "global_hidden_states"),
        **dict.fromkeys((2, 3), ("encoder_decoder_position_bias",)),
        4: (),
    }
    loading: ClassVar[str] = (
        "from transformers import AutoModelForSeq2SeqLM, AutoTokenizer\n\n"
        'model = AutoModelForSeq2SeqLM.from_pretrained("path/to/this/folder")\n'
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")\n'
        "# One that reads speech: AutoModelForSpeechSeq2Seq and AutoProcessor"
    )
    autos: ClassVar[Autos] = ("AutoModelForSeq2SeqLM", "AutoModelForSpeechSeq2Seq")
    kind: ClassVar[str] = "an encoder-decoder"

    source_context: int = 512
    context: int = 128

    def __post_init__(self) -> None:
        require(self.source_context >= 2, "backbone.source_context", self.source_context, "at least 2")
        super().__post_init__()

    @classmethod
    @override
    def check_config(cls, config: Any, name: str) -> None:
        super().check_config(config, name)
        if not config.is_encoder_decoder:
            raise UserError(
                f"backbone.model: '{name}' ({config.model_type}) is not an encoder-decoder; take CausalLM for a decoder"
            )

    @override
    def check_model(self, model: Any) -> None:
        find_stacks(model)
        given = short_inputs(model)
        tokens = given.pop("decoder_input_ids")
        with torch.no_grad(), torch.random.fork_rng():
            found = run_to_head(model, tokens, {"use_cache": False, **given}, {"use_cache": False})
            whole = model(decoder_input_ids=tokens, use_cache=False, **given).logits
            try:
                same = same_but_for_rounding([found.head(found.states)], [whole])
            except (LookupError, AttributeError, TypeError, ValueError, RuntimeError):  # of any family's head
                same = False
        if not same:
            raise UserError(
                f"backbone.model: the head of a '{model.config.model_type}' reads more than its decoder's last hidden "
                "states; expected one that these alone decide"
            )

    @override
    def blocks(self, model: nn.Module) -> Sequence[str]:
        return [f"{stack.path}.*" for stack in find_stacks(model)]

    @override
    def clients(self, model: nn.Module, student: nn.Module, kept: Sequence[int]) -> Mapping[str, str]:
        return dict.fromkeys(CLIENTS, "it knows one list of layers, that of a decoder")

    @override
    def example(self, num_rows: int) -> dict[str, Tensor]:
        """Return what the encoder reads: ids `source` and `source_mask`, (batch, source_context), or `features`.

        Beside it are `tokens` and `labels`, (batch, context). The last of the source is padding.
        """
        config = self.config()
        source = source_of(class_of(config, self.autos), config, self.source_context)
        tokens = _counted(num_rows, self.context) % min(100, source.vocabulary)
        found = {"tokens": tokens, "labels": tokens.clone()}
        if source.name != "input_ids":
            return {FEATURES: (_counted(num_rows, *source.shape) % 100 / 100), **found}
        read = _counted(num_rows, self.source_context) % min(100, source.vocabulary)
        mask = torch.ones_like(read)
        mask[:, -1] = 0
        return {SOURCE: read, MASK: mask, **found}

    @override
    def lookups(self, model: Any) -> Mapping[str, Lookup]:
        remedy = "take the model's own tokenizer"
        for option, names in _POSITIONS.items():
            most = next((most for name in names if is_int(most := getattr(model.config, name, None))), None)
            reads = option == "context" or model.main_input_name == "input_ids"
            require(
                most is None or not reads or getattr(self, option) <= most, f"backbone.{option}", getattr(self, option),
                f"at most {most}, the network's positions (and data.{option} alike)",
            )  # fmt: skip
        size = vocabulary_of(model)
        found = {"tokens": Lookup(size, "tokens", remedy), "labels": Lookup(size, "tokens", remedy, ignored=IGNORED)}
        if model.main_input_name == "input_ids":
            found[SOURCE] = Lookup(int(model.get_input_embeddings().num_embeddings), "tokens", remedy)
        return found

    @classmethod
    @override
    def tiny(cls) -> EncoderDecoder:
        network = {
            "model_type": "bart", "d_model": 32, "encoder_layers": 4, "decoder_layers": 3, "vocab_size": 97,
            "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
            "max_position_embeddings": 64, "decoder_start_token_id": 2,
        }  # fmt: skip
        return cls(network=network, source_context=12, context=8, _random_seed=0)


_POSITIONS = {
    "context": ("max_target_positions", "max_decoder_position_embeddings", "max_position_embeddings"),
    "source_context": ("max_encoder_position_embeddings", "max_position_embeddings"),
}
"""The settings that say how many positions a network has, by what must not be longer."""


def _counted(*shape: int) -> Tensor:
    return torch.arange(math.prod(shape)).view(shape)
