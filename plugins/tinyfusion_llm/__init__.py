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
from tinyfusion_llm.seq2seq.backbone import EncoderDecoder
from tinyfusion_llm.seq2seq.pairs import TextPairs
from tinyfusion_llm.speech.source import SpeechText
from tinyfusion_llm.speech.words import WordErrorRate
from tinyfusion_llm.text import TextTokens

__all__ = [
    "CausalLM",
    "EmbeddedText",
    "EncoderDecoder",
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
    "SpeechText",
    "TextEncoder",
    "TextPairs",
    "TextTokens",
    "WordErrorRate",
]


@hookimpl
def tinyfusion_register_backbones() -> list[type[Backbone]]:
    """Any causal or masked language model, any encoder-decoder, and encoders without a head."""
    return [CausalLM, EncoderDecoder, MaskedLM, TextEncoder]


@hookimpl
def tinyfusion_register_losses() -> list[type[LossAdapter]]:
    """Next-token prediction, masked tokens, embeddings of texts."""
    return [NextToken, MaskedToken, SentenceEmbedding]


@hookimpl
def tinyfusion_register_data() -> list[type[DataSource]]:
    """Tokenized text, packed or for encoders, pairs of texts, and images and recordings with text."""
    return [TextTokens, TextPairs, ImageText, SpeechText, PaddedText, EmbeddedText]


@hookimpl
def tinyfusion_register_metrics() -> list[type[Metric]]:
    """What is measured of language models, of transcripts and of encoders."""
    return [Perplexity, Generation, LmEval, WordErrorRate, MaskedAccuracy, SimilarityRank]
