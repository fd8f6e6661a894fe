"""What becomes of settings that say something of each layer, or name some, when layers go."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tinyfusion_llm.layers.building import Settings

_NO_LAYERS = r"token_ids?$|^architectures$|label"
_INDICES = r"layer|idx|indices"


def edits(config: Settings, depth: int, kept: Sequence[int]) -> dict[str, Any]:
    """New values for everything in a config that has an entry per layer, or names layers by index."""
    values = {key: value for key, value in config.items() if not re.search(_NO_LAYERS, key)}
    found = {key: _edited(key, value, depth, kept) for key, value in values.items()}
    changed = {key: value for key, value in found.items() if value is not None}
    if (step := config.get("decoder_sparse_step", 1)) > 1 and (dense := config.get("mlp_only_layers")) is not None:
        # A rule that counts, beside a list of exceptions from it, which can say all.
        changed["decoder_sparse_step"] = 1
        changed["mlp_only_layers"] = [j for j, i in enumerate(kept) if i in dense or (i + 1) % step]
    if "attention_types" in config and "attention_layers" in changed:  # GPT-Neo makes the second of the first
        changed["attention_types"] = [[changed["attention_layers"], 1]]
    return changed


def _edited(key: str, value: Any, depth: int, kept: Sequence[int]) -> Any:
    """What a setting becomes that says something of each layer, or names some; None if it does not."""
    if isinstance(value, Mapping):
        return _renumbered(value, depth, kept)
    if not isinstance(value, (list, tuple)) or not value:
        return None
    indices = _are_indices(value, depth)
    if len(value) == depth and not (indices and depth > 2):
        return type(value)(value[i] for i in kept)
    if indices and re.search(_INDICES, key):
        return type(value)(j for j, i in enumerate(kept) if i in value)
    return None


def _renumbered(table: Mapping[Any, Any], depth: int, kept: Sequence[int]) -> dict[int, Any] | None:
    """A table by layer for those that are kept; None if it is none."""
    if not table or not all(str(name).isdecimal() and int(name) < depth for name in table):
        return None
    by_index = {int(name): entry for name, entry in table.items()}
    return {j: by_index[i] for j, i in enumerate(kept) if i in by_index}


def _are_indices(value: Sequence[Any], depth: int) -> bool:
    return all(map(is_int, value)) and sorted(set(value)) == list(value) and 0 <= value[0] <= value[-1] < depth


def is_int(value: object) -> bool:
    """Return whether a setting is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)
