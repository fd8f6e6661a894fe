"""How a folder of latents is told from other folders."""

from __future__ import annotations

import re
from pathlib import Path

from tinyfusion_core.dataloading.shards import METADATA, read_metadata
from tinyfusion_core.runtime.locking import FolderKind


def _is_ours(out: Path) -> bool:
    """Whether a folder has the metadata of latents. Raises UserError if they are of another format."""
    return (out / METADATA).exists() and "vae_sha256" in read_metadata(str(out))


def _writes(out: Path, path: Path) -> bool:
    """Whether an encoding writes this file, given relative to its folder."""
    return str(path) == METADATA or re.fullmatch(r"\d+-of-\d+\.(safetensors|json)", str(path)) is not None


LATENTS = FolderKind("latents", "--out", _is_ours, _writes)
