"""All mutations of the engine."""

from __future__ import annotations

from mutations import of_decisions, of_masks, of_prefixes, of_training

MUTATIONS = [*of_masks.MUTATIONS, *of_prefixes.MUTATIONS, *of_decisions.MUTATIONS, *of_training.MUTATIONS]
