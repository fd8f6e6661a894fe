"""The names that publishers gave the weights of their transformers, in single files.

diffusers has functions that convert such weights to its own. How they are named back is not written down here but
found out: a function is run on marks in place of tensors, and what it does with each is done backwards. It renames
them, takes some apart (query, key and value in one) and puts parts in another order (scale and shift).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion_core.errors import UserError, first_line
from tinyfusion_diffusers.structure import class_of, settings

AFFINE = ".{weight,bias}"
NAMES: Mapping[str, Sequence[str]] = {
    "FluxTransformer2DModel": (
        "{time,vector,guidance}_in.{in,out}_layer" + AFFINE,
        "{img,txt}_in" + AFFINE,
        "double_blocks.*.{img,txt}_mod.lin" + AFFINE,
        "double_blocks.*.{img,txt}_attn.{qkv,proj}" + AFFINE,
        "double_blocks.*.{img,txt}_attn.norm.{query,key}_norm.scale",
        "double_blocks.*.{img,txt}_mlp.{0,2}" + AFFINE,
        "single_blocks.*.{modulation.lin,linear1,linear2}" + AFFINE,
        "single_blocks.*.norm.{query,key}_norm.scale",
        "final_layer.{linear,adaLN_modulation.1}" + AFFINE,
    ),
    "SD3Transformer2DModel": (
        "pos_embed",
        "{x_embedder.proj,context_embedder}" + AFFINE,
        "{t,y}_embedder.mlp.{0,2}" + AFFINE,
        "joint_blocks.*.{x,context}_block.{attn.qkv,attn.proj,adaLN_modulation.1,mlp.fc1,mlp.fc2}" + AFFINE,
        "joint_blocks.*.{x,context}_block.attn.{ln_q,ln_k}.weight",
        "joint_blocks.*.x_block.attn2.{qkv,proj}" + AFFINE,
        "joint_blocks.*.x_block.attn2.{ln_q,ln_k}.weight",
        "final_layer.{linear,adaLN_modulation.1}" + AFFINE,
    ),
    "WanTransformer3DModel": (
        "{patch_embedding,time_projection.1}" + AFFINE,
        "{text,time}_embedding.{0,2}" + AFFINE,
        "blocks.*.{self,cross}_attn.{q,k,v,o}" + AFFINE,
        "blocks.*.{self,cross}_attn.{norm_q,norm_k}.weight",
        "blocks.*.cross_attn.{k_img,v_img}" + AFFINE,
        "blocks.*.cross_attn.norm_k_img.weight",
        "blocks.*.{norm3,ffn.0,ffn.2}" + AFFINE,
        "{blocks.*,head}.modulation",
        "{head.head,img_emb.proj.0,img_emb.proj.1,img_emb.proj.3,img_emb.proj.4}" + AFFINE,
    ),
    "ZImageTransformer2DModel": (
        "{x_embedder,t_embedder.mlp.0,t_embedder.mlp.2,cap_embedder.0,cap_embedder.1}" + AFFINE,
        "{x_pad_token,cap_pad_token}",
        "{layers,noise_refiner,context_refiner}.*.attention.{qkv,out,q_norm,k_norm}.weight",
        "{layers,noise_refiner,context_refiner}.*.feed_forward.{w1,w2,w3}.weight",
        "{layers,noise_refiner,context_refiner}.*.{attention_norm1,attention_norm2,ffn_norm1,ffn_norm2}.weight",
        "{layers,noise_refiner}.*.adaLN_modulation.0" + AFFINE,
        "final_layer.{linear,adaLN_modulation.1}" + AFFINE,
    ),
    "AuraFlowTransformer2DModel": (
        "{register_tokens,positional_encoding}",
        "{t_embedder.mlp.0,t_embedder.mlp.2,init_x_linear}" + AFFINE,
        "{cond_seq_linear,final_linear,modF.1}.weight",
        "double_layers.*.{modX.1,modC.1}.weight",
        "double_layers.*.{mlpX,mlpC}.{c_fc1,c_fc2,c_proj}.weight",
        "double_layers.*.attn.{w1q,w1k,w1v,w1o,w2q,w2k,w2v,w2o}.weight",
        "single_layers.*.modCX.1.weight",
        "single_layers.*.mlp.{c_fc1,c_fc2,c_proj}.weight",
        "single_layers.*.attn.{w1q,w1k,w1v,w1o}.weight",
    ),
    "LTXVideoTransformer3DModel": (
        "{patchify_proj,proj_out,adaln_single.linear}" + AFFINE,
        "{adaln_single.emb.timestep_embedder,caption_projection}.{linear_1,linear_2}" + AFFINE,
        "transformer_blocks.*.{attn1,attn2}.{to_q,to_k,to_v,to_out.0}" + AFFINE,
        "transformer_blocks.*.{attn1,attn2}.{q_norm,k_norm}.weight",
        "transformer_blocks.*.ff.net.{0.proj,2}" + AFFINE,
        "{scale_shift_table,transformer_blocks.*.scale_shift_table}",
    ),
    "QwenImageTransformer2DModel": (),
}  # fmt: skip
"""What publishers call the tensors of a network, and of its larger relatives: one of those in braces, `*` is the number
of a block. Empty if diffusers uses the same names.
"""


class _Rows:
    """Stands for some rows of a tensor of an original file while diffusers' function takes it apart."""

    shape = (0,)

    def __init__(self) -> None:
        self.parts: tuple[_Rows, ...] = ()

    def chunk(self, number: int, dim: int = 0) -> tuple[_Rows, ...]:
        assert dim == 0
        self.parts = tuple(_Rows() for _ in range(number))
        return self.parts

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        along = (kwargs or {}).get("dim", 0)
        if function is torch.cat and along == 0:
            return args[0][0] if len(args[0]) == 1 else _Joined(args[0])
        if function in (torch.chunk, torch.split):
            return args[0].chunk(args[1] if function is torch.chunk else len(args[1]), along)
        raise NotImplementedError(f"{function} of the rows of a tensor")


