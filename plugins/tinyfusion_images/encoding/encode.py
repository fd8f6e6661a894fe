"""Encodes a folder of images to shards of latents, with any number of processes; it can be interrupted and resumed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from tinyfusion_core.dataloading.encoding import DTYPES, Encoding, Record
from tinyfusion_core.dataloading.shards import FORMAT_VERSION
from tinyfusion_core.errors import MissingFileError, UserError, require
from tinyfusion_core.parsing.records import read_text
from tinyfusion_core.parsing.settings import Settings
from tinyfusion_core.parsing.weights import fingerprint
from tinyfusion_core.runtime.distributed import device_of_this_process
from tinyfusion_core.runtime.files import digest, write_text
from tinyfusion_core.runtime.seeding import generator
from tinyfusion_images.encoding.crops import Crops, ImageFolder, list_images
from tinyfusion_images.encoding.encoder import ImageEncoder
from tinyfusion_images.encoding.latents_folder import CAPTIONS, LATENTS


@dataclass(frozen=True, kw_only=True)
class Encode(Settings):
    """Encode a folder of images to latents, in shuffled shards that the data source `Latents` reads.

    The folder has one folder for each class; sorted by name they are labels 0, 1, ... Images are cropped as ADM does.
    A shard has tensors `x` (rows, C, h, w), scaled, with moments also `x_std` (rows, C, h, w), and `y` (rows,). With
    `flip` each image is followed by its mirrored copy. Images are dealt to shards in an order drawn from the seed.

    With several processes each makes its share of the shards. Finished shards are verified, and not made again.

    Args:
        vae: the autoencoder: a folder, a checkpoint file, or a name on the hub; see `load_autoencoder`.
        name: its name in metadata.json and in recipes; by default `vae`.
        scale: factor on the latents; by default that of the autoencoder's config.
        kind: "sample" stores a draw from each posterior; "moments" its mean and deviation, to draw from in training.
        size: side of the cropped images in pixels.
        flip: whether to encode the mirrored image too.
        dtype: dtype of the latents in the files.
        shard_size: images per shard.
        batch_size: images per batch; affects results by rounding only.
        num_workers: processes that read images, per process that encodes; 0 reads in the process itself.
        seed: seed of the order of the images and of the draws.
        skip_bad: leave out images that cannot be read, and list them in metadata.json, instead of stopping.
        captions: list the captions, text files beside the images, in `captions.jsonl` in the order of the latents.
    """

    vae: str
    name: str | None = None
    scale: float | None = None
    kind: Literal["sample", "moments"] = "sample"
    size: int = 256
    flip: bool = False
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    shard_size: int = 512
    batch_size: int = 16
    num_workers: int = 0
    seed: int = 0
    skip_bad: bool = False
    captions: bool = False

    def __post_init__(self) -> None:
        for name in ("size", "shard_size", "batch_size"):
            require(getattr(self, name) >= 1, f"encode: {name}", getattr(self, name), "at least 1")
        require(self.num_workers >= 0, "encode: num_workers", self.num_workers, "0 or more")

    def __call__(self, images: Path, out: Path) -> dict[str, Any]:
        """Encode the images that are not encoded yet.

        Args:
            images: the folder of images.
            out: the folder of the latents.

        Returns:
            The content of `out/metadata.json`.

        Raises:
            UserError: an image cannot be read, the folder is in use or holds other latents, or a written shard is
                damaged.
            Interrupted: a signal arrived; finished shards are kept.
        """
        sizes = self.shard_size, self.batch_size
        return _Encoding(out, *sizes, self, list_images(images), device_of_this_process()).run()


@dataclass
class _Encoding(Encoding):
    """One call of `Encode`."""

    command = "encode"
    kind = LATENTS

    how: Encode
    folder: ImageFolder
    device: torch.device

    @override
    def run(self) -> dict[str, Any]:
        least = self._stride
        require(self.how.size >= least, "encode: size", self.how.size, f"at least {least} pixels, one latent")
        if self.how.captions:
            for file in self.folder.files:
                if not (text := self._caption(file)).is_file():
                    raise MissingFileError(f"{text}: no such file; --captions needs one beside every image")
        return super().run()

    @cached_property
    @override
    def settings(self) -> dict[str, Any]:
        how, (scale, shift) = self.how, self._encoder.scaling
        return {
            "format_version": FORMAT_VERSION,
            "vae": how.name or how.vae,
            "vae_sha256": fingerprint(self._encoder.autoencoder),
            "scale": scale,
            "shift": shift,
            "kind": how.kind,
            "size": how.size,
            "crop": "centre, as ADM",
            "flips": how.flip,
            "dtype": how.dtype,
            "seed": how.seed,
            "shard_size": how.shard_size,
            "source": {"images": len(self.folder.files), "names_sha256": digest(self.folder.files)},
            "classes": self.folder.classes,
        }

    @cached_property
    @override
    def order(self) -> list[int]:
        num = len(self.folder.files)
        drawn: list[int] = torch.randperm(num, generator=generator("encode", self.how.seed, "order", num)).tolist()
        return drawn

    @override
    def bytes_per_example(self) -> int:
        numbers = self._config["latent_channels"] * (self.how.size // self._stride) ** 2
        tensors = self._encoder.copies * (2 if self.how.kind == "moments" else 1)
        return int(numbers) * tensors * DTYPES[self.how.dtype].itemsize

    @override
    def encode(self, batches: Sequence[list[int]]) -> Iterator[tuple[dict[str, Tensor], list[str]]]:
        loader: DataLoader[Any] = DataLoader(
            Crops(self.folder, self.how.size),  # type: ignore[arg-type]  # read by lists of indices
            batch_sampler=batches,
            collate_fn=tuple,
            num_workers=self.how.num_workers,
            generator=torch.Generator(),
        )
        for indices, (crops, bad) in zip(batches, loader, strict=True):
            if bad and not self.how.skip_bad:
                raise UserError(f"{bad[0][1]}. Mend or remove it, or leave such images out with --skip-bad")
            unreadable = [index for index, _ in bad]
            good = [i for i in indices if i not in unreadable]
            labels = [self.folder.labels[i] for i in good]
            rows = self._encoder.rows(good, crops, labels) if good else {}
            yield rows, [self.folder.files[i] for i in unreadable]

    @override
    def fault(self, items: Sequence[int], skipped: Sequence[str], tensors: Mapping[str, Tensor]) -> str:
        labels = [self.folder.labels[i] for i in items if self.folder.files[i] not in skipped]
        expected = torch.tensor(labels, dtype=torch.int64).repeat_interleave(self._encoder.copies)
        return "" if torch.equal(tensors["y"], expected) else "its labels are not those of its images"

    @override
    def summary(self, records: Sequence[Record]) -> dict[str, Any]:
        return {
            "num_images": sum(r.shard.count for r in records) // self._encoder.copies,
            "skipped": sorted({name for r in records for name in r.skipped}),
        }

    @override
    def finish(self, records: Sequence[Record]) -> None:
        if not self.how.captions:
            return
        skipped = {name for record in records for name in record.skipped}
        files = [file for i in self.order if (file := self.folder.files[i]) not in skipped]
        # One line for each image: whoever reads the latents knows that the mirrored copy has the same caption.
        lines = (json.dumps({"image": f, "caption": " ".join(read_text(self._caption(f)).split())}) for f in files)
        write_text(self.out / CAPTIONS, "".join(f"{line}\n" for line in lines))

    def _caption(self, file: str) -> Path:
        """The text file beside an image."""
        return (self.folder.root / file).with_suffix(".txt")

    @cached_property
    def _encoder(self) -> ImageEncoder:
        how = self.how
        return ImageEncoder(how.vae, how.scale, how.kind, how.dtype, how.flip, how.seed, self.device)

    @property
    def _config(self) -> Mapping[str, Any]:
        config: Mapping[str, Any] = self._encoder.autoencoder.config  # type: ignore[assignment]
        return config

    @property
    def _stride(self) -> int:
        """Pixels per position of the latents, along each side."""
        return int(2 ** (len(self._config["block_out_channels"]) - 1))
