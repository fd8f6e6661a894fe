"""Checkpoints of transformers: folders of diffusers, and single files in the names of their publishers."""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tinyfusion_core.errors import MissingFileError, UserError, first_line
from tinyfusion_core.parsing.records import read_json
from tinyfusion_core.parsing.weights import open_tensors, read_weights
from tinyfusion_diffusers.files.original import converted, converter
from tinyfusion_diffusers.files.quantised import dequantised
from tinyfusion_diffusers.structure import completed, construct, network_class

WEIGHTS = "diffusion_pytorch_model.safetensors"
SHIPPED = Path(__file__).parent.parent / "configs"
GGUF = ".gguf"
FILES = (".safetensors", GGUF, ".ckpt", ".pt", ".pth", ".bin", ".sft")
"""How files are called that hold weights; ids on the hub do not end like this."""


def network(path: Path) -> dict[str, Any]:
    """Read the config of a transformer.

    Raises:
        UserError: it is missing or no such config, or that of a network whose weights are quantised.
    """
    content = read_json(path)
    if not isinstance(content, dict) or "_class_name" not in content:
        raise UserError(f"{path}: names no _class_name; expected the config of a diffusers transformer")
    if quantised := content.get("quantization_config"):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise UserError(
            f"backbone.model: the weights beside {path} are quantised ({method or 'by a method that is not named'}); "
            "give those that they were made from, or a GGUF file; or load them with diffusers where their library "
            "runs, call `dequantize()`, and give the folder that `save_pretrained` writes"
        )
    return content


def shipped(model: str) -> dict[str, Any] | None:
    """Return the config of a hub model that comes with this package, for planning without a download."""
    path = SHIPPED / f"{model.replace('/', '--')}.json"
    return network(path) if path.is_file() else None


def check_agreement(planned: Mapping[str, Any], found: Mapping[str, Any], path: Path) -> None:
    """Check that a config is that of the published model.

    Raises:
        UserError: it is not.
    """
    wanted, there = completed(planned), completed(found)
    for key, value in wanted.items():
        if there.get(key) != value:
            raise UserError(
                f"{path}: {key} is {there.get(key)!r}; the published model's, which the recipe was planned with, is "
                f"{value!r}. Give the model another name than the published one's"
            )


def patterns(kind: str, variant: str | None) -> list[str]:
    """Return how a folder's weights are called, in one file or several."""
    stem, part, end = "diffusion_pytorch_model", "-?????-of-?????", f".{variant}" if variant else ""
    names = [f"{stem}{end}.{kind}", f"{stem}{end}{part}.{kind}"]
    return [*names, f"{stem}{part}{end}.{kind}"] if variant else names


def weights_in(folder: Path, variant: str | None) -> list[Path]:
    """Return the files of a folder's weights: safetensors, or else pickled ones.

    Raises:
        UserError: there are none, or only those of another variant.
    """
    for kind in ("safetensors", "bin"):
        if found := sorted({path for pattern in patterns(kind, variant) for path in folder.glob(pattern)}):
            return found
    there = sorted(path.name for path in folder.glob("diffusion_pytorch_model*.*") if path.suffix != ".json")
    if there:
        raise UserError(
            f"backbone.variant is {variant!r}, and {folder} holds {', '.join(there[:3])}; expected what stands there "
            "between diffusion_pytorch_model and the ending, such as fp16, or null if nothing does"
        )
    raise MissingFileError(f"{folder}: holds no {WEIGHTS}, nor parts of it, nor a .bin file of that name")


def saved_dtype(paths: Iterable[Path]) -> torch.dtype:
    """Return the dtype of most of the numbers in some files; float32 if they are pickled or quantised.

    Raises:
        UserError: one is damaged.
    """
    names = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    counts = Counter({torch.float32: 0})
    for path in paths:
        if path.suffix != ".safetensors":
            continue
        with open_tensors(path) as file:
            for name in file.keys():  # noqa: SIM118  # no mapping
                entry = file.get_slice(name)
                counts[names.get(entry.get_dtype(), torch.float32)] += math.prod(entry.get_shape())
    return counts.most_common(1)[0][0]


def dtype_of(paths: Sequence[Path], asked: str) -> torch.dtype:
    """Return the dtype that the weights in some files get.

    Args:
        paths: the files.
        asked: name of a dtype; `auto` is that of most of the numbers, float32 for pickled and quantised ones.

    Raises:
        UserError: one is damaged.
    """
    found: torch.dtype = saved_dtype(paths) if asked == "auto" else getattr(torch, asked)
    return found


def read_folder(folder: Path, config: Mapping[str, Any], dtype: str, variant: str | None) -> nn.Module:
    """Load a transformer from a folder of diffusers.

    Args:
        folder: the folder.
        config: what its config.json holds.
        dtype: name of a dtype, or `auto`.
        variant: of which weights, `fp16` for instance.

    Raises:
        UserError: the weights are missing or damaged, or do not fit the config.
    """
    with torch.device("meta"):
        cls: Any = type(construct(config))  # says what is wrong with the config before anything is read
    files = weights_in(folder, variant)
    try:
        with torch.random.fork_rng():
            model, loading = cls.from_pretrained(
                str(folder),
                torch_dtype=dtype_of(files, dtype),
                # The others are read as plain tensors, without running code.
                use_safetensors=files[0].suffix == ".safetensors",
                variant=variant,
                local_files_only=True,
                output_loading_info=True,
            )
    except UserError:
        raise
    except Exception as e:  # a damaged file makes the readers fail in any way they can
        raise UserError(f"{folder}: the transformer's weights cannot be read ({first_line(e)})") from None
    wrong = [str(key) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in loading[kind]]
    if wrong:
        raise UserError(f"{folder}: the weights do not fit the config: {', '.join(sorted(wrong)[:4])}")
    found: nn.Module = model
    return found


def check_kind(config: Mapping[str, Any]) -> None:
    """Check that single files of such networks are read at all.

    Raises:
        UserError: they are not.
    """
    if converter(cls := network_class(config)) is None:
        raise UserError(f"backbone.model: diffusers reads no single files of {cls.__name__}; give a folder")


def read_file(path: Path, config: Mapping[str, Any], dtype: str) -> nn.Module:
    """Load a transformer from a single file, in the names of its publisher or in those of diffusers.

    Args:
        path: the file: safetensors, GGUF, or of plain tensors in torch's format.
        config: the transformer's config.
        dtype: name of a dtype, or `auto`.

    Raises:
        UserError: the file is missing or damaged, or does not fit the config.
    """
    with torch.device("meta"):
        expected = construct(config)
    cls: Any = type(expected)
    kind = dtype_of([path], dtype)
    held = dequantised(path, kind) if path.suffix == GGUF else read_weights(path, containers=())
    tensors = converted(cls, held, config, expected, path)
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        (Path(folder) / "config.json").write_text(json.dumps(completed(config)))
        model: nn.Module = cls.from_single_file(
            tensors,
            config=folder,
            torch_dtype=kind,
            local_files_only=True,
        )
    return model
