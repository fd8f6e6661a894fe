"""Random models of every transformer of diffusers, and what holds of each.

`python tests/diffusers_sweep.py` writes `docs/diffusers-families.md`; a test says when that is out of date.
"""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import yaml
from torch import Tensor

import tinyfusion_core as tiny
from diffusers_families import FAMILIES
from diffusers_tasks import dense, relative
from places import ROOT
from sweeps import swept
from tinyfusion_core.pipeline.planning.plan import make_plan
from tinyfusion_core.protocols.data import Tensors
from tinyfusion_core.protocols.loss import LossAdapter
from tinyfusion_core.pruning.gating import Gates
from tinyfusion_core.runtime.seeding import Rng, generator
from tinyfusion_diffusers import DiffusersTransformer, RectifiedFlow, ScheduledDiffusion
from tinyfusion_diffusers.calls.compared import COMPARED
from tinyfusion_diffusers.calls.flows import FLOWS

SIZES: dict[str, Any] = {
    # Depth
    "num_layers": 4, "num_single_layers": 3, "num_mmdit_layers": 3, "num_single_dit_layers": 3, "n_layers": 4,
    "depth": 4,
    "num_hidden_layers": 4, "num_visual_blocks": 4, "nlayers": 4, "dit_depth": 4, "num_refiner_layers": 1,
    "n_refiner_layers": 1, "num_text_blocks": 2, "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1,
    "approximator_layers": 2, "perceiver_num_layers": 1, "mmdit_layers": 4,
    # Width
    "num_attention_heads": 2, "attention_head_dim": 8, "hidden_size": 16, "dim": 16, "n_heads": 2, "n_kv_heads": 2,
    "num_heads": 2, "num_key_value_heads": 2, "num_kv_heads": 2, "head_dim": 8, "intermediate_size": 24, "ffn_dim": 24,
    "model_dim": 16, "ff_dim": 24, "embed_dim": 16, "dit_dim": 16, "dit_heads": 2, "d_model": 16, "d_kv": 8, "d_ff": 24,
    "token_dim": 16, "nheads": 2, "ffn_hidden_size": 24, "ff_inner_dim": 24, "multiple_of": 8, "mlp_ratio": 2.0,
    "num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "caption_projection_dim": 16, "linear_head_dim": 8,
    "text_num_attention_heads": 2, "text_num_key_value_heads": 2, "text_intermediate_size": 24,
    "num_key_value_attention_heads": 2, "norm_num_groups": 2, "inner_dim": 16,
    # Text and other conditions
    "joint_attention_dim": 12, "text_embed_dim": 12, "text_dim": 12, "caption_channels": 12, "cap_feat_dim": 12,
    "pooled_projection_dim": 10, "context_in_dim": 12, "text_in_dim": 12, "in_text_dim": 12, "in_text_dim2": 10,
    "text_hidden_dim": 12, "llm_features_dim": 12, "text_embed_2_dim": 12, "image_embed_dim": 6,
    "text_encoder_dim": 12,
    "encoder_hidden_size": 12, "cond_token_dim": 12, "global_cond_dim": 12, "dit_text_dim": 12,
    "cross_attention_dim_t5": 12, "cross_attention_dim": 16,
    "cross_attention_input_dim": 12, "global_states_input_dim": 12, "text_len": 5, "text_len_t5": 5,
    "max_text_seq_length": 5, "num_text_layers": 2, "text_emb_dim": 10, "num_embeds_ada_norm": 10,
    # Time
    "time_embed_dim": 12, "freq_dim": 16, "time_dim": 12, "timestep_embed_dim": 16, "timestep_channels": 16,
    "timestep_guidance_channels": 16, "condition_dim": 12, "time_proj_dim": 16, "timestep_features_dim": 16,
    "time_step_dim": 16, "adaln_dim": 16, "adaln_lora_dim": 8, "fourier_embedding_dim": 16, "time_embed_hidden_dim": 16,
    "approximator_num_channels": 16, "approximator_hidden_dim": 16,
    # Latents
    "in_channels": 4, "out_channels": 4, "sample_size": 8, "sample_width": 8, "sample_height": 8, "sample_frames": 5,
    "in_visual_dim": 4, "out_visual_dim": 4, "pos_embed_max_size": 16, "latent_dim": 4, "io_channels": 4,
    "rope_max_seq_len": 32, "max_sequence_length": 5, "image_size": 8, "video_length": 2, "patch_latent_dim": 16,
    "latent_channel": 4, "axes_lens": (32, 8, 8),
    # Position tables, by the number of their axes
    "axes_dims_rope": 8, "rope_axes_dim": 8, "axes_dims": 8, "axes_dim_rope": 8, "rope_dim_list": 8, "axes_dim": 8,
    "rope_dim": 8, "mrope_section": 4,
    # Others
    "vocab_size": 97, "num_experts": 4, "moe_intermediate_dim": 16, "num_routed_experts": 4, "num_activated_experts": 2,
}  # fmt: skip
"""Every size of a class's defaults that has one of these names is so large."""
AXES = {2: (4, 4), 3: (4, 2, 2), 4: (2, 2, 2, 2)}
MORE: dict[str, dict[str, Any]] = {
    "AceStepTransformer1DModel": {"audio_acoustic_hidden_dim": 4, "in_channels": 12},
    "AllegroTransformer3DModel": {"attention_head_dim": 12, "cross_attention_dim": 24},
    "BriaFibo2Transformer2DModel": {"dim": 128, "n_heads": 4, "axes_dims": [16, 8, 8], "axes_lens": [1024, 32, 32]},
    "CosmosTransformer3DModel": {
        "text_embed_dim": 12, "max_size": [2, 4, 4], "encoder_hidden_states_channels": 12, "attention_head_dim": 16,
    },
    "DreamLiteTransformer2DModel": {"in_channels": 4, "cross_attention_dim": 12},
    "EasyAnimateTransformer3DModel": {"in_channels": 4, "out_channels": 4, "patch_size": 2, "attention_head_dim": 16},
    "HiDreamImageTransformer2DModel": {
        "patch_size": 2, "out_channels": 4, "caption_channels": [12, 12], "llama_layers": [0, 1, 2, 3, 4, 5, 6],
        "axes_dims_rope": [4, 4],
    },
    "HunyuanDiT2DModel": {"in_channels": 4, "patch_size": 2, "cross_attention_dim": 12},
    "LTX2VideoTransformer3DModel": {
        "audio_in_channels": 4, "audio_out_channels": 4, "audio_num_attention_heads": 2, "audio_attention_head_dim": 8,
        "audio_cross_attention_dim": 16, "cross_attention_dim": 16,
    },
    "LatteTransformer3DModel": {
        "in_channels": 4, "patch_size": 2, "out_channels": 8, "norm_type": "ada_norm_single", "caption_channels": 12,
        "cross_attention_dim": 16, "num_embeds_ada_norm": 10,
    },
    "LuminaNextDiT2DModel": {"cross_attention_dim": 12, "num_kv_heads": 2},
    "MochiTransformer3DModel": {"text_embed_dim": 16},
    "NucleusMoEImageTransformer2DModel": {
        "in_channels": 16, "out_channels": 4, "mlp_ratio": 12.0, "num_layers": 6, "capacity_factors": 1.0,
    },
    "OmniGenTransformer2DModel": {
        "pad_token_id": 0, "rope_scaling": {"short_factor": [1.0] * 4, "long_factor": [1.0] * 4},
    },
    "PRXTransformer2DModel": {"axes_dim": [4, 4]},
    "QwenImage21Transformer2DModel": {"mlp_ratio": 2},
    "SanaWMLTX2RefinerTransformer3DModel": {
        "audio_in_channels": 4, "audio_out_channels": 4, "audio_num_attention_heads": 2, "audio_attention_head_dim": 8,
        "audio_cross_attention_dim": 16, "cross_attention_dim": 16,
    },
    "Transformer2DModel": {"in_channels": 4, "cross_attention_dim": 12},
    "TransformerTemporalModel": {"in_channels": 4, "cross_attention_dim": 12},
    "WanAnimateTransformer3DModel": {
        "in_channels": 12, "latent_channels": 4, "motion_encoder_dim": 8, "motion_style_dim": 8,
    },
    "WanVACETransformer3DModel": {"vace_layers": [0, 2], "vace_in_channels": 12},
    "ZImageTransformer2DModel": {"axes_lens": [128, 32, 32]},
}  # fmt: skip
"""What a class demands besides."""

