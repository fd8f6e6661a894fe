"""What a call says of the teacher's blocks by number means the same blocks of a student, in published pipelines too."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import tinyfusion_core as tiny
from diffusers_families import FAMILIES
from diffusers_sweep import config, options
from diffusers_tasks import make, relative, sampled
from marks import slow_but
from tinyfusion_core.protocols.checkpoint_backbone import randomise
from tinyfusion_core.protocols.data import Tensors
from tinyfusion_core.pruning.gating import Gates
from tinyfusion_core.runtime.seeding import Rng, generator
from tinyfusion_diffusers import DiffusersTransformer, RectifiedFlow, follow_teacher
from tinyfusion_diffusers.blocks.following import RESIDUALS

pytestmark = [pytest.mark.numerics, pytest.mark.filterwarnings("ignore")]  # of other libraries

ROWS = 2
BY_BLOCK = {"ZImageTransformer2DModel"}
"""Those whose ControlNets say which block each residual is for."""


def task_of(name: str) -> tuple[tiny.Task, dict[str, Tensor]]:
    if name in FAMILIES:
        return make(name)
    backbone = DiffusersTransformer.random(config(name), **options(name))
    batch = backbone.example(ROWS)
    for key, value in batch.items():
        if value.is_floating_point():
            value.normal_(generator=generator("following", key))
    loss = RectifiedFlow()
    task = tiny.Task(backbone=backbone, loss=loss, train=Tensors(batch), held_out=Tensors(batch))
    return task, loss.prepare(batch, Rng(0, "test"))


def without(task: tiny.Task, *gone: int) -> tuple[tiny.Decision, Any]:
    decision = tiny.Keep([i for i in range(len(task.blocks)) if i not in gone])(task, tiny.Trainer())
    return decision, tiny.prune(task, decision)


@contextmanager
def closed(task: tiny.Task, rows: int, *gone: int) -> Any:
    """The teacher with some of its gates closed."""
    with Gates(task.teacher, task.blocks, task.batch_dim(task.teacher), task.backbone.streams) as gates:
        gates.mask = torch.tensor([[float(i not in gone) for i in range(len(task.blocks))]] * rows)
        yield


def predicted(task: tiny.Task, model: nn.Module, inputs: dict[str, Tensor], more: dict[str, Any]) -> Tensor:
    """What a network predicts if whoever calls it says more."""
    handle = model.register_forward_pre_hook(
        lambda _module, args, kwargs: (args, {**kwargs, **more}), with_kwargs=True, prepend=True
    )
    with torch.no_grad():
        found = task.loss.predict(model, inputs)
    handle.remove()
    return found


def noise_like_streams(task: tiny.Task, inputs: dict[str, Tensor], number: Callable[[int], int]) -> dict[str, Any]:
    """As many residuals for each list as are wanted for its depth."""
    found: dict[str, Any] = {}
    for name, path in RESIDUALS[type(task.teacher).__name__].items():
        blocks: Any = task.teacher.get_submodule(path)
        seen: list[Any] = []
        handle = blocks[0].register_forward_hook(lambda _module, _args, out, seen=seen: seen.append(out))
        with torch.no_grad():
            task.loss.predict(task.teacher, inputs)
        handle.remove()
        like = seen[0][-1] if isinstance(seen[0], tuple) else seen[0]
        found[name] = [torch.empty_like(like).normal_(generator=generator(name, i)) for i in range(number(len(blocks)))]
    return found


CASES = [*RESIDUALS, "FluxTransformer2DModel repeats them"]


@pytest.mark.parametrize("case", slow_but(CASES, "SD3Transformer2DModel", "SanaTransformer2DModel"))
def test_residuals_are_added_where_they_were_meant(case: str) -> None:
    name, _, repeats = case.partition(" ")
    task, inputs = task_of(name)
    more = noise_like_streams(task, inputs, lambda _depth: 2)
    if name in BY_BLOCK:
        more = {key: {0: some[0], 2: some[1]} for key, some in more.items()}
    if repeats:
        more["controlnet_blocks_repeat"] = True
    last = len(task.blocks) - 1
    gone = (2, last) if len(task.lists) > 1 else (2,)
    decision, student = without(task, *gone)
    with closed(task, len(inputs["x_t"]), *gone):
        wanted = predicted(task, task.teacher, inputs, more)
        plain = predicted(task, task.teacher, inputs, {})
    misplaced = predicted(task, student, inputs, more)
    handle = follow_teacher(student, decision)
    # Only rounding differs: what two blocks add is put together first.
    assert relative(predicted(task, student, inputs, more), wanted) < 1e-5
    assert torch.equal(predicted(task, student, inputs, {}), plain)
    assert relative(wanted, plain) > 1e-2
    handle.remove()
    assert torch.equal(predicted(task, student, inputs, more), misplaced)
    if not repeats and not name.startswith("Sana"):  # of three residuals it had the right ones already
        assert relative(misplaced, wanted) > 1e-3


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "SD3Transformer2DModel"])
def test_a_residual_for_each_block_is_exact(name: str) -> None:
    task, inputs = task_of(name)
    more = noise_like_streams(task, inputs, lambda depth: depth)
    gone = [1, len(task.blocks) - 1]
    decision, student = without(task, *gone)
    for i in gone:  # nothing is added behind blocks that go: no sum of two is rounded
        path, _, block = task.blocks[i].rpartition(".")
        for key, some in more.items():
            if RESIDUALS[name][key] == path:
                some[int(block)].zero_()
    with closed(task, len(inputs["x_t"]), *gone):
        wanted = predicted(task, task.teacher, inputs, more)
    follow_teacher(student, decision)
    assert torch.equal(predicted(task, student, inputs, more), wanted)


def test_two_rounds_follow_one_after_the_other() -> None:
    task, inputs = task_of("SD3Transformer2DModel")
    more = {**noise_like_streams(task, inputs, lambda _depth: 3), "skip_layers": [1, 3]}
    first, student = without(task, 0)
    second, student = without(replace(task, model=student), 1)
    with closed(task, len(inputs["x_t"]), 0, 2):
        wanted = predicted(
            task, task.teacher, inputs, {key: value for key, value in more.items() if key == "skip_layers"}
        )
    follow_teacher(student, first, second)
    assert torch.equal(predicted(task, student, inputs, {"skip_layers": [1, 3]}), wanted)


def test_what_is_meant_for_blocks_before_the_first_is_added_behind_it() -> None:
    task, inputs = task_of("SD3Transformer2DModel")
    more = noise_like_streams(task, inputs, lambda depth: depth)
    (some,) = more.values()
    decision, student = without(task, 0)
    moved = [some[0] + some[1], *some[2:]]
    wanted = predicted(task, student, inputs, {"block_controlnet_hidden_states": moved})
    follow_teacher(student, decision)
    assert torch.equal(predicted(task, student, inputs, more), wanted)


def test_decisions_of_other_networks_are_refused() -> None:
    task, _ = task_of("SD3Transformer2DModel")
    decision, student = without(task, 1)
    other, _ = without(task, 1, 2)
    for model, decisions in ((task.teacher, [decision]), (student, [other]), (student, [decision, decision])):
        with pytest.raises(tiny.UserError, match="give the decision of this student"):
            follow_teacher(model, *decisions)
    foreign = replace(decision, blocks=tuple(f"blocks.{i}" for i in range(len(decision.blocks))))
    with pytest.raises(tiny.UserError, match=r"decisions: one is about blocks\.0 and others, which SD3"):
        follow_teacher(student, foreign)
    handle = follow_teacher(student, decision)
    with pytest.raises(tiny.UserError, match="follows its teacher already"):
        follow_teacher(student, decision)
    handle.remove()
    follow_teacher(student, decision)
    wan, _ = task_of("WanTransformer3DModel")
    with pytest.raises(tiny.UserError, match="not known where WanTransformer3DModel adds the residuals"):
        follow_teacher(wan.teacher, decision)


def skipping(model: nn.Module, block: int) -> Any:
    """Leave out a block by diffusers' own means, wherever the network is called."""
    return model.register_forward_pre_hook(
        lambda _module, args, kwargs: (args, {**kwargs, "skip_layers": [block, *(kwargs.get("skip_layers") or ())]}),
        with_kwargs=True,
    )


