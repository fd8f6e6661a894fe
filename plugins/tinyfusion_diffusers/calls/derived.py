"""Arguments of networks of diffusers that follow from the shapes of the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion_diffusers.shapes import square, takes_patches


@dataclass(frozen=True)
class Told:
    """What a call is derived from.

    Attributes:
        cls: class of the network.
        x: (batch, ...) noisy latents.
        call: arguments that are known already.
        config: config of the network.
    """

    cls: type[nn.Module]
    x: Tensor
    call: Mapping[str, Any]
    config: Mapping[str, Any]

    @property
    def sides(self) -> tuple[int, ...]:
        """Rows and columns of the latents."""
        return tuple(self.x.shape[-2:])

    @property
    def text_length(self) -> int:
        """Tokens of a prompt."""
        return int(self.call["encoder_hidden_states"].shape[1])


@dataclass(frozen=True)
class Positions:
    """What stands in the positions of tokens besides the rows and columns of an image, in the second and third.

    Attributes:
        text: columns that count the tokens of a text.
        modality: the first column of an image.
        start: what rows and columns of an image begin with.
    """

    text: tuple[int, ...] = ()
    modality: float = 0
    start: float = 0


POSITIONS: Mapping[str, Positions] = {
    "Flux2Transformer2DModel": Positions(text=(3,)),
    "LongCatImageTransformer2DModel": Positions(text=(1, 2), modality=1, start=512),
    "OvisImageTransformer2DModel": Positions(text=(1, 2)),
}
"""Taken from diffusers' pipelines; of others the positions of a text are zeros."""


def _axes(told: Told) -> int:
    return len(told.config.get("axes_dims_rope") or (0, 0, 0))


