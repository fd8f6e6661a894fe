"""Weights of GGUF files: read as the plain numbers that they stand for."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinyfusion_core.errors import UserError, first_line, need
from tinyfusion_core.parsing.records import check_regular
from tinyfusion_core.pipeline.planning.amounts import gigabytes

SHAPE = "comfy.gguf.orig_shape."
"""Entry of a file that says the shape of a tensor which the format, of four dimensions at most, cannot have."""


def dequantised(path: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the weights of a GGUF file by the names that it has: tensors of any shape.

    Each is computed in float32, as gguf does, and then rounded to `dtype`.

    Raises:
        UserError: the file is missing or damaged, or has numbers of a kind that gguf cannot dequantise.
    """
    gguf, reader = _opened(path)
    found = {}
    for tensor in reader.tensors:
        numbers = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        told = reader.fields.get(f"{SHAPE}{tensor.name}")
        shape = numbers.shape if told is None else tuple(int(n) for n in told.contents())
        if math.prod(shape) != numbers.size:
            raise UserError(f"{path}: damaged: {tensor.name} is said to be {list(shape)}. Copy or download it again")
        found[tensor.name] = torch.from_numpy(np.array(numbers)).reshape(shape).to(dtype)
    return found


def encoding_of(path: Path, dtype: torch.dtype) -> str:
    """Say how the weights in a GGUF file are quantised, and how large they get; numbers are not read.

    Raises:
        UserError: the file is missing or damaged, or has numbers of a kind that gguf cannot dequantise.
    """
    _, reader = _opened(path)
    sizes: dict[str, int] = {}
    for tensor in reader.tensors:
        sizes[tensor.tensor_type.name] = sizes.get(tensor.tensor_type.name, 0) + int(tensor.n_bytes)
    kinds = ", ".join(sorted(sizes, key=lambda kind: -sizes[kind]))
    plain = sum(int(tensor.n_elements) for tensor in reader.tensors) * dtype.itemsize
    name = str(dtype).removeprefix("torch.")
    return f"{gigabytes(sum(sizes.values()))} in {kinds}, dequantised to {name}: {gigabytes(plain)}"


def _opened(path: Path) -> tuple[Any, Any]:
    """The library, and a reader of a file all of whose numbers it can dequantise."""
    gguf = need("gguf", "tinyfusion[gguf]", f"backbone.model: {path.name}")
    check_regular(path)
    try:
        reader = gguf.GGUFReader(path)
    except Exception as e:  # a damaged file makes the reader fail in any way it can
        raise UserError(f"{path}: damaged or cut short ({first_line(e)}). Copy or download it again") from None
    for kind in {tensor.tensor_type for tensor in reader.tensors}:
        try:
            gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            raise UserError(
                f"{path}: holds weights in {kind.name}, which gguf cannot dequantise; give a file in another "
                "quantisation, such as Q8_0 or Q4_K_S"
            ) from None
    return gguf, reader
