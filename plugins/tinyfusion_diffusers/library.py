"""Imports diffusers, which may not be installed."""

from __future__ import annotations

import importlib
from typing import Any

from tinyfusion_core.errors import UserError


def diffusers() -> Any:
    """Return the library.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module("diffusers")
    except ImportError as e:
        raise UserError(
            f"backbone: DiffusersTransformer needs diffusers ({e}); pip install 'diffusers>=0.36'"
        ) from None