@dataclass(frozen=True, eq=False)
class _Joined:
    """Rows that diffusers' function puts one behind the other."""

    parts: Sequence[_Rows]


def converter(cls: type[nn.Module]) -> Callable[..., dict[str, Any]] | None:
    """Return diffusers' function that converts a publisher's weights to its own; None if it has none for a class."""
    # Private, and pinned by a test: what `from_single_file` goes by.
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    known: Mapping[str, Mapping[str, Any]] = SINGLE_FILE_LOADABLE_CLASSES  # type: ignore[assignment]
    return known.get(cls.__name__, {}).get("checkpoint_mapping_fn")


def converted(
    cls: type[nn.Module], tensors: dict[str, Tensor], config: Mapping[str, Any], like: nn.Module, whose: Path | str
) -> dict[str, Tensor]:
    """Return the weights of a single file by the names of diffusers: tensors of any shape.

    Args:
        cls: the transformer's class.
        tensors: what the file holds.
        config: the transformer's config.
        like: the transformer, on any device.
        whose: the file, for messages.

    Raises:
        UserError: these are the weights of another network.
    """
    convert, expected = converter(cls), like.state_dict()
    if convert is not None and tensors.keys() != expected.keys():
        some = min(tensors, default="none at all")
        try:
            tensors = convert(checkpoint=dict(tensors), config=dict(config))
        except Exception as e:  # it takes for granted that the names are right
            raise UserError(
                f"{whose}: is no {cls.__name__} as its publisher names it ({type(e).__name__}: {first_line(e)}; "
                f"there is {some}); is backbone.config_from that of the file?"
            ) from None
    wrong = [f"missing {name}" for name in expected if tensors.get(name) is None]
    wrong += [f"unexpected {name}" for name in tensors if name not in expected]
    wrong += [
        f"{name} {list(t.shape)} for {list(expected[name].shape)}"
        for name, t in tensors.items()
        if name in expected and t is not None and t.shape != expected[name].shape
    ]
    if wrong:
        raise UserError(f"{whose}: the weights do not fit the config: {', '.join(sorted(wrong)[:4])}")
    return tensors


