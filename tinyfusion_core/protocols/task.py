"""The task: a network, its objective and its data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import UserError, first_line
from ..parsing.settings import Settings
from ..runtime.seeding import Rng
from .backbone import Backbone, owner
from .blocks.batch import BatchDim, named_batch_dims, probed_batch_dims
from .blocks.call import not_the_batch, watched_streams
from .blocks.paths import list_lengths
from .blocks.streams import Streams
from .data import DataSource, FeatureSpace, Samples, Tensors, Varied, as_samples
from .loss import LossAdapter
from .undisturbed import evaluating


@dataclass(eq=False, kw_only=True)
class Task(Settings):
    """One model family, objective and data set.

    Args:
        backbone: the model family.
        loss: the objective.
        train: training samples; whatever `as_samples` takes.
        held_out: samples that no stage trains on; the same.
        feature_space: features in which generated and real examples are compared.
        data: the data source, for metrics and commands of plugins that use further methods of it.
        model: the network to prune; by default the backbone builds it on first use.
        origin: source of `model`; by default the backbone's source.
    """

    backbone: Backbone
    loss: LossAdapter
    train: Samples
    held_out: Samples
    feature_space: FeatureSpace | None = None
    data: DataSource | None = None
    model: nn.Module | None = None
    origin: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        self.train = as_samples(self.train, "train (of Task)")
        self.held_out = as_samples(self.held_out, "held_out (of Task)")

    @classmethod
    def without_data(cls, backbone: Backbone, loss: LossAdapter, model: nn.Module) -> Self:
        """Return a task with the backbone's example as data, to measure what a network costs and how it runs."""
        examples = Tensors(backbone.example(1))
        return cls(backbone=backbone, loss=loss, train=examples, held_out=examples, model=model)

    @property
    def conditions(self) -> str:
        """Name of the column with the conditions of generation; see `DataSource`."""
        return DataSource.conditions if self.data is None else self.data.conditions

    @property
    def source(self) -> Mapping[str, Any]:
        """Checkpoint, hash and licence of the teacher, for the record."""
        return self.backbone.source() if self.origin is None else self.origin

    @cached_property
    def teacher(self) -> nn.Module:
        """The full-depth network; stages that need a mode put it there, and leave it as it was."""
        return self.backbone.build() if self.model is None else self.model

    @cached_property
    def blocks(self) -> list[str]:
        """Paths of all that can go, list by list in execution order: of the blocks, or of branches inside them."""
        return self.backbone.unit_paths(self.teacher)

    @property
    def streams(self) -> Streams:
        """Streams of what can go, by block list where they differ."""
        return self.backbone.unit_streams(self.teacher)

    @property
    def lists(self) -> dict[str, int]:
        """Length of every block list."""
        return list_lengths(self.blocks)

    def batch_dim(self, model: nn.Module) -> BatchDim:
        """Return which block arguments carry the batch, as the backbone declares or as probing finds."""
        if self.backbone.batched is not None:
            return named_batch_dims(self.backbone.batched)
        device = next(model.parameters()).device
        sources, samples = [self.backbone.example], self.train
        # What checks samples when they are read, or is a part of others, has them as `samples`.
        while not isinstance(samples, Varied) and hasattr(samples, "samples"):
            samples = samples.samples
        if isinstance(samples, Varied):
            sources.append(samples.fullest)

        def run(num_rows: int) -> None:
            for source in sources:
                batch = {name: t.to(device) for name, t in source(num_rows).items()}
                self.loss.predict(model, self.loss.prepare(batch, Rng(0, "probe")))

        with torch.random.fork_rng(), evaluating(model):
            return probed_batch_dims(model, self.blocks, run)


def check_loss_fits(backbone: Backbone, loss: LossAdapter, model: nn.Module) -> None:
    """Check that a loss and the blocks' streams fit a network on the meta device.

    Raises:
        UserError: they do not.
    """
    example = backbone.example(2)
    try:
        inputs = loss.prepare(example, Rng(0, "plan"))
        with torch.no_grad():
            on_meta = {name: t.to("meta") for name, t in inputs.items()}
            with watched_streams(model, backbone.unit_paths(model), backbone.unit_streams(model)) as seen:
                prediction = loss.predict(model.eval(), on_meta)
            for passage in seen:
                if passage.before[0] != passage.after[0]:
                    raise UserError(f"{owner(backbone)}: blocks: {passage}")
                if (found := passage.before[0][0]) != 2:
                    raise UserError(f"{owner(backbone)}: blocks: {not_the_batch(passage.path, found, 2)}")
            if all(isinstance(leaf, Tensor) for leaf in tree_leaves(prediction)):
                # The loss on zeros of the prediction's shape: the meta device cannot look values up in tables.
                prediction, on_meta = tree_map(lambda x: torch.zeros(x.shape), prediction), inputs
            loss.per_sample(loss.loss(prediction, on_meta), on_meta)
    except NotImplementedError:
        return  # an operation without a meta kernel: the run itself will tell
    except RuntimeError as e:
        if "meta tensors" in str(e) or "'meta'" in str(e):
            return  # it looks at values, or casts by device: the run itself will tell
        raise UserError(
            f"loss: {owner(loss)} does not fit the network ({first_line(e)}); compare their options"
        ) from None
    except (AttributeError, LookupError, TypeError, ValueError) as e:  # it is made for samples or predictions of others
        raise UserError(
            f"loss: {owner(loss)} does not fit {owner(backbone)} ({type(e).__name__}: {first_line(e)}), whose samples "
            f"have {', '.join(example)}; take a loss that is made for it"
        ) from e
