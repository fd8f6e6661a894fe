"""Somebody's training with accelerate, in the middle of which a network is pruned, or nothing is done.

`accelerate_script.py RESULT [prune]`
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from accelerate import Accelerator
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

import tinyfusion_core as tiny
from toys import Chain

torch.manual_seed(0)
accelerator = Accelerator(gradient_accumulation_steps=3, mixed_precision="bf16", cpu=True)
x = torch.randn(64, 8)
data = TensorDataset(x, x.roll(1, dims=1))
network = Chain(8, [1.0] * 6)
optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4)
model, optimizer, loader, scheduler = accelerator.prepare(
    network, optimizer, DataLoader(data, batch_size=8, shuffle=True), scheduler
)


def prune() -> torch.nn.Module:
    """With the same processes, device and precision, and the loader as data."""
    task = tiny.wrap(
        accelerator.unwrap_model(model),
        blocks="blocks.*",
        loss_fn=lambda model, batch: (model(batch["0"]) - batch["1"]).square().mean(1),
        data=loader,
    )
    trainer = tiny.Trainer(batch_size=16, progress=False)
    assert trainer.accelerator.num_processes == accelerator.num_processes
    assert trainer.accelerator.mixed_precision == "bf16"
    decision = tiny.Search(keep=3, steps=6)(task, trainer)
    student = tiny.prune(task, decision)
    before = [p.clone() for p in student.parameters()]
    tiny.Recover(steps=6, lr=1e-2)(task, student, decision, trainer)
    assert all(not torch.equal(p, old) for p, old in zip(student.parameters(), before, strict=True))
    return student


student = None
for epoch in range(2):
    for i, (inputs, targets) in enumerate(loader):
        with accelerator.accumulate(model):
            accelerator.backward(mse_loss(model(inputs), targets))
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            if (epoch, i) == (0, 1):  # gradients of two passes wait for the third
                assert not accelerator.sync_gradients
                waiting = [p.grad.clone() for p in network.parameters()]
                student = prune() if "prune" in sys.argv else None
                assert all(torch.equal(p.grad, g) for p, g in zip(network.parameters(), waiting, strict=True))
assert accelerator.gradient_accumulation_steps == 3
assert (len(accelerator._models), len(accelerator._optimizers)) == (1, 1)
if student is not None:  # recovered further by the script's own means
    own = torch.optim.SGD(student.parameters(), lr=1e-2)
    student, own = accelerator.prepare(student.train(), own)
    for inputs, targets in loader:
        with accelerator.accumulate(student):
            accelerator.backward(mse_loss(student(inputs), targets))
            own.step()
            own.zero_grad()
if accelerator.is_main_process:
    torch.save(accelerator.unwrap_model(model).state_dict(), sys.argv[1])
