"""What diffusers offers for its transformers works on students: caches, offloading, compiling, IP-adapters."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import tinyfusion_core as tiny
from diffusers_tasks import make, relative, sampled
from tinyfusion_core.runtime.seeding import generator

pytestmark = [pytest.mark.numerics, pytest.mark.filterwarnings("ignore")]  # of other libraries

KEPT = [0, 2, 3, 5]


@pytest.fixture
def in_a_pipeline() -> tuple[Any, dict[str, Tensor], Tensor]:
    """A student, a prompt and noise, and what the pipeline makes of them."""
    task, _ = make("FluxTransformer2DModel")
    student = tiny.prune(task, tiny.Keep(KEPT)(task, tiny.Trainer()))
    batch = {key: value[:1] for key, value in task.train.columns.items()}
    return student, batch, run(student, batch)


def run(model: Any, batch: dict[str, Tensor]) -> Tensor:
    told = {"guidance_scale": 3.5, "height": 32, "width": 32}
    return sampled(model, batch, "FluxPipeline", diffusers.FlowMatchEulerDiscreteScheduler(), told)


def test_caches(in_a_pipeline: Any) -> None:
    student, batch, plain = in_a_pipeline
    for threshold, same in ((0.0, True), (1e9, False)):
        student.enable_cache(diffusers.FirstBlockCacheConfig(threshold=threshold))
        found = run(student, batch)
        student.disable_cache()
        assert torch.allclose(found, plain, atol=1e-5) == same
    assert torch.equal(run(student, batch), plain)


def test_offloading(in_a_pipeline: Any) -> None:
    student, batch, plain = in_a_pipeline
    student.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    assert torch.equal(run(student, batch), plain)


def test_compiling(in_a_pipeline: Any) -> None:
    student, batch, plain = in_a_pipeline
    student.compile(backend="aot_eager", fullgraph=True)
    assert torch.allclose(run(student, batch), plain, atol=1e-5)
    torch.compiler.reset()


def test_an_ip_adapter_whose_keys_follow_the_decision() -> None:
    task, inputs = make("FluxTransformer2DModel")
    decision = tiny.Keep([0, 2, 3, 4, 5])(task, tiny.Trainer())

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator("adapter", *shape))

    sizes = {"to_k_ip.weight": (16, 12), "to_v_ip.weight": (16, 12), "to_k_ip.bias": (16,), "to_v_ip.bias": (16,)}
    layers = {f"{i}.{name}": (i + 1) * draw(*shape) for i in range(3) for name, shape in sizes.items()}
    projection = {"proj.weight": draw(48, 6), "proj.bias": draw(48), "norm.weight": draw(12), "norm.bias": draw(12)}

    def adapted(model: Any, weights: dict[str, Tensor]) -> Any:
        model._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": weights}])
        return model

    def predicted(model: Any) -> Tensor:
        told = {"joint_attention_kwargs": {"ip_adapter_image_embeds": [draw(len(inputs["x_t"]), 1, 6)]}}
        model.register_forward_pre_hook(lambda _model, args, kwargs: (args, {**kwargs, **told}), with_kwargs=True)
        with torch.no_grad():
            found: Tensor = task.loss.predict(model, inputs)
        return found

    kept = [0, 2]
    renumbered = {
        f"{kept.index(int(block))}.{name}": layers[f"{block}.{name}"]
        for block, _, name in (key.partition(".") for key in layers)
        if int(block) in kept
    }
    ours, misplaced = (adapted(tiny.prune(task, decision), weights) for weights in (renumbered, layers))
    teacher = adapted(task.teacher, layers)
    del teacher.transformer_blocks[1]
    wanted = predicted(teacher)
    assert torch.equal(predicted(ours), wanted)
    assert relative(predicted(misplaced), wanted) > 1e-4
