"""All mutations of the engine."""

from __future__ import annotations

from mutations import of_decisions, of_embedding, of_masks, of_prefixes, of_races, of_recoveries, of_training

TABLES = (of_masks, of_prefixes, of_decisions, of_races, of_recoveries, of_training, of_embedding)
MUTATIONS = [m for table in TABLES for m in table.MUTATIONS]
