"""Gating real architectures of other libraries: a decoder with rotary tables and masks, and double-stream blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tinyfusion_core.protocols.blocks.batch import probed_batch_dims
from tinyfusion_core.protocols.blocks.paths import expand
from tinyfusion_core.protocols.blocks.streams import Stream
from tinyfusion_core.pruning.gating import Gates
from tinyfusion_core.testing.dense_formula import dense_formula

pytestmark = [pytest.mark.numerics, pytest.mark.filterwarnings("ignore")]  # of other libraries


def randomise(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model.eval()


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=4, vocab_size=50, pad_token_id=0
    )
    model = randomise(LlamaForCausalLM(config))

    def run(rows: int) -> Tensor:
        tokens = torch.arange(rows * 6).view(rows, 6) % 49 + 1
        mask = torch.ones(rows, 6, dtype=torch.long)
        mask[0, :2] = 0  # padding, so that the layers get a mask with a batch dimension
        return model(input_ids=tokens, attention_mask=mask, use_cache=False).logits

    return model, expand(model, ["model.layers.*"]), run, [Stream("hidden_states")]


def flux():
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=3, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    model = randomise(model)

    def run(rows: int) -> Tensor:
        torch.manual_seed(rows)
        return model(
            hidden_states=torch.randn(rows, 16, 4),
            encoder_hidden_states=torch.randn(rows, 5, 32),
            pooled_projections=torch.randn(rows, 32),
            timestep=torch.linspace(0.1, 0.9, rows),
            img_ids=torch.arange(48.0).view(16, 3),
            txt_ids=torch.zeros(5, 3),
        ).sample

    streams = [Stream("hidden_states", 1), Stream("encoder_hidden_states", 0)]
    return model, expand(model, ["transformer_blocks.*", "single_transformer_blocks.*"]), run, streams


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("make", [llama, flux])
def test_identities(make) -> None:
    model, blocks, run, streams = make()
    # 21 rows: as many as Flux has tokens, whose rotary tables have no batch dimension.
    rows = 21
    dims = probed_batch_dims(model, blocks, run)
    plain = run(rows)
    mask = (torch.rand(rows, len(blocks)) < 0.5).float()
    mask[:, 1], mask[:, 2] = 0, 1
    mask.requires_grad_()
    parameters = [p for path in blocks for p in model.get_submodule(path).parameters()]
    with dense_formula(model, blocks, mask, streams):
        expected = torch.autograd.grad(run(rows).square().mean(), [mask, *parameters], allow_unused=True)
    hard = [float(i % 2 == 0) for i in range(len(blocks))]
    with Gates(model, blocks, dims, streams) as gates:
        gates.mask = torch.ones(rows, len(blocks))
        assert torch.equal(run(rows), plain)
        gates.mask = mask
        found = torch.autograd.grad(run(rows).square().mean(), [mask, *parameters], allow_unused=True)
        gates.mask = torch.tensor(hard).repeat(rows, 1)
        gated = run(rows)
    for g, e in zip(found, expected, strict=True):
        assert (g is None) == (e is None)
        if g is not None:
            assert (g - e).abs().max() <= 1e-5 * max(1e-3, float(e.abs().max()))
    for path in reversed([path for path, keep in zip(blocks, hard, strict=True) if not keep]):
        parent, _, name = path.rpartition(".")
        del model.get_submodule(parent)[int(name)]
    if hasattr(model.config, "num_hidden_layers"):
        model.config.num_hidden_layers = 2  # the decoder runs over that many of its layers
    assert torch.allclose(gated, run(rows), atol=1e-6)
