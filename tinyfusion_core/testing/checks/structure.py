"""Checks of a backbone: its network, its blocks, and how both are rebuilt."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import subprocess
import sys
from dataclasses import fields, is_dataclass

import torch
from torch import nn

from ...protocols.backbone import config_of, constructed
from ...protocols.blocks.call import watched_streams
from ..assertions import expect, expect_same, removing
from ..subject import NUM_ROWS, Subject

HEAVY = frozenset(
    [
        *("accelerate", "cv2", "datasets", "diffusers", "jax", "lm_eval", "matplotlib", "pandas", "peft", "scipy"),
        *("sklearn", "tensorflow", "timm", "torch_fidelity", "torchvision", "transformers"),
    ]
)
"""Libraries that importing a plugin must not import: they belong inside its methods."""


def check_tiny(subject: Subject) -> None:
    """`tiny` is in eval mode and reproducible, no parameter is all zeros; `example` gives the rows asked for."""
    model, again = subject.backbone.build(), subject.backbone.build()
    name = type(subject.backbone).__name__
    expect(not model.training, f"{name}.build returns a network in training mode; end it with model.eval()")
    expect_same(
        model.state_dict(), again.state_dict(), f"{name}.build gives other weights each time; seed its generator"
    )
    zeros = [key for key, p in model.named_parameters() if not p.any()]
    expect(not zeros, f"{name}.tiny: {zeros[:3]} is all zeros, which hides mistakes; draw every weight at random")
    for num in (1, NUM_ROWS):
        for key, t in subject.backbone.example(num).items():
            expect(len(t) == num, f"{name}.example({num}): '{key}' has {len(t)} rows")


def check_blocks(subject: Subject) -> None:
    """Blocks exist, are children of lists, each named once, none inside another, in execution order; so do branches."""
    model = subject.backbone.build()
    blocks, name = subject.backbone.unit_paths(model), f"{type(subject.backbone).__name__}.blocks"
    expect(len(blocks) >= 2, f"{name} names {len(blocks)} block(s) of the tiny network; it needs 2 or more")
    for path in subject.backbone.block_paths(model):
        parent = model.get_submodule(path.rpartition(".")[0])
        expect(
            isinstance(parent, (nn.ModuleList, nn.Sequential)),
            f"{name}: '{path}' is a child of a {type(parent).__name__}; blocks live in a ModuleList or Sequential",
        )
    ran: list[str] = []
    with removing(
        model.get_submodule(path).register_forward_pre_hook(lambda _m, _args, path=path: ran.append(path))
        for path in blocks
    ):
        _no_grad_losses(subject, model)
    if subject.backbone.units:  # which are given one kind after another
        ran.sort(key=blocks.index)
    expect(ran == blocks, f"{name} gives {blocks}, but they run as {ran}; name each once, in the order of execution")


def check_streams(subject: Subject) -> None:
    """Every block returns its streams in the shape and dtype in which they entered."""
    model = subject.backbone.build()

    with watched_streams(model, subject.backbone.unit_paths(model), subject.backbone.unit_streams(model)) as seen:
        _no_grad_losses(subject, model)
    for passage in seen:
        expect(passage.before == passage.after, str(passage))


def check_meta_device(subject: Subject) -> None:
    """`construct` rebuilds full and pruned networks from `config` on the meta device, as plans need it."""
    name = type(subject.backbone).__name__
    for model in (subject.backbone.build(), subject.pruned(subject.every_other())):
        with torch.device("meta"):
            planned = constructed(subject.backbone, config_of(subject.backbone, model), name)
        shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (model, planned)]
        differ = sorted(k for k in shapes[0].keys() | shapes[1].keys() if shapes[0].get(k) != shapes[1].get(k))
        expect(not differ, f"{name}.construct(config) makes another network: {differ[:3]}; see config and after_prune")
        real = [k for k, p in planned.named_parameters() if not p.is_meta]
        expect(not real, f"{name}.construct: {real[:3]} is not on the meta device")


def check_light_import(subject: Subject) -> None:
    """Importing the plugin imports no heavy library besides torch."""
    classes = {cls.__module__: inspect.getfile(cls) for cls in (type(subject.backbone), type(subject.loss))}
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; import importlib, runpy\n"
        f"for name, file in {classes!r}.items():\n"
        "    try: importlib.import_module(name)\n"
        "    except ModuleNotFoundError as e:\n"
        "        if e.name != name: raise\n"
        "        runpy.run_path(file)\n"
        f"print(*sorted({set(HEAVY)!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    names = ", ".join(classes)
    expect(done.returncode == 0, f"{names}: cannot be imported in a new process: {done.stderr.strip()[-500:]}")
    heavy = done.stdout.strip()
    expect(not heavy, f"importing {names} imports {heavy}; do that inside of the methods that need it")


def check_copies(subject: Subject) -> None:
    """Backbone and loss are frozen dataclasses that can be copied and pickled; `config` survives JSON."""
    for thing in (subject.backbone, subject.loss):
        name = type(thing).__name__
        # Backbone is one itself, so what counts is the class that declares the options.
        declares = next((c for c in type(thing).__mro__ if inspect.get_annotations(c)), type(thing))
        frozen = "__dataclass_params__" in vars(declares) and is_dataclass(thing)
        expect(frozen, f"{name} is no frozen dataclass, whose fields would be its options")
        for how, again in (("deepcopy", copy.deepcopy(thing)), ("pickle", pickle.loads(pickle.dumps(thing)))):
            expect(again == thing, f"{name} is something else after {how}")
            own = [f.name for f in fields(thing) if f.compare]  # type: ignore[arg-type]
            expect(all(getattr(again, k) == getattr(thing, k) for k in own), f"{name} loses options by {how}")
    config = subject.backbone.config()
    again = json.loads(json.dumps(config, allow_nan=False))
    expect(again == copy.deepcopy(config), f"{type(subject.backbone).__name__}.config comes back otherwise from JSON")


def _no_grad_losses(subject: Subject, model: nn.Module) -> None:
    with torch.no_grad():
        subject.loss.losses(model, subject.inputs())
