"""All mutations of the engine."""

from __future__ import annotations

from mutations import of_decisions, of_masks, of_prefixes, of_races, of_training

MUTATIONS = [m for table in (of_masks, of_prefixes, of_decisions, of_races, of_training) for m in table.MUTATIONS]