# What the library says of itself: its classes are imported when they are asked for, each with all that it needs.
CLASSES = sorted(
    name
    for module, names in diffusers.models._import_structure.items()
    if module.startswith("transformers.")
    for name in names
    if name in dir(diffusers)
)


def config(name: str) -> dict[str, Any]:
    """The defaults of a class, with the sizes of the table."""
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    sizes: dict[str, Any] = {}
    for key, value in SIZES.items():
        default = parameters[key].default if key in parameters else None
        if default is None or isinstance(default, bool):
            continue
        if isinstance(default, (list, tuple)) and isinstance(value, int):
            axes = AXES[len(default)]
            sizes[key] = [n * value // 8 for n in axes] if value < 8 else list(axes)
        else:
            sizes[key] = value
    return {"_class_name": name, **sizes, **MORE.get(name, {})}


PAGE = ROOT / "docs" / "diffusers-families.md"
V_PREDICTION = {
    "scheduler": "CogVideoXDDIMScheduler",
    "settings": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
}  # fmt: skip
SCHEDULED: dict[str, dict[str, Any]] = {
    "AllegroTransformer3DModel": {},
    "CogView3PlusTransformer2DModel": V_PREDICTION,
    "ConsisIDTransformer3DModel": V_PREDICTION,
    "DreamLiteTransformer2DModel": {},
    "Transformer2DModel": {},
}
"""Classes whose pipelines do not follow a flow, and the options of their objective."""
NOT_COMPARED = {
    "ConsisIDTransformer3DModel": "its pipeline tells it a face, which the data do not have",
    "CosmosTransformer3DModel": "its pipelines need a guard's weights; those of the first Cosmos follow no flow",
    "DreamLiteTransformer2DModel": "diffusers has no pipeline for it",
    "Flux3Transformer2DModel": "diffusers has modular pipelines alone",
    "Transformer2DModel": "diffusers reads such networks of PixArt and DiT as their own classes; others are deprecated",
}
"""Why those are not that a recipe trains."""
ROWS = 5
LOSSES: dict[str, Any] = {"RectifiedFlow": RectifiedFlow, "ScheduledDiffusion": ScheduledDiffusion}
TRAINER = tiny.Trainer(precision="fp32", batch_size=2)


@dataclass
class Found:
    """What holds of a class.

    Attributes:
        lists: its lists of blocks, and how many of how many of each can go.
        streams: what the blocks of each list hand on.
        objective: what a recipe trains it with, and what has to be set there.
        refused: why it cannot be pruned or trained; said before anything is spent.
    """

    lists: str = ""
    streams: str = ""
    objective: str = ""
    refused: str = ""

    def row(self, name: str) -> str:
        """Its row of the page."""
        beside = "same" if name in COMPARED else f"not compared: {NOT_COMPARED.get(name, 'nobody has done it')}"
        return f"| `{name}` | {self.refused or ' | '.join((self.lists, self.streams, self.objective, beside))} |"


def objective(name: str) -> dict[str, Any]:
    """The objective of a class, as a recipe names it."""
    if name in FAMILIES:
        loss = FAMILIES[name].loss
        kind, options = type(loss).__name__, {k: v for k, v in vars(loss).items() if k in ("scheduler", "settings")}
    elif name in SCHEDULED:
        kind, options = "ScheduledDiffusion", SCHEDULED[name]
    else:
        kind, options = "RectifiedFlow", {} if name in FLOWS else {"scale": 1000.0}
    guided = DiffusersTransformer.random(config(name)).config().get("guidance_embeds", False)
    return {"class_path": kind, "init_args": {**options, **({"guidance": 3.5} if guided else {})}}


def examine(name: str, work: Path) -> Found:
    """Validate a recipe for a class; gate, prune, save and load it, and search three steps.

    Raises:
        AssertionError: what is promised of every class does not hold.
    """
    torch.manual_seed(0)
    told = objective(name)
    try:
        for problem in make_plan(tiny.load_recipe(str(recipe_of(name, work)))).problems:
            raise tiny.UserError(problem)
        loss = LOSSES[told["class_path"]](**told["init_args"])
        backbone = DiffusersTransformer(model=str(work / "full"), **options(name))
        task = _task(backbone, loss)
        decision = tiny.Search(keep={path: max(1, n - 1) for path, n in task.lists.items()}, steps=3)(task, TRAINER)
    except tiny.UserError as e:
        return Found(refused=_one_line(e, work))
    num = len(task.blocks)
    assert len(decision.kept) == sum(max(1, n - 1) for n in task.lists.values())
    inputs = loss.prepare(task.train.columns, Rng(0, "test"))
    with torch.no_grad():
        plain = loss.predict(task.teacher, inputs)
    _check_gradients(task, inputs, plain)
    for gone in {0, num // 2, num - 1}:
        kept = [i for i in range(num) if i != gone]
        _check_student(task, kept, inputs, plain, work / f"student{gone}")
    streams = [" and ".join(f"`{s.argument}`" for s in some) for some in backbone.streams.values()]
    sizes = [f"`{path}` {n} of {len(task.teacher.get_submodule(path))}" for path, n in task.lists.items()]
    unknown = ", with `scale`" if "scale" in told["init_args"] else ""
    guided = ", with `guidance`" if "guidance" in told["init_args"] else ""
    return Found("; ".join(sizes), "; ".join(streams), f"`{told['class_path']}`{unknown}{guided}")


def options(name: str) -> dict[str, Any]:
    """The latents and texts of a class: the first sizes that it takes, and short texts where it leaves a choice."""
    for latent in (None, [2, 4, 4] if "3D" in name else [4, 4]):
        for length in (5, None):
            options = {"latent": latent, "text_length": length}
            try:
                DiffusersTransformer.random(config(name), **options).example(1)
            except tiny.UserError as e:
                error = e
            else:
                return options
    raise error


def recipe_of(name: str, work: Path) -> Path:
    """A recipe beside what it needs, a random teacher and data."""
    backbone = DiffusersTransformer.random(config(name), **options(name))
    _ = backbone.streams  # before anything is written
    model = backbone.build()
    (work / "full").mkdir()
    backbone.save(model, work / "full")
    (work / "data").mkdir()
    for key, column in _columns(backbone).items():
        np.save(work / "data" / f"{key}.npy", column.numpy())
    content = {
        "backbone": {
            "class_path": "DiffusersTransformer",
            "init_args": {"model": str(work / "full"), **options(name)},
        },
        "loss": objective(name),
        "data": {"class_path": "EncodedPrompts", "init_args": {"folder": str(work / "data"), "num_held_out": 2}},
        "trainer": {"precision": "fp32", "batch_size": 2},
        "search": {"class_path": "Search", "init_args": {"keep": len(backbone.blocks(model)) - 1, "steps": 2}},
        "recover": {"steps": 2},
        "evaluate": [],
    }
    path = work / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def _columns(backbone: DiffusersTransformer) -> dict[str, Tensor]:
    batch = backbone.example(ROWS)
    for key, value in batch.items():
        if value.is_floating_point():
            value.normal_(generator=generator("sweep", key))
    return batch


def _task(backbone: DiffusersTransformer, loss: LossAdapter) -> tiny.Task:
    data = Tensors(_columns(backbone))
    return tiny.Task(backbone=backbone, loss=loss, train=data, held_out=data)


def _gates(task: tiny.Task) -> Gates:
    return Gates(task.teacher, task.blocks, task.batch_dim(task.teacher), task.backbone.streams)


def _check_gradients(task: tiny.Task, inputs: dict[str, Tensor], plain: Tensor) -> None:
    """All ones is the plain network to the last bit; sparse gradients are those of the dense formula."""
    mask = (torch.rand(ROWS, len(task.blocks)) < 0.5).float().requires_grad_()
    (wanted,) = torch.autograd.grad(dense(task, mask, inputs).square().mean(), [mask])
    with _gates(task) as gates:
        gates.mask = torch.ones_like(mask)
        with torch.no_grad():
            assert torch.equal(task.loss.predict(task.teacher, inputs), plain), "all ones"
        gates.mask = mask
        (found,) = torch.autograd.grad(task.loss.predict(task.teacher, inputs).square().mean(), [mask])
    assert (found != 0).any(0).all(), "a gate without gradient"
    assert relative(found, wanted) < 1e-4, "gradient"


def _check_student(task: tiny.Task, kept: list[int], inputs: dict[str, Tensor], plain: Tensor, path: Path) -> None:
    """Gates closed is blocks removed, to the last bit, also after diffusers has read what was saved."""
    decision = tiny.Keep(kept)(task, tiny.Trainer())
    student: Any = tiny.prune(task, decision)
    with torch.no_grad(), _gates(task) as gates:
        gates.mask = torch.tensor([[float(i in kept) for i in range(len(task.blocks))]] * ROWS)
        gated = task.loss.predict(task.teacher, inputs)
    assert not torch.equal(gated, plain), "a block that does nothing"
    tiny.save_pretrained(student, task, decision, path)
    for read in (student, type(student).from_pretrained(path), diffusers.AutoModel.from_pretrained(str(path))):
        assert type(read) is type(student)
        with torch.no_grad():
            assert torch.equal(task.loss.predict(read.eval(), inputs), gated), f"gated is not pruned: {kept}"


def _one_line(error: Exception, work: Path) -> str:
    text = re.sub(r"\s+", " ", str(error)).replace("|", "\\|").replace("<", "&lt;")
    return text.replace(str(work / "full"), "the folder")[:300]


HEAD = """# Families of diffusers

Every transformer of diffusers {version}, as a small random model: the defaults of its class, with sizes that one table
of names decides (`tests/diffusers_sweep.py`). Of each that works, a recipe is validated and a search of three steps is
made. Three blocks go, each by itself: the first, one in the middle and the last.

- All gates open is the plain network, to the last bit.
- One gate closed is the block removed, to the last bit. Saved and read by the class and by `AutoModel`, the student
  gives the same numbers.
- Sparse gradients of the gates are those of the dense formula.

Where not all of the blocks can go, the config cannot say what is left without the others. `scale` has to be set where
it is not known how the pipeline counts time. The last column says whether a test compares what the objective samples
with what the published pipeline of diffusers samples, made of small random parts. Of the others
`tinyfusion validate` says that it was not.

This page is generated: `python tests/diffusers_sweep.py`.
"""
COLUMNS = "| class | blocks that can go | streams | objective | beside the pipeline |\n|---|---|---|---|---|\n"


def page(found: dict[str, Found]) -> str:
    """The page of these classes."""
    work = [f.row(n) for n, f in found.items() if not f.refused]
    rest = [f.row(n) for n, f in found.items() if f.refused]
    text = HEAD.format(version=diffusers.__version__)
    text += f"\n## Train by a recipe: {len(work)}\n\n{COLUMNS}" + "\n".join(work)
    text += f"\n\n## Are refused before anything is spent: {len(rest)}\n\n| class | why |\n|---|---|\n"
    return text + "\n".join(rest) + "\n"


def main() -> None:
    """Write the page, and name what is neither right nor refused."""
    found, faults = swept(sys.argv[1:] or CLASSES, examine)
    if not sys.argv[1:]:
        PAGE.write_text(page(found))
    sys.exit("\n".join(faults) or None)


if __name__ == "__main__":
    main()
