"""Imports diffusers, which may not be installed."""

from __future__ import annotations

from typing import Any

from tinyfusion_core.errors import need


def diffusers(key: str = "backbone: DiffusersTransformer") -> Any:
    """Return the library; `key` is what needs it.

    Raises:
        UserError: it is not installed.
    """
    return need("diffusers", "tinyfusion[diffusers]", key)
