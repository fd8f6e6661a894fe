"""How a folder of latents is told from other folders."""

from __future__ import annotations

from tinyfusion_core.dataloading.encoding import folder_kind

CAPTIONS = "captions.jsonl"
LATENTS = folder_kind("latents", "vae_sha256", CAPTIONS)
"""`tinyfusion encode`."""
