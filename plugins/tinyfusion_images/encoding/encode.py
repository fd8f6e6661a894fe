"""Encodes a folder of images to shards of latents, with any number of processes; it can be interrupted and resumed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tinyfusion_core.dataloading.shards import (
    FORMAT_VERSION,
    METADATA,
    read_metadata,
    read_shard,
    shards_in,
    write_shard,
)
from tinyfusion_core.errors import Interrupted, UserError, require
from tinyfusion_core.parsing.settings import Settings
from tinyfusion_core.runtime.distributed import all_gather_object, on_main_process, rank_and_world_size
from tinyfusion_core.runtime.files import digest, write_json
from tinyfusion_core.runtime.locking import check_free, owned
from tinyfusion_core.runtime.progress import track
from tinyfusion_core.runtime.seeding import generator
from tinyfusion_core.runtime.signals import stop_requests
from tinyfusion_images.encoding.autoencoder import fingerprint
from tinyfusion_images.encoding.crops import Crops, ImageFolder, list_images
from tinyfusion_images.encoding.encoder import ImageEncoder
from tinyfusion_images.encoding.latents_folder import LATENTS, Record


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
        from accelerate import PartialState
        from accelerate.utils import parse_flag_from_env

        # Without being told, accelerate makes no group of processes that have no GPU: each would think itself alone.
        cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
        return _Encoding(self, list_images(images), out, PartialState(cpu).device).run()


@dataclass(frozen=True)
class _Part:
    """The images of one shard, by index."""

    name: str
    images: list[int]


@dataclass
class _Encoding:
    """One call of `Encode`."""

    how: Encode
    folder: ImageFolder
    out: Path
    device: torch.device

    def run(self) -> dict[str, Any]:
        """See `Encode`."""
        if len(set(all_gather_object(digest(self._settings)))) > 1:
            raise UserError(
                "encode: processes see different images, or use different autoencoders; compare their disks"
            )
        with ExitStack() as stack:
            on_main_process(lambda: self._take(stack))
            return self._make()

    def _take(self, stack: ExitStack) -> None:
        """Reserve the folder for these latents, until the stack closes."""
        self._check()
        stack.enter_context(owned(self.out, LATENTS))
        if not (self.out / METADATA).exists():
            write_json(self.out / METADATA, {**self._settings, "shards": []})

    def _make(self) -> dict[str, Any]:
        """Make the missing shards of this process. Returns the metadata of all shards."""
        index, processes = rank_and_world_size()
        mine = self._parts[index::processes]
        finished = {part.name: found for part in mine if isinstance(found := self._verified(part), Record)}
        missing = [part for part in mine if part.name not in finished]
        self._encode(missing)
        for part in missing:
            found = self._verified(part)
            if not isinstance(found, Record):
                raise UserError(
                    f"{self.out / part.name}: not what was written a moment ago: {found}. Is the disk sound?"
                )
            finished[part.name] = found
        # One that fails does not wait here for the others, whose shares may take hours: torchrun ends them.
        records = sorted(chain(*all_gather_object(list(finished.values()))), key=lambda record: record.shard.name)
        content = {
            **self._settings,
            "num_images": sum(r.shard.count for r in records) // self._encoder.copies,
            "skipped": sorted({name for r in records for name in r.skipped}),
            "shards": [asdict(r.shard) for r in records],
        }
        on_main_process(lambda: self._finish(content))
        return content

    def _finish(self, content: dict[str, Any]) -> None:
        write_json(self.out / METADATA, content)
        for part in self._parts:
            self._record_path(part).unlink(missing_ok=True)

    def _check(self) -> None:
        """Raise UserError if the folder holds other files, or other latents than these."""
        levels = self._encoder.autoencoder.config.get("block_out_channels", (1,))  # type: ignore[operator, union-attr]
        least = 2 ** (len(levels) - 1)
        require(self.how.size >= least, "encode: size", self.how.size, f"at least {least} pixels, one latent")
        check_free(self.out, LATENTS)
        if not (self.out / METADATA).exists():
            return
        before = read_metadata(str(self.out))
        changed = [key for key, value in self._settings.items() if before.get(key) != value]
        if changed:
            what = "; ".join(f"{key}: {before.get(key)!r}, now {self._settings[key]!r}"[:200] for key in changed)
            raise UserError(f"{self.out}: holds latents that were made otherwise ({what}); choose another folder")

    @cached_property
    def _encoder(self) -> ImageEncoder:
        how = self.how
        return ImageEncoder(how.vae, how.scale, how.kind, how.dtype, how.flip, how.seed, self.device)

    @cached_property
    def _settings(self) -> dict[str, Any]:
        """Everything that the latents depend on, as in metadata.json."""
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
    def _parts(self) -> list[_Part]:
        num = len(self.folder.files)
        order = torch.randperm(num, generator=generator("encode", self.how.seed, "order", num))
        parts = [order[i : i + self.how.shard_size].tolist() for i in range(0, num, self.how.shard_size)]
        return [_Part(f"{i:05d}-of-{len(parts):05d}.safetensors", part) for i, part in enumerate(parts)]

    def _encode(self, parts: Sequence[_Part]) -> None:
        """Make these shards."""
        how = self.how
        starts = range(0, how.shard_size, how.batch_size)
        batches = [some for part in parts for i in starts if (some := part.images[i : i + how.batch_size])]
        loader: DataLoader[Any] = DataLoader(
            Crops(self.folder, how.size),  # type: ignore[arg-type]  # read by lists of indices
            batch_sampler=batches,
            collate_fn=tuple,
            num_workers=how.num_workers,
            generator=torch.Generator(),
        )
        total = sum(len(part.images) for part in parts)
        with stop_requests() as stop, track("encode", total, main=rank_and_world_size()[0] == 0) as progress:
            read = zip(batches, loader, strict=True)
            for number, part in enumerate(parts):
                made: list[dict[str, Tensor]] = []
                left_out: list[int] = []
                for _ in range(0, len(part.images), how.batch_size):
                    indices, (crops, bad) = next(read)
                    left_out += (unreadable := self._left_out(bad))
                    if len(crops):
                        good = [i for i in indices if i not in unreadable]
                        made.append(self._encoder.rows(good, crops, [self.folder.labels[i] for i in good]))
                    progress.advance(len(indices))
                    if stop:
                        raise Interrupted(f"stopped after {number} of {len(parts)} shards", stop[0])
                self._write(part, made, left_out)

    def _left_out(self, bad: Sequence[tuple[int, str]]) -> list[int]:
        """Indices of the images that cannot be read. Raises UserError unless `skip_bad` is set."""
        if bad and not self.how.skip_bad:
            raise UserError(f"{bad[0][1]}. Mend or remove it, or leave such images out with --skip-bad")
        return [index for index, _ in bad]

    def _write(self, part: _Part, made: Sequence[dict[str, Tensor]], left_out: Sequence[int]) -> None:
        """Write a shard and its record."""
        if not made:
            raise UserError(f"{self.folder.root}: none of the {len(left_out)} images of a shard can be read")
        shard = write_shard(self.out, part.name, {name: torch.cat([rows[name] for rows in made]) for name in made[0]})
        skipped = [self.folder.files[i] for i in left_out]
        write_json(self._record_path(part), {**asdict(shard), "skipped": skipped})

    def _verified(self, part: _Part) -> Record | str:
        """The record of a shard whose file is correct; else what is wrong."""
        record = self._known.get(part.name)
        if record is None and self._record_path(part).exists():
            record = Record.read(self._record_path(part))
        if record is None:
            return "nothing is known of it"
        try:
            tensors = read_shard(str(self.out), record.shard)
        except UserError as e:
            return str(e)
        labels = [self.folder.labels[i] for i in part.images if self.folder.files[i] not in record.skipped]
        expected = torch.tensor(labels, dtype=torch.int64).repeat_interleave(self._encoder.copies)
        if not torch.equal(tensors["y"], expected):
            return "its labels are not those of its images"
        if any(not torch.isfinite(tensor).all() for tensor in tensors.values()):
            return f"latents that are not finite; does {self.how.dtype} hold them?"
        return record

    @cached_property
    def _known(self) -> dict[str, Record]:
        """The shards listed by a finished encoding."""
        found = read_metadata(str(self.out))
        shards = shards_in(found, str(self.out)) if found.get("shards") else []
        return {shard.name: Record(shard, found.get("skipped", [])) for shard in shards}

    def _record_path(self, part: _Part) -> Path:
        """Where a finished shard's hash is kept until all are finished."""
        return (self.out / part.name).with_suffix(".json")
