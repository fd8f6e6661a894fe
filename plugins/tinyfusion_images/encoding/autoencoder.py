"""Loads the autoencoders of latent image models as diffusers' AutoencoderKL, from several file formats."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion_core.errors import MissingFileError, UserError, need
from tinyfusion_core.parsing.records import check_folder
from tinyfusion_core.parsing.weights import load_strict, read_weights

WEIGHTS = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")
AT_ONCE = 8
"""Latents decoded per batch: images take far more memory than latents."""


def load_autoencoder(where: str) -> nn.Module:
    """Load an autoencoder in eval mode.

    Args:
        where: a folder in the layout of diffusers, the folder of a pipeline that has one in `vae`, a checkpoint file of
            the latent-diffusion code base (also MAR's kl16.ckpt), or a name on the Hugging Face hub.

    Raises:
        UserError: it is not there, or is something else.
    """
    path, kind = Path(where), _kind(where)
    if path.suffix in WEIGHTS:
        return _from_ldm(path, kind)
    try:
        # Safetensors alone: other files may hold code.
        model: nn.Module = kind.from_pretrained(_folder(where), use_safetensors=True)
    except UserError:
        raise
    except Exception as e:  # damaged files make the readers fail in any way they can
        raise MissingFileError(f"{where}: {_expected(e)}") from None
    return model.eval().requires_grad_(False)


def check_autoencoder(where: str) -> None:
    """Check that an autoencoder exists, by its config only.

    Raises:
        UserError: it does not.
    """
    kind = _kind(where)
    if Path(where).suffix in WEIGHTS:
        if not Path(where).is_file():
            raise MissingFileError(f"{where}: no such file")
        return
    try:
        kind.load_config(_folder(where))
    except UserError:
        raise
    except Exception as e:
        raise MissingFileError(f"{where}: {_expected(e)}") from None


def decode(model: nn.Module, latents: Tensor, scale: float, shift: float) -> Tensor:
    """Decode latents to images, on the device of the latents.

    Args:
        model: the autoencoder.
        latents: (batch, latent channels, h, w), scaled.
        scale: factor that they were multiplied by.
        shift: offset that was subtracted before.

    Returns:
        (batch, 3, height, width) images in [0, 1].
    """
    model.to(latents.device)
    dtype = next(model.parameters()).dtype
    with torch.no_grad(), torch.autocast(latents.device.type, enabled=False):
        z = latents.to(dtype) / scale + shift
        parts = [model.decode(z[i : i + AT_ONCE]).sample for i in range(0, len(z), AT_ONCE)]  # type: ignore[operator]
    return ((torch.cat(parts).float() + 1) / 2).clamp(0, 1)


def _kind(where: str) -> Any:
    """The class of diffusers."""
    return need("diffusers", "tinyfusion[diffusers]", f"the autoencoder {where}").AutoencoderKL


def _folder(where: str) -> str:
    inside = Path(where) / "vae"
    found = inside if (inside / "config.json").is_file() else Path(where)
    if not found.is_dir():
        return where  # a name on the hub
    check_folder(found)
    return str(found)


def _expected(error: Exception) -> str:
    reason = str(error).strip().splitlines()
    return (
        "no autoencoder there; expected a folder of diffusers' AutoencoderKL (config.json and safetensors weights), "
        f"its name on the hub, or a checkpoint of the latent-diffusion code base ({', '.join(WEIGHTS)}): "
        f"{reason[0][:200] if reason else type(error).__name__}"
    )


def _from_ldm(path: Path, kind: Any) -> nn.Module:
    """The AutoencoderKL for the shapes in a latent-diffusion checkpoint."""
    weights = read_weights(path, containers=("model", "state_dict"))
    # The whole model's checkpoint has the autoencoder's under a prefix; an autoencoder's own may have a loss beside it.
    weights = {name.removeprefix("first_stage_model."): t for name, t in weights.items()}
    parts = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
    weights = {name: t for name, t in weights.items() if name.startswith(parts)}
    try:
        config = _ldm_config(weights)
    except KeyError as e:
        raise UserError(f"{path}: not an autoencoder of the latent-diffusion code base (it has no {e})") from None

    model: nn.Module = kind(**config)
    num_levels = len(config["block_out_channels"])
    renamed = {_from_ldm_name(name, num_levels): t for name, t in weights.items()}
    own = model.state_dict()
    # Attention was written with 1x1 convolutions there, and is with linear layers here.
    ready = {k: t[:, :, 0, 0] if k in own and t.ndim == 4 and own[k].ndim == 2 else t for k, t in renamed.items()}
    load_strict(model, ready, path)
    return model.eval().requires_grad_(False)


def _ldm_config(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    levels = range(_count(weights, "encoder.down.{}.block.0.conv1.weight"))

    def types(kind: str, attention: str) -> list[str]:
        return [f"Attn{kind}" if attention.format(i) in weights else kind for i in levels]

    return {
        "in_channels": weights["encoder.conv_in.weight"].shape[1],
        "out_channels": weights["decoder.conv_out.weight"].shape[0],
        "down_block_types": types("DownEncoderBlock2D", "encoder.down.{}.attn.0.q.weight"),
        "up_block_types": types("UpDecoderBlock2D", "decoder.up.{}.attn.0.q.weight")[::-1],
        "block_out_channels": [weights[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in levels],
        "layers_per_block": _count(weights, "encoder.down.0.block.{}.conv1.weight"),
        "latent_channels": weights["post_quant_conv.weight"].shape[1],
        "scaling_factor": None,  # such a checkpoint does not say
    }


def _count(weights: Mapping[str, Tensor], name: str) -> int:
    return next(i for i in count() if name.format(i) not in weights)


_LDM_NAMES = (
    (r"\.(down|up)\.(\d+)\.block\.", r".\1_blocks.\2.resnets."),
    (r"\.(down|up)\.(\d+)\.attn\.", r".\1_blocks.\2.attentions."),
    (r"\.(down|up)\.(\d+)\.(down|up)sample\.", r".\1_blocks.\2.\3samplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
)


def _from_ldm_name(name: str, num_levels: int) -> str:
    for pattern, new in _LDM_NAMES:
        name = re.sub(pattern, new, name)
    # Decoders count their levels from the picture there, from the latent here.
    return re.sub(r"\.up_blocks\.(\d+)", lambda m: f".up_blocks.{num_levels - 1 - int(m[1])}", name)
