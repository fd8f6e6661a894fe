"""Which blocks can go, and what they hand on, without a table of names."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tinyfusion_core as tiny
from diffusers_families import FAMILIES
from diffusers_sweep import config
from tinyfusion_core.protocols.blocks.streams import Stream
from tinyfusion_diffusers import DiffusersTransformer
from tinyfusion_diffusers.blocks.lists import shortened
from tinyfusion_diffusers.blocks.streams import streams_of_block
from tinyfusion_diffusers.structure import lists_of

pytestmark = [pytest.mark.numerics, pytest.mark.filterwarnings("ignore")]  # of other libraries


class TextFirst(nn.Module):
    def forward(self, x: Tensor, text: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        x = x + time
        return text, x


class Sum(nn.Module):
    def forward(self, hidden: Tensor, time: Tensor) -> Tensor:
        return hidden + time


class OnDemand(nn.Module):
    def forward(self, x: Tensor, more: bool = False) -> Any:
        if more:
            return x, x.mean()
        return x


class Renamed(nn.Module):
    def forward(self, x: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        y = x + text
        return y, text


def test_streams_are_what_the_source_returns() -> None:
    assert streams_of_block(TextFirst()) == (Stream("x", 1), Stream("text", 0))
    assert streams_of_block(Sum()) == (Stream("hidden"),)
    assert streams_of_block(OnDemand()) == (Stream("x"),)
    told = DiffusersTransformer.random(config("Cosmos3OmniTransformer")).streams["layers"]
    assert told == (Stream("und_seq", 0), Stream("gen_seq", 1))  # by the table: it returns sums
    with pytest.raises(tiny.UserError, match="what Renamed hands on cannot be read from its source; name it in lists"):
        streams_of_block(Renamed())


def test_a_list_whose_length_two_lists_share_is_not_one_of_blocks() -> None:
    found = lists_of(config("ZImageTransformer2DModel"))
    assert {path: told.key for path, told in found.items()} == {"layers": "n_layers"}


def test_blocks_that_the_config_cannot_do_without_stay() -> None:
    # VACE's own blocks stand beside the first and the third; the config names these.
    found = lists_of(config("WanVACETransformer3DModel"))
    assert found["blocks"].free == (1, 3)
    found = lists_of(config("SD3Transformer2DModel"))
    assert found["transformer_blocks"].free == (0, 1, 2)


def test_kinds_of_layers_go_with_their_blocks() -> None:
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    sizes = {**config("AceStepTransformer1DModel"), "layer_types": kinds}
    assert lists_of(sizes)["layers"].free == (0, 1, 2, 3)
    fewer, _ = shortened(sizes, {"layers": [0, 2]}, {"layers": "num_hidden_layers"})
    assert (fewer["num_hidden_layers"], fewer["layer_types"]) == (2, ["full_attention", "sliding_attention"])
    # Without them every other layer is of a kind, so that only the last can go.
    assert lists_of(config("AceStepTransformer1DModel"))["layers"].free == (3,)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("BriaFiboTransformer2DModel", "'single_transformer_blocks': with num_single_layers 2 'caption_projection' is"),
        (
            "ChromaTransformer2DModel",
            "with num_layers 3 it builds another 'time_text_embed.mod_proj', which is saved in",
        ),
        ("HiDreamImageTransformer2DModel", "'double_stream_blocks': with num_layers 3 'caption_projection' is shorter"),
        ("LatteTransformer3DModel", "'transformer_blocks': with num_layers 3 'temporal_transformer_blocks' is shorter"),
    ],
)
def test_why_a_network_is_refused(name: str, why: str) -> None:
    with pytest.raises(tiny.UserError, match=re.escape(why)):
        lists_of(config(name))


def test_a_recipe_can_name_lists_and_streams() -> None:
    sizes = {"_class_name": "HunyuanVideoTransformer3DModel", **config("HunyuanVideoTransformer3DModel")}
    lists = {"single_transformer_blocks": ["hidden_states", "encoder_hidden_states"]}
    backbone = DiffusersTransformer.random(sizes, latent=[2, 4, 4], text_length=5, lists=lists)
    assert backbone.streams == {
        "single_transformer_blocks": (Stream("hidden_states", 0), Stream("encoder_hidden_states", 1))
    }
    with torch.device("meta"):
        model = backbone.construct(backbone.config())
    assert list(backbone.blocks(model)) == [f"single_transformer_blocks.{i}" for i in range(3)]


def test_lists_that_are_not_there_are_refused() -> None:
    family = FAMILIES["WanTransformer3DModel"]
    wrong = DiffusersTransformer.random(
        {"_class_name": "WanTransformer3DModel", **family.config}, lists={"block": ["hidden_states"]}
    )
    with pytest.raises(tiny.UserError, match="no list of modules 'block'; did you mean 'blocks'"):
        _ = wrong.streams
    with pytest.raises(tiny.UserError, match="the blocks in 'blocks' take no 'hidden'; did you mean 'hidden_states'"):
        _ = replace(wrong, lists={"blocks": ["hidden"]}).streams


def test_a_list_that_cannot_be_shorter_is_not_left_out_in_silence() -> None:
    with pytest.raises(tiny.UserError, match="one block shorter .'vace_blocks': with "):
        lists_of(config("WanVACETransformer3DModel"), ("blocks", "vace_blocks"))
