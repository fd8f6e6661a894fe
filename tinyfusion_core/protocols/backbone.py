"""The interface of a model family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from ..errors import UserError, nearest
from ..parsing.settings import Settings
from ..parsing.weights import load_strict, read_weights
from ..runtime.files import NEUTRAL, save_tensors
from .blocks.branches import REMOVED, Branch, Removed, remove_branches, removed_branches
from .blocks.paths import expand, list_of
from .blocks.streams import FIRST, Streams, Unneeded
from .data import Lookup

Batch = Mapping[str, Tensor]
"""Columns of the data by name, each (batch, ...)."""
WEIGHTS = "model.safetensors"


@dataclass(frozen=True, kw_only=True, eq=False)
class Backbone(Settings, ABC):
    """A model family: how to build the network, and which of its blocks can be removed.

    Subclasses are frozen dataclasses; their fields are the options of the recipe. Import heavy libraries inside the
    methods.

    Args:
        units: what can go, by name: residual branches inside the blocks, such as [attention, mlp], each by itself. By
            default whole blocks.
    """

    #: Residual streams of a block, in no particular order; by block list where lists differ.
    streams: ClassVar[Streams] = FIRST
    #: Outputs of a block, by index or key, that are no stream and that nobody needs, such as attention weights.
    #: They are None while blocks are gated: a block then runs for some of the samples only. A mapping says by which
    #: arguments the next block may be given them; if it takes one of these, a skipped block hands on what it was given.
    unneeded: ClassVar[Unneeded] = ()
    #: Block arguments that carry the batch, as name -> batch dimension. None: found by comparing two batch sizes.
    batched: ClassVar[Mapping[str, int] | None] = None
    #: For the model card of a saved folder: the library that reads it, and how.
    library: ClassVar[str] = "tinyfusion"
    loading: ClassVar[str] = 'import tinyfusion_core as tiny\n\nmodel = tiny.load_pretrained("path/to/this/folder")'

    units: Sequence[str] = field(default=(), metadata={NEUTRAL: []})

    @abstractmethod
    def build(self) -> nn.Module:
        """Build the full-depth network with its pretrained weights, in eval mode.

        Raises:
            UserError: the checkpoint is missing, damaged or of another architecture.
        """

    def check_weights(self) -> None:
        """Check that the weights that `build` reads are there and fit, as far as that takes seconds.

        Plans do, before anything is spent. By default nothing is checked.

        Raises:
            UserError: they are missing, damaged or of another architecture.
        """
        return

    @property
    def origin(self) -> str | None:
        """The file, folder or id that the sizes of the network come from, for messages; None: the recipe."""
        return None

    @abstractmethod
    def config(self, model: nn.Module | None = None) -> dict[str, Any]:
        """Return JSON-able keywords from which `construct` rebuilds `model` as it is, pruned or not.

        Without a model: the keywords of the network that `build` would return. Reads no weights.
        """

    @classmethod
    @abstractmethod
    def construct(cls, config: Mapping[str, Any]) -> nn.Module:
        """Build the untrained network of a `config`. Must work under `torch.device("meta")`."""

    @abstractmethod
    def blocks(self, model: nn.Module) -> Sequence[str]:
        """Return the paths of the blocks in execution order; `"blocks.*"` stands for all children of `blocks`."""

    @abstractmethod
    def after_prune(self, model: nn.Module, kept: Mapping[str, Sequence[int]]) -> None:
        """Repair in place what the module lists cannot express (depth in a config, layer indices).

        Args:
            model: the network, its lists already shortened.
            kept: for every block list, the indices of the children that were kept.
        """

    @abstractmethod
    def example(self, num_rows: int) -> dict[str, Tensor]:
        """Return a batch with the shapes of real data and arbitrary values, for probing and counting.

        Args:
            num_rows: batch size.

        Returns:
            Tensors by name, each (batch, ...).
        """

    def num_labels(self, model: nn.Module) -> int | None:
        """Return the number of class labels the network can generate for; None if it does not say.

        By default, `num_classes` of its configuration. Labels run from 0 to one below it.
        """
        return self.config(model).get("num_classes")

    def lookups(self, model: nn.Module) -> Mapping[str, Lookup]:
        """Return the tables in which the network looks up the values of columns of the data, by column.

        Data outside of them are refused. By default none, besides `num_labels` for the labels.
        """
        return {}

    def clients(self, model: nn.Module, student: nn.Module, kept: Sequence[int]) -> Mapping[str, str]:
        """Return the tools that take a decision or a student, and why what they make of it would be wrong.

        A reason by tool, empty where the result is right. `export` refuses a tool of the name of its form that has a
        reason. By default nothing is known of any.

        Args:
            model: the whole network, on any device, `meta` too.
            student: it without the other blocks.
            kept: indices of the kept blocks.
        """
        return {}

    def limits(self, model: nn.Module) -> Mapping[str, Sequence[Any]]:
        """Return the constraints that every mask has to obey, or what is left could not be saved: by default none.

        They go into the constraints of every search. By name, as in a recipe: blocks to `protect`, or the `period` of
        their kinds.

        Args:
            model: the whole network, on any device, `meta` too.

        Raises:
            UserError: none of its blocks can go.
        """
        return {}

    @classmethod
    @abstractmethod
    def tiny(cls) -> Backbone:
        """Return an instance that runs in milliseconds, with random non-zero weights, for the conformance checks."""

    def block_paths(self, model: nn.Module) -> list[str]:
        """Return the paths of all blocks in execution order: `blocks`, expanded and checked.

        Raises:
            UserError: a path does not exist, is named twice or lies inside another.
        """
        try:
            return expand(model, self.blocks(model))
        except UserError as e:
            raise UserError(f"{owner(self)}: blocks: {e}") from None

    def branches(self, model: nn.Module) -> Mapping[str, Branch]:
        """Return the residual branches inside of a block, by name, in execution order; `units` chooses among them.

        Together they are all that a block does to its stream, so that one without any can be removed whole. A block may
        lack some. By default there are none, and only whole blocks can go.
        """
        return {}

    def branches_in(self, model: nn.Module, block: str) -> dict[str, Branch]:
        """Return the branches that a block still has, by path, in execution order."""
        inside = dict(model.get_submodule(block).named_modules())
        left = [branch for branch in self.branches(model).values() if branch.path in inside]
        return {f"{block}.{b.path}": b for b in left if not isinstance(inside[b.path], Removed)}

    def unit_paths(self, model: nn.Module) -> list[str]:
        """Return the paths of all that can go: of the blocks, or of their branches, one kind after another.

        Raises:
            UserError: `units` names branches that the network does not have.
        """
        return list(self._units(model)) if self.units else self.block_paths(model)

    def unit_streams(self, model: nn.Module) -> Streams:
        """Return the streams of what can go, see `unit_paths`."""
        return {list_of(path): b.streams for path, b in self._units(model).items()} if self.units else self.streams

    def _units(self, model: nn.Module) -> dict[str, Branch]:
        """The branches that `units` names, by path, one kind after another, each in execution order."""
        known = self.branches(model)
        if not known:
            raise UserError(f"{owner(self)}: units: no branches of its blocks are known; leave units out")
        for name in self.units:
            if name not in known:
                raise UserError(f"{owner(self)}: units: no '{name}'{nearest(name, known)}")
        chosen = [branch for name, branch in known.items() if name in self.units]
        inside = [self.branches_in(model, block) for block in self.block_paths(model)]
        found = {path: b for branch in chosen for some in inside for path, b in some.items() if b == branch}
        if not found:
            paths = " or ".join(f"'{branch.path}'" for branch in chosen)
            raise UserError(
                f"{owner(self)}: branches: no block has a module {paths}; name modules inside of the blocks"
            )
        return found

    def source(self) -> dict[str, Any]:
        """Return the source of the weights for the record: `checkpoint`, `sha256`, `licence`; `weights`, if decoded."""
        return {}

    def save(self, model: nn.Module, folder: Path) -> list[str]:
        """Write a network to an empty folder and return the file names, which `load` reads and the core verifies.

        By default `model.safetensors`. A family that other software reads should write that software's files; if
        `config.json` is one of them, the core's record of the folder is `tinyfusion.json`.
        """
        save_tensors(folder / WEIGHTS, model.state_dict())
        return [WEIGHTS]

    def export(self, model: nn.Module, library: str, folder: Path) -> None:
        """Write a network as a folder of another library, `transformers` or `diffusers`, or as a `single-file`.

        By default what `save` writes, if `library` can read it. A single file has the names that the publisher gave the
        weights.

        Raises:
            UserError: that library has no such network.
        """
        if library != self.library:
            raise UserError(f"--to {library}: {type(self).__name__} has no form in {library}")
        self.save(model, folder)

    @classmethod
    def load(cls, folder: Path, config: Mapping[str, Any]) -> nn.Module:
        """Load a network that `save` wrote, as anybody would who has the files: saving compares the two bit by bit.

        By default in the dtypes in which it was saved.

        Args:
            folder: where the files are.
            config: what `config` returned for it.

        Raises:
            UserError: the weights do not fit such a network, none missing and none left over.
        """
        tensors = read_weights(folder / WEIGHTS)
        model = constructed(cls, config, str(folder))
        load_strict(model, tensors, folder / WEIGHTS)
        for name, tensor in model.state_dict(keep_vars=True).items():
            tensor.data = tensor.data.to(tensors[name].dtype)
        return model


def config_of(backbone: Backbone, model: nn.Module) -> dict[str, Any]:
    """Return the JSON-able keywords from which `constructed` rebuilds a network as it is, without what it has lost."""
    removed = {path: asdict(branch) for path, branch in removed_branches(model).items()}
    return backbone.config(model) | ({REMOVED: removed} if removed else {})


def constructed(backbone: Backbone | type[Backbone], config: Mapping[str, Any], whose: str = "") -> nn.Module:
    """Build the untrained network of a config that may come from anywhere.

    Args:
        backbone: the model family.
        config: what it builds the network from.
        whose: where the sizes come from, to begin a message with; by default the backbone's name.

    Raises:
        UserError: the sizes make no network.
    """
    whose = whose or owner(backbone)
    try:
        model = backbone.construct({key: value for key, value in config.items() if key != REMOVED})
        remove_branches(model, {path: Branch(**told) for path, told in config.get(REMOVED, {}).items()})
        return model
    except UserError as e:
        raise e if whose in str(e) else UserError(f"{whose}: {e}") from e
    except Exception as e:  # of any library's constructor
        reason = f"{type(e).__name__}: {' '.join(str(e).split())}"
        raise UserError(f"{whose}: its sizes make no network ({reason}); correct them") from e


def owner(thing: object) -> str:
    """Name a backbone or loss, to begin a message with: by its class and module, or as its `called` says."""
    return getattr(thing, "called", f"{type(thing).__name__} (of {type(thing).__module__})")