def _image_ids(told: Told) -> Tensor:
    """Row and column of every token, between what `POSITIONS` says: (tokens, axes)."""
    known = POSITIONS.get(told.cls.__name__, Positions())
    lines = (torch.arange(n // square(told.cls), device=told.x.device, dtype=torch.float32) for n in told.sides)
    grid = torch.stack(torch.meshgrid(*lines, indexing="ij"), -1).flatten(0, 1) + known.start
    ids = nn.functional.pad(grid, (1, _axes(told) - 3))
    ids[:, 0] = known.modality
    return ids


def _text_ids(told: Told) -> Tensor:
    """Where the tokens of a text stand: (tokens, axes)."""
    ids = told.x.new_zeros(told.text_length, _axes(told), dtype=torch.float32)
    for column in POSITIONS.get(told.cls.__name__, Positions()).text:
        ids[:, column] = torch.arange(told.text_length)
    return ids


def _rope_scale(told: Told) -> tuple[float, float, float]:
    """Seconds and pixels per latent position, at 25 frames a second: LTX-Video's autoencoder takes 8 x 32 x 32."""
    return 8 / 25, 32.0, 32.0


def _pixels(told: Told) -> Tensor:
    """Height and width of the image, of which autoencoders make latents of 8 x 8 pixels: (batch, 2)."""
    return told.x.new_tensor([[8 * n for n in told.sides]], dtype=torch.float32).expand(len(told.x), -1)


def _sizes(told: Told) -> dict[str, Tensor | None]:
    """Image size for PixArt-alpha's largest network: its sides in pixels, and their ratio."""
    wanted = told.config.get("use_additional_conditions")
    if not (told.config.get("sample_size") == 128 if wanted is None else wanted):
        return {"resolution": None, "aspect_ratio": None}
    resolution = _pixels(told)
    return {"resolution": resolution, "aspect_ratio": resolution[:, :1] / resolution[:, 1:]}


def _rotary(told: Told) -> Any:
    """Tables of positions that are made outside the network."""
    if "interpolation_scale_t" in told.config:
        return _rotary_of_allegro(told)
    if "scaling_factor" in told.config:  # Lumina-Next, whose pipeline always makes the table of this size
        from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

        head = told.config["hidden_size"] // told.config["num_attention_heads"]
        table: Any = get_2d_rotary_pos_embed_lumina(head, 384, 384)  # type: ignore[no-untyped-call]
        return table.to(told.x.device)
    return _rotary_of_cogvideox(told) if told.config.get("use_rotary_positional_embeddings") else None


def _rotary_of_allegro(told: Told) -> Any:
    """Allegro's tables, and where every token stands in them."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    height, width = (n // told.config["patch_size"] for n in told.sides)
    tables: Any = get_3d_rotary_pos_embed_allegro(
        embed_dim=told.config["attention_head_dim"],
        crops_coords=((0, 0), (height, width)),
        grid_size=(height, width),
        temporal_size=told.x.shape[2],
        interpolation_scale=tuple(told.config[f"interpolation_scale_{axis}"] for axis in "thw"),
        device=told.x.device,
    )
    places = torch.cartesian_prod(*(grid.long() for grid in tables[3:]))
    return tables[:3], tuple(places.T.reshape(3, 1, -1).contiguous())


def _rotary_of_cogvideox(told: Told) -> tuple[Tensor, Tensor]:
    """CogVideoX's tables."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.pipelines.cogvideo import pipeline_cogvideox as pipeline

    config = told.config
    frames, (height, width) = told.x.shape[1], (n // config["patch_size"] for n in told.sides)
    base = config["sample_height"] // config["patch_size"], config["sample_width"] // config["patch_size"]
    if (step := config.get("patch_size_t")) is None:
        crops: Any = pipeline.get_resize_crop_region_for_grid((height, width), base[1], base[0])  # type: ignore[no-untyped-call]
        more: dict[str, Any] = {"crops_coords": crops, "temporal_size": frames}
    else:
        more = {"crops_coords": None, "temporal_size": math.ceil(frames / step), "grid_type": "slice", "max_size": base}
    tables: Any = get_3d_rotary_pos_embed(
        embed_dim=config["attention_head_dim"], grid_size=(height, width), device=told.x.device, **more
    )
    return tables[0], tables[1]


def _offset(told: Told) -> Tensor | None:
    """What the pipeline of CogVideoX 1.5 from images always feeds: (1,)."""
    return told.x.new_full((1,), 2.0) if told.config.get("ofs_embed_dim") else None


def _grid(told: Told) -> list[Tensor]:
    """The positions of frames, rows and columns of patches."""
    steps = zip(told.x.shape[2:], told.config["patch_size"], strict=True)
    return [torch.arange(n // step, device=told.x.device) for n, step in steps]


def _visual_scale(told: Told) -> tuple[float, float, float]:
    """What Kandinsky 5 divides positions by: images are as they are, videos by their size in pixels."""
    frames, *sides = told.x.shape[2:]
    if frames == 1:
        return 1.0, 1.0, 1.0
    side = 2.0 if all(480 <= 8 * n <= 854 for n in sides) else 3.16
    return 1.0, side, side


def _no_image(told: Told) -> Tensor | None:
    """What HunyuanVideo 1.5 is given when there is no image: zeros for each of 729 tokens."""
    width = told.config.get("image_embed_dim")
    return told.x.new_zeros(len(told.x), 729, width) if width else None


DERIVED: Mapping[str, Callable[[Told], Any]] = {
    "img_ids": _image_ids,
    "txt_ids": _text_ids,
    "position_ids": lambda told: torch.cat([_text_ids(told), _image_ids(told)]) if takes_patches(told.cls) else None,
    "img_shapes": lambda told: [[(1, *(n // square(told.cls) for n in told.sides))]] * len(told.x),
    "num_frames": lambda told: told.x.shape[2],
    "height": lambda told: told.x.shape[3],
    "width": lambda told: told.x.shape[4],
    "rope_interpolation_scale": _rope_scale,
    "added_cond_kwargs": _sizes,
    "cross_attention_kwargs": lambda told: {},
    "image_rotary_emb": _rotary,
    "ofs": _offset,
    "original_size": _pixels,
    "target_size": _pixels,
    "crop_coords": lambda told: told.x.new_zeros(len(told.x), 2, dtype=torch.float32),
    "padding_mask": lambda told: told.x.new_zeros(1, 1, *told.sides),
    "visual_rope_pos": _grid,
    "text_rope_pos": lambda told: torch.arange(told.text_length, device=told.x.device),
    "scale_factor": _visual_scale,
    "image_embeds": _no_image,
}
"""Arguments that follow from the shapes."""
