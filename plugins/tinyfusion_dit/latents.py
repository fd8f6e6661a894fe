"""Data sets of latents: images encoded beforehand by the autoencoder in whose latent space the network works."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from typing_extensions import override

from tinyfusion_core.dataloading.shards import FORMAT_VERSION, METADATA, read_metadata
from tinyfusion_core.errors import MissingFileError, UserError, require
from tinyfusion_core.protocols.data import DataSource, Samples
from tinyfusion_dit.stores import Arrays, Files, Shards, Store, layout_of
from tinyfusion_images.encoding.autoencoder import check_autoencoder, decode, load_autoencoder

_NEEDED = ("features.npy", "labels.npy")
_STATED = ("vae", "scale", "kind")
"""Entries of metadata.json that the recipe may also state."""


@dataclass(frozen=True, kw_only=True)
class LatentSource(DataSource):
    """Latents of images, in whatever files.

    Args:
        vae: name of the autoencoder that the latents must come from; null accepts any.
        scale: factor that the latents must have been multiplied by (Stable Diffusion's: 0.18215); null accepts any.
        kind: "sample" or "moments"; null accepts either.
        num_held_out: number of images that are not trained on.
        decoder: the autoencoder that decodes latents to images: a folder, a checkpoint file or a name on the hub; null
            shows no images.
    """

    deviations = {"x": (0.4, 2.5)}  # scales are chosen to make it 1

    vae: str | None = None
    scale: float | None = None
    kind: Literal["sample", "moments"] | None = None
    num_held_out: int = 1000
    decoder: str | None = None

    @abstractmethod
    def _open(self) -> tuple[Store, dict[str, Any]]:
        """The files, and the content of their metadata.json."""

    @cached_property
    def _opened(self) -> tuple[Store, dict[str, Any]]:
        opened = self._open()  # listing the folders of a large data set takes minutes: once, not for every reader
        if self.decoder is not None:
            check_autoencoder(self.decoder)  # or else the last stage of a long run would be the first to miss it
        return opened

    @override
    def train(self) -> Samples:
        return self._split(held_out=False)

    @override
    def held_out(self) -> Samples:
        return self._split(held_out=True)

    @property
    def has_pixels(self) -> bool:
        """Whether there is a decoder."""
        return self.decoder is not None

    def pixels(self, x: Tensor) -> Tensor | None:
        """Decode latents by `decoder` on their device.

        Args:
            x: (batch, channels, height, width) latents.

        Returns:
            (batch, 3, image height, image width) in [0, 1]; None without a decoder.

        Raises:
            UserError: neither the recipe nor the latents' metadata give the scale.
        """
        if self.decoder is None:
            return None
        metadata = self._opened[1]
        scale = metadata.get("scale", self.scale)
        if scale is None:
            raise UserError("data.scale: neither the recipe nor metadata.json says it, and data.decoder needs it")
        mean, std = (x.new_tensor(metadata.get(key, [n])).view(-1, 1, 1) for key, n in (("mean", 0.0), ("std", 1.0)))
        return decode(self._decoder, x * std + mean * scale, scale, metadata.get("shift", 0.0))

    @cached_property
    def _decoder(self) -> nn.Module:
        assert self.decoder is not None
        return load_autoencoder(self.decoder)

    def _split(self, held_out: bool) -> Samples:
        store, metadata = self._opened
        for key in _STATED:
            stated, found = getattr(self, key), metadata.get(key)
            if None not in (stated, found) and stated != found:
                raise UserError(f"data.{key} is {stated!r} in the recipe, but the latents were made with {found!r}")
        if not 0 < self.num_held_out < store.num_images:
            raise UserError(f"data.num_held_out is {self.num_held_out}; expected 1 to {store.num_images - 1}")
        kind = self.kind or metadata.get("kind", "sample")
        if kind not in ("sample", "moments"):
            raise UserError(f"metadata.json: kind '{kind}' is unknown (known: sample, moments)")
        return store.split(self.num_held_out, kind == "moments", held_out)


@dataclass(frozen=True, kw_only=True)
class Latents(LatentSource):
    """Encoded images, in the shards that `tinyfusion encode` makes, or in a few large arrays.

    `metadata.json` describes the folder: `format_version` 1, `vae`, `scale`, `kind`, and for shards their names, rows
    and hashes. Arrays are `features.npy` (N, C, H, W), or (N, 2C, H, W) with means and then standard deviations;
    `labels.npy` (N,), integers; optionally `flipped.npy`, the mirrored images in the shape of `features.npy`. All
    latents are stored scaled.

    A sample is `x` (C, H, W), `y` and, with moments, `x_std` like `x`. The held-out images are the same for every seed
    and recipe, and no copy of them is trained on: in shards the first images, which are shuffled; in arrays a fixed
    random choice. Of n images in arrays sample n + i is the flipped sample i; in shards it follows its original.

    Args:
        folder: the folder; with shards it may be any URL that fsspec supports (s3://..., hf://..., https://...).
        mix: how many shards a batch is drawn from; a multiple of the number of processes gives each process shards of
            its own. Memory grows with it.
    """

    folder: str
    mix: int = 8

    def __post_init__(self) -> None:
        require(self.mix >= 1, "data.mix", self.mix, "at least 1")

    @override
    def _open(self) -> tuple[Store, dict[str, Any]]:
        try:
            metadata = read_metadata(self.folder)
        except MissingFileError:
            raise self._missing([METADATA]) from None
        for key in _STATED:
            if getattr(self, key) is not None and key not in metadata:
                raise UserError(
                    f"{self.folder}/{METADATA}: does not say '{key}', which the recipe states; add it, or set "
                    f"data.{key}: null"
                )
        if "shards" in metadata:
            return Shards(self.folder, metadata, self.mix), metadata
        if missing := [name for name in _NEEDED if not (Path(self.folder) / name).is_file()]:
            raise self._missing(missing)
        return Arrays(Path(self.folder)), metadata

    def _missing(self, names: Sequence[str]) -> MissingFileError:
        made = f"--vae {self.decoder or self.vae or 'AUTOENCODER'}"
        made += f" --name {self.vae}" if self.vae and self.decoder not in (None, self.vae) else ""
        made += f" --scale {self.scale}" if self.scale else ""
        stated = {"vae": self.vae, "scale": self.scale, "kind": self.kind or "sample"}
        if found := layout_of(Path(self.folder), "Latents"):
            return MissingFileError(f"data.folder: '{self.folder}' lacks {', '.join(names)}{found}")
        return MissingFileError(
            f"data.folder: '{self.folder}' lacks {', '.join(names)}. Put there the training images, encoded once: "
            f"`tinyfusion encode IMAGES --out {self.folder} {made} --kind {stated['kind']} --flip`; or features.npy "
            "(images, channels, height, width), labels.npy (images,), for mirrored images flipped.npy, and "
            f"{METADATA}: {json.dumps({'format_version': FORMAT_VERSION, **stated})}"
        )


@dataclass(frozen=True, kw_only=True)
class LatentFolders(LatentSource):
    """Encoded images in one file each, as the feature extraction of TinyFusion writes them.

    A file of the features is (C, H, W), or (2, C, H, W) with the mirrored image second. Labels are in files of
    the same names. Samples and options are those of `Latents`; `metadata.json` (in `features`) may be missing:
    then the recipe is trusted, and the latents are samples unless it says otherwise.

    Args:
        features: folder of the latents.
        labels: folder of the labels.
    """

    features: str
    labels: str

    @override
    def _open(self) -> tuple[Store, dict[str, Any]]:
        described = (Path(self.features) / METADATA).exists()
        return Files(Path(self.features), Path(self.labels)), read_metadata(self.features) if described else {}
