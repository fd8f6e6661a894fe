"""Somebody's training with Lightning, in the middle of which a network is pruned, or nothing is done.

`lightning_script.py RESULT [prune]`
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import lightning as L
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

import tinyfusion_core as tiny
from toys import Chain

torch.manual_seed(0)
x = torch.randn(64, 8)
loader = DataLoader(TensorDataset(x, x.roll(1, dims=1)), batch_size=8, shuffle=True)


class Module(L.LightningModule):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.student: nn.Module | None = None

    def training_step(self, batch: Any) -> torch.Tensor:
        loss = mse_loss(self.network(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.network.parameters(), lr=1e-2)

    def on_train_epoch_end(self) -> None:
        if "prune" in sys.argv and self.current_epoch == 0 and len(self.network.blocks) == 6:
            pruned.append(prune(self))


class Forward(tiny.Callback):
    """Sends the lines of a search and a recovery to what the module logs to."""

    def __init__(self, module: L.LightningModule) -> None:
        self.module = module
        self.sent: list[str] = []

    def on_log(self, at: tiny.Moment, values: Mapping[str, Any]) -> None:
        self.module.log(f"{at.stage}/loss", values["loss"])
        self.sent.append(at.stage)


pruned: list[nn.Module] = []


def prune(module: Module) -> nn.Module:
    forward = Forward(module)
    task = tiny.wrap(
        module.network,
        blocks="blocks.*",
        loss_fn=lambda model, batch: (model(batch["0"]) - batch["1"]).square().mean(1),
        data=loader,
    )
    trainer = tiny.Trainer(batch_size=16, callbacks=[forward], progress=False)
    decision = tiny.Search(keep=3, steps=6)(task, trainer)
    student = tiny.prune(task, decision)
    tiny.Recover(steps=6, lr=1e-2)(task, student, decision, trainer)
    assert set(forward.sent) == {"search", "recover"}
    return student


def fit(module: L.LightningModule, epochs: int) -> L.Trainer:
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    return trainer


module = Module(Chain(8, [1.0] * 6))
trainer = fit(module, epochs=2)
if "prune" in sys.argv:
    assert {"search/loss", "recover/loss", "loss"} <= trainer.callback_metrics.keys()
    (student,) = pruned
    fit(Module(student.train()), epochs=1)  # recovered further by the script's own means
    assert len(student.blocks) == 3
torch.save(module.network.state_dict(), sys.argv[1])
