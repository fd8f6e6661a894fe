"""Language models of Hugging Face transformers: decoders, also of images, masked language models, sentence encoders."""

from __future__ import annotations

from tinyfusion_core.evaluation.metrics import Metric
from tinyfusion_core.protocols.backbone import Backbone
from tinyfusion_core.protocols.data import DataSource
from tinyfusion_core.protocols.loss import LossAdapter
from tinyfusion_core.registry.hooks import hookimpl
from tinyfusion_llm.backbone import CausalLM
from tinyfusion_llm.encoders.backbone import MaskedLM, TextEncoder
from tinyfusion_llm.encoders.losses import MaskedToken, SentenceEmbedding
from tinyfusion_llm.encoders.metrics import MaskedAccuracy, SimilarityRank
from tinyfusion_llm.encoders.text import EmbeddedText, PaddedText
from tinyfusion_llm.images.source import ImageText
from tinyfusion_llm.loss import NextToken
from tinyfusion_llm.metrics import Generation, LmEval, Perplexity
from tinyfusion_llm.text import TextTokens

__all__ = [
    "CausalLM",
    "EmbeddedText",
    "Generation",
    "ImageText",
    "LmEval",
    "MaskedAccuracy",
    "MaskedLM",
    "MaskedToken",
    "NextToken",
    "PaddedText",
    "Perplexity",
    "SentenceEmbedding",
    "SimilarityRank",
    "TextEncoder",
    "TextTokens",
]


@hookimpl
def tinyfusion_register_backbones() -> list[type[Backbone]]:
    """Any causal or masked language model, and encoders without a head."""
    return [CausalLM, MaskedLM, TextEncoder]


@hookimpl
def tinyfusion_register_losses() -> list[type[LossAdapter]]:
    """Next-token prediction, masked tokens, embeddings of texts."""
    return [NextToken, MaskedToken, SentenceEmbedding]


@hookimpl
def tinyfusion_register_data() -> list[type[DataSource]]:
    """Tokenized text, packed or for encoders, and images with text."""
    return [TextTokens, ImageText, PaddedText, EmbeddedText]


@hookimpl
def tinyfusion_register_metrics() -> list[type[Metric]]:
    """Perplexity, generation speed, lm-eval tasks, accuracy at masked tokens, ranks of similarities."""
    return [Perplexity, Generation, LmEval, MaskedAccuracy, SimilarityRank]
