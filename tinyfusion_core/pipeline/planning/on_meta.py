"""The network of a backbone without its memory."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ...errors import UserError
from ...protocols.backbone import Backbone, constructed, owner

MAX_DEPTH = 1000
"""Blocks that a network can have; the deepest that were published have as many layers."""


def build_on_meta(backbone: Backbone) -> nn.Module:
    """Build the network of a backbone on the meta device, where it takes no memory.

    Raises:
        UserError: the sizes in its config make no network.
    """
    config, whose = backbone.config(), backbone.origin or owner(backbone)
    for key, value in _numbers(config, ""):
        if re.search(r"(?:^|_)(?:depth|layers|blocks)(?:_|$)", key.rpartition(".")[2]) and value > MAX_DEPTH:
            raise UserError(f"{whose}: {key} is {value:,}; expected at most {MAX_DEPTH:,}")
    with torch.device("meta"):
        return constructed(backbone, config, whose)


def _numbers(config: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, int]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int) and not isinstance(value, bool):
            yield f"{prefix}{key}", value
