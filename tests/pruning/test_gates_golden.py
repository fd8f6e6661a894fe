"""Our sparse gates against the numbers of the paper's reference implementation (a dense formula)."""

from __future__ import annotations

import pytest
import torch

from golden_data import assert_close_rel, load, weights
from tinyfusion_core.protocols.blocks.batch import probed_batch_dims
from tinyfusion_core.pruning.gating import Gates
from tinyfusion_core.samplers.grouped import GroupedSampler
from tinyfusion_dit.model import DiT

pytestmark = pytest.mark.numerics


@pytest.mark.parametrize("name", ["tinyfusion_gates_12_24", "tinyfusion_gates_24_34"])
def test_masks_outputs_and_every_gradient(name: str) -> None:
    tensors, config = load(name)
    settings = dict(config["model"])
    groups = [tuple(g) for g in settings.pop("groups")]
    model = DiT(**settings).eval()
    state = weights(tensors)
    gate_logits = [state.pop(f"gumbel_gates.{g}") for g in range(len(groups))]
    model.load_state_dict(state)
    depth = settings["depth"]
    paths = [f"blocks.{i}" for i in range(depth)]

    sampler = GroupedSampler({"blocks": depth}, groups, tau=(config["tau"],) * 2, scaling=(config["scaling"],) * 2)
    for g, logits in enumerate(gate_logits):
        sampler.logits[g].data.copy_(logits[0])
        assert torch.equal(sampler.get_buffer(f"options_{g}"), tensors[f"gate.{g}.candidates"])
    gumbel = torch.cat([tensors[f"in.gumbel.{g}"] for g in range(len(groups))], dim=1)
    draw = sampler.relax(gumbel)
    assert torch.equal(draw.mask, tensors["out.mask"])

    kept: dict[str, torch.Tensor] = {}

    def keep(key: str):
        def hook(module, args, output) -> None:
            output.retain_grad()
            kept[key] = output

        return hook

    inputs = tensors["in.x"], tensors["in.t"], tensors["in.y"]
    dims = probed_batch_dims(model, paths, lambda n: model(*(v[:1].expand(n, *v.shape[1:]) for v in inputs)))
    hooks = [
        model.t_embedder.register_forward_hook(keep("t")),
        model.x_embedder.register_forward_hook(keep("patches")),
    ]
    draw.mask.retain_grad()
    with Gates(model, paths, dims) as gates:
        gates.mask = draw.mask
        out = model(*inputs)
        loss = (out - tensors["in.target"]).square().mean()
        loss.backward()
    for hook in hooks:
        hook.remove()

    assert_close_rel(out, tensors["out.forward"], 5e-6)
    assert_close_rel(loss, tensors["loss"], 5e-6)
    assert draw.mask.grad is not None
    start = 0
    for g, (_, of) in enumerate(groups):
        delta = draw.mask.grad[:, start : start + of]
        assert_close_rel(delta @ tensors[f"gate.{g}.candidates"].T, tensors[f"grad.gate.{g}.hard"], 2e-5)
        grad = sampler.logits[g].grad
        assert grad is not None
        assert_close_rel(grad[None], tensors[f"grad.gate.{g}.logits"], 2e-5)
        start += of
    # The position table is added after the patches: the same gradient. c = t + y: that of t.
    assert_close_rel(kept["patches"].grad, tensors["grad.tokens"], 2e-5)
    assert_close_rel(kept["t"].grad, tensors["grad.c"], 2e-5)
    parameters = dict(model.named_parameters())
    compared = 0
    for key, expected in tensors.items():
        if key.startswith("grad.w."):
            grad = parameters[key.removeprefix("grad.w.")].grad
            assert grad is not None, key
            if not expected.any():  # a block that no sample keeps: zero, not absent
                assert not grad.any(), key
            else:
                assert_close_rel(grad, expected, 2e-5)
            compared += 1
    assert compared > 8 * depth
    for block in config["unused_blocks"]:
        assert not any(tensors[k].any() for k in tensors if k.startswith(f"grad.w.blocks.{block}."))
    grads = {n: p.grad for n, p in parameters.items()}
    grads |= {f"gumbel_gates.{g}": logits.grad for g, logits in enumerate(sampler.logits)}
    norms = torch.stack([grads[name].double().norm() for name in config["grad_names"]])
    assert_close_rel(norms, tensors["grad.norms"], 2e-5)
    assert_close_rel(norms.norm(), tensors["grad.total_norm"], 2e-5)