def renamed(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of a transformer by the names of its publisher, blocks numbered anew: tensors of any shape.

    Raises:
        UserError: what these are is not known, not all the weights have one, or diffusers would read others.
    """
    cls = class_of(model)
    convert = converter(cls)
    if convert is None or cls.__name__ not in NAMES:
        raise UserError(
            f"--to single-file: the names that the publisher of {cls.__name__} gave the weights are not known; they "
            f"are for {', '.join(NAMES)}"
        )
    state: dict[str, Tensor] = model.state_dict()
    if not NAMES[cls.__name__]:
        return state
    whole, result = _all_traced(convert, model)
    if lost := sorted(state.keys() ^ result.keys()):
        raise UserError(f"--to single-file: the publisher of {cls.__name__} has no name for '{lost[0]}'")
    values: dict[_Rows, Tensor] = {}
    for name, made in result.items():
        values |= zip(_in_order(made), state[name].chunk(len(_in_order(made))), strict=True)
    found = {name: _put_together(rows, values) for name, rows in whole.items()}
    again = converted(cls, found, settings(model), model, "--to single-file, read as diffusers reads it")
    for name, tensor in state.items():
        if not torch.equal(again[name], tensor):
            raise UserError(f"--to single-file: diffusers would read another '{name}' than the student has")
    return found


def _all_traced(
    convert: Callable[..., dict[str, Any]], model: nn.Module
) -> tuple[dict[str, _Rows], dict[str, _Rows | _Joined]]:
    """Marks for what the network has, see `_traced`."""
    name, state = class_of(model).__name__, model.state_dict()
    depth = max(len(child) for child in model.children() if isinstance(child, nn.ModuleList))
    names = [spelled for template in NAMES[name] for spelled in _spelled(template, depth)]
    try:
        whole, result = _traced(convert, names, settings(model))
        used = {rows for key, made in result.items() if key in state for rows in _in_order(made)}
        # Names of which the network has nothing are not there either.
        return _traced(convert, [key for key in names if _leaves(whole[key]) <= used], settings(model))
    except Exception as e:  # of a function that was not made to be called like this
        raise UserError(
            f"--to single-file: diffusers' reader of files of {name} cannot be followed "
            f"({type(e).__name__}: {first_line(e)})"
        ) from None


def _spelled(template: str, depth: int) -> list[str]:
    """All names of a template: with one of those in braces, of each of some blocks."""
    if found := re.search(r"\{(.*?)\}", template):
        options = [template[: found.start()] + option + template[found.end() :] for option in found[1].split(",")]
        return [name for option in options for name in _spelled(option, depth)]
    return [template.replace("*", str(i)) for i in range(depth)] if "*" in template else [template]


def _traced(
    convert: Callable[..., dict[str, Any]], names: Sequence[str], config: Mapping[str, Any]
) -> tuple[dict[str, _Rows], dict[str, _Rows | _Joined]]:
    """Marks by the publisher's names, and what diffusers' function makes of them by its own."""
    whole = {name: _Rows() for name in names}
    made = convert(checkpoint=dict(whole), config=dict(config))
    return whole, {name: rows for name, rows in made.items() if rows is not None}


def _in_order(made: _Rows | _Joined) -> Sequence[_Rows]:
    return [made] if isinstance(made, _Rows) else made.parts


def _leaves(rows: _Rows) -> set[_Rows]:
    """The parts that rows were taken apart into, as far as it went."""
    return {leaf for part in rows.parts for leaf in _leaves(part)} if rows.parts else {rows}


def _put_together(rows: _Rows, values: Mapping[_Rows, Tensor]) -> Tensor:
    return torch.cat([_put_together(part, values) for part in rows.parts]) if rows.parts else values[rows]
