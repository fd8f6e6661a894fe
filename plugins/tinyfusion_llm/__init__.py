"""Decoder-only language models of Hugging Face transformers, also of images: one backbone for all families."""

from __future__ import annotations

from tinyfusion_core.evaluation.metrics import Metric
from tinyfusion_core.protocols.backbone import Backbone
from tinyfusion_core.protocols.data import DataSource
from tinyfusion_core.protocols.loss import LossAdapter
from tinyfusion_core.registry.hooks import hookimpl
from tinyfusion_llm.backbone import CausalLM
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
    "EncoderDecoder",
    "Generation",
    "ImageText",
    "LmEval",
    "NextToken",
    "Perplexity",
    "SpeechText",
    "TextPairs",
    "TextTokens",
    "WordErrorRate",
]


@hookimpl
def tinyfusion_register_backbones() -> list[type[Backbone]]:
    """Any causal language model, any encoder-decoder."""
    return [CausalLM, EncoderDecoder]


@hookimpl
def tinyfusion_register_losses() -> list[type[LossAdapter]]:
    """Next-token prediction."""
    return [NextToken]


@hookimpl
def tinyfusion_register_data() -> list[type[DataSource]]:
    """Tokenized text, pairs of texts, and images and recordings with text."""
    return [TextTokens, TextPairs, ImageText, SpeechText]


@hookimpl
def tinyfusion_register_metrics() -> list[type[Metric]]:
    """Perplexity, generation speed, lm-eval tasks, words wrong in transcripts."""
    return [Perplexity, Generation, LmEval, WordErrorRate]
