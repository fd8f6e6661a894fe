"""Images of a run's network: one grid, or many thousands for an external evaluation."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from torch import Tensor, nn

from tinyfusion_core.errors import UserError, require
from tinyfusion_core.evaluation.cached_sampling import CachedSampling
from tinyfusion_core.evaluation.caching import Reusing, profiled
from tinyfusion_core.parsing.records import read_json, shaped
from tinyfusion_core.parsing.weights import read_weights
from tinyfusion_core.pipeline.recipe import load_recipe
from tinyfusion_core.pipeline.tasks import make_task
from tinyfusion_core.protocols.task import Task
from tinyfusion_core.pruning.prune import load_pretrained, origin
from tinyfusion_core.pruning.record import decision_of
from tinyfusion_core.runtime.distributed import batches, complete_sharded, on_main_process
from tinyfusion_core.runtime.files import digest, save_tensors, write_json
from tinyfusion_core.runtime.locking import FolderKind, check_replaceable, owned, remove_partial
from tinyfusion_core.runtime.run_folder import RunFolder
from tinyfusion_core.training.trainer import Trainer
from tinyfusion_images.grids.drawing import draw_grid, is_grid
from tinyfusion_images.image_sets import rgb, write_archive, write_png
from tinyfusion_images.pictures import artist, asked_for, by_label, can_draw, gallery, published_by

FORMAT_VERSION = 1


class _Made(TypedDict):
    """What is known of samples; how many there are once they are finished."""

    made_with: dict[str, Any]
    num: NotRequired[int]


def sample_images(folder: RunFolder, num: int, seed: int, out: Path | None = None, cache: float = 0) -> Path:
    """Generate a grid of images with a run's student, or with its teacher if nothing was pruned.

    Args:
        folder: a run that has finished its training.
        num: how many images.
        seed: seed of the noise.
        out: the PNG file; default `figures/student.png` in the run folder.
        cache: threshold up to which blocks reuse their changes, see `CachedSampling`; 0 computes all.

    Returns:
        The path of the file.

    Raises:
        UserError: no network has been saved there yet, its data cannot be shown, or `out` is a file of the user's.
    """
    if num < 1 or (out is not None and out.suffix != ".png"):
        raise UserError("expected --num of at least 1 and an --out that ends in .png")
    if out is not None:
        check_replaceable(out, "--out", is_grid)
    task, model, trainer, made_with = _open(folder, seed, cache)
    out = out or folder / "figures" / f"{made_with['name']}.png"
    images, labels = gallery(task, model, trainer, artist(task, trainer), num, 250, "samples")
    if trainer.accelerator.is_main_process:
        draw_grid(by_label(images, labels), out, columns=math.ceil(math.sqrt(num)))
    return out


def write_samples(folder: RunFolder, num: int, seed: int, to: Path, batch_size: int = 64, cache: float = 0) -> Path:
    """Generate many images with a run's student, with balanced labels, as PNG files or as one archive.

    Image i depends only on the seed and i: any number of processes makes the same set. Existing images are not
    made again, so the same call resumes after an interruption, and a larger `num` adds to a folder.

    Args:
        folder: a run that has finished its training.
        num: how many images.
        seed: seed of the noise.
        to: a folder, which gets `000000.png` and so on, and `samples.json` with their labels and how they were made;
            or a file that ends in .npz, in the layout of ADM: `arr_0` uint8 (N, H, W, 3), `arr_1` labels.
        batch_size: images per batch.
        cache: as in `sample_images`.

    Returns:
        The folder or file.

    Raises:
        UserError: no network has been saved there yet, its data cannot be shown, or there are other samples already.
    """
    require(num >= 1, "--num", num, "at least 1")
    require(batch_size >= 1, "--batch-size", batch_size, "at least 1")
    task, model, trainer, made_with = _open(folder, seed, cache)
    archive = to.suffix == ".npz"
    record = to.with_name(f"{to.name}.json") if archive else to / "samples.json"

    draw = artist(task, trainer)

    def images(rows: range) -> Tensor:
        return draw(model, rows, asked_for(task, model, rows))[0]

    def take() -> int | None:
        before = _check(record, to, made_with, num)
        stack.enter_context(owned(_parts(to) if archive else to, _kind(record)))
        if before is None:
            write_json(record, {"made_with": made_with})
        remove_partial(to)
        return None if before is None else before.get("num")

    def finish() -> None:
        write_json(record, {"made_with": made_with, "num": num, "labels": labels.tolist()})
        if archive:
            shutil.rmtree(_parts(to), ignore_errors=True)

    parts, labels = batches(num, batch_size), asked_for(task, model, range(num))
    with ExitStack() as stack:
        before = on_main_process(take)
        if not archive:
            _write_folder(to, parts, images, trainer.progress)
        elif not to.exists() or before != num:
            _write_archive(to, parts, images, labels, trainer.progress)
        on_main_process(finish)
    return to


def _kind(record: Path) -> FolderKind:
    """The folder of samples, or of the parts of an archive, that belongs to a record."""

    def writes(folder: Path, path: Path) -> bool:
        return re.fullmatch(r"samples\.json|\d+\.png|\d+-\d+\.safetensors", str(path)) is not None

    return FolderKind("samples", "--to", lambda folder: _is_record(record), writes)


def _is_record(path: Path) -> bool:
    """Whether a file, if there is one, is the record of samples."""
    content = read_json(path) if path.exists() else None
    return isinstance(content, dict) and "made_with" in content


def _open(folder: RunFolder, seed: int, cache: float) -> tuple[Task, nn.Module, Trainer, dict[str, Any]]:
    """The network of a finished run, its task and trainer, and everything that decides the samples."""
    require(0 <= cache < math.inf, "--cache", cache, "a threshold, 0 or more")
    recipe = load_recipe(folder / "recipe.yaml")
    rounds = list(recipe.each_round())
    name = "student" if rounds else "teacher"
    run, folder = folder, folder.round(rounds[-1]) if rounds else folder
    if not (folder / name / "config.json").exists():
        raise UserError(f"{folder.path}: no {name} yet; let the run finish first")
    for made in rounds:
        decision_of(run, made)
    model = load_pretrained(folder / name)
    task = make_task(recipe, model)
    if not can_draw(task):
        raise UserError(
            f"data: {type(recipe.data).__name__} cannot show its examples as images, and {type(recipe.loss).__name__} "
            "makes none by a pipeline"
        )
    trainer = replace(recipe.trainer, seed=seed)
    made_with = {
        "format_version": FORMAT_VERSION,
        "name": name,
        "sha256": origin(folder / name)["sha256"],
        "loss": recipe.settings["loss"],
        "data": recipe.settings["data"],  # it may hold a decoder
        "precision": trainer.accelerator.mixed_precision,
        "seed": seed,
    }
    model = model.to(trainer.accelerator.device)
    if (pipeline := published_by(recipe.loss)) is not None:
        recipe.loss.check_sampling(recipe.backbone)
        made_with["prompts"] = digest(list(pipeline.texts))
    if cache:
        if pipeline is not None:
            raise UserError("--cache: a published pipeline samples by itself, without schedules; leave one of them out")
        made_with["cache"] = cache
        how = CachedSampling()
        # As in the run's report, whatever the seed of the samples is.
        profile = profiled(task, model, recipe.trainer, how.calibration, how.longest)
        task = replace(task, loss=Reusing(task.loss, task.backbone, {model: profile.schedule(cache)}))
    return task, model, trainer, made_with


def _check(record: Path, to: Path, made_with: dict[str, Any], num: int) -> _Made | None:
    """Check that the output is free for these samples. Returns what is known of those that are there.

    Raises:
        UserError: there are other samples, other files, or single images beyond that number.
    """
    check_replaceable(record, "--to", _is_record)
    if not record.exists():
        if to.suffix == ".npz":
            check_replaceable(to, "--to", lambda file: False)
        return None
    before = shaped(read_json(record), _Made, record, "choose another name")
    if before["made_with"] != made_with:
        both = {**before["made_with"], **made_with}
        other = [key for key in both if before["made_with"].get(key) != made_with.get(key)]
        raise UserError(f"--to: '{to}' has samples made with another {', '.join(other)}; choose another name")
    there = 1 + max((int(p.stem) for p in to.glob("*.png") if p.stem.isdecimal()), default=-1)
    if to.is_file():  # a whole archive
        there = before.get("num", 0)
    if there > num:
        raise UserError(f"--num: {num}, but '{to}' has {there} samples; ask for as many, or choose another name")
    return before


def _parts(to: Path) -> Path:
    """Folder of an archive's parts until it is complete."""
    return to.with_name(f"{to.name}.parts")


def _write_folder(folder: Path, parts: Sequence[range], images: Callable[[range], Tensor], screen: bool) -> None:
    def path(i: int) -> Path:
        return folder / f"{i:06d}.png"

    def work(rows: range) -> None:
        for i, image in zip(rows, images(rows), strict=True):
            write_png(path(i), image)

    complete_sharded(parts, lambda rows: all(path(i).exists() for i in rows), work, "samples", screen)


def _write_archive(
    to: Path, parts: Sequence[range], images: Callable[[range], Tensor], labels: Tensor, screen: bool
) -> None:
    def path(rows: range) -> Path:
        return _parts(to) / f"{rows.start:08d}-{rows.stop:08d}.safetensors"

    def work(rows: range) -> None:
        save_tensors(path(rows), {"images": rgb(images(rows))})

    complete_sharded(parts, lambda rows: path(rows).exists(), work, "samples", screen)
    on_main_process(lambda: write_archive(to, (read_weights(path(rows))["images"] for rows in parts), labels))