def test_skipped_layers_in_the_pipeline_of_sd3() -> None:
    task, _ = task_of("SD3Transformer2DModel")
    batch = {key: value[:1] for key, value in task.train.columns.items()}
    told = {
        "guidance_scale": 3.0, "height": 64, "width": 64, "negative_prompt_embeds": -batch["text"],
        "negative_pooled_prompt_embeds": -batch["pooled"], "skip_guidance_layers": [1, 2],
        "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0,
    }  # fmt: skip

    def run(model: nn.Module) -> Tensor:
        return sampled(model, batch, "StableDiffusion3Pipeline", diffusers.FlowMatchEulerDiscreteScheduler(), told)

    decision, student = without(task, 1)
    misplaced = run(student)
    follow_teacher(student, decision)
    skipping(task.teacher, 1)
    assert torch.equal(run(student), wanted := run(task.teacher))
    assert relative(misplaced, wanted) > 1e-3


def test_a_controlnet_in_the_pipeline_of_sd3() -> None:
    task, _ = task_of("SD3Transformer2DModel")
    batch = {key: value[:1] for key, value in task.train.columns.items()}
    with torch.random.fork_rng():
        control: Any = diffusers.SD3ControlNetModel.from_transformer(
            task.backbone.build(),
            num_layers=2,
            num_extra_conditioning_channels=0,  # it changes that one's config
        )
        images = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=2, latent_channels=4)
    for model in (control, images):
        randomise(model, generator(0, type(model).__name__))
    image = torch.rand(1, 3, 8, 8, generator=generator("image"))
    told = {"guidance_scale": 1.0, "height": 8, "width": 8, "control_image": image}

    def run(model: nn.Module) -> Tensor:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        more = {"controlnet": control.eval(), "vae": images.eval()}
        torch.manual_seed(0)  # of the latents of the image
        return sampled(model, batch, "StableDiffusion3ControlNetPipeline", scheduler, told, **more)

    decision, student = without(task, 1)
    misplaced = run(student)
    follow_teacher(student, decision)
    skipping(task.teacher, 1)
    wanted = run(task.teacher)
    assert relative(run(student), wanted) < 1e-5
    assert relative(misplaced, wanted) > 1e-3
