"""Train an included feature space: `python -m tinyfusion_images.train_features fashion`."""

from __future__ import annotations

import sys

import torch
from torch import nn

from tinyfusion_core.dataloading.order import Order
from tinyfusion_core.protocols.data import DataSource
from tinyfusion_core.runtime.files import save_tensors
from tinyfusion_images.digits import Digits
from tinyfusion_images.fashion import NUM_TEST, Fashion
from tinyfusion_images.features import fresh, weights

DATA: dict[str, DataSource] = {"digits": Digits(), "fashion": Fashion(num_held_out=NUM_TEST)}
STEPS = {"digits": 1500, "fashion": 5000}
BATCH_SIZE, SEED = 128, 0


def main(name: str) -> None:
    """Train the classifier of a data set, write its weights and print its held-out accuracy."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    data, steps = DATA[name], STEPS[name]
    train, held_out = data.train(), data.held_out()
    model = fresh(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = Order(SEED, "features", len(train), BATCH_SIZE)
    for indices in order.steps(0, steps, 0, BATCH_SIZE):
        batch = train.__getitems__(indices)
        # Shifts by up to one pixel and a little noise keep the features smooth on generated images.
        shift = [int(s) for s in torch.randint(-1, 2, (2,))]
        images = batch["x"].roll(shift, (2, 3)) + 0.1 * torch.randn(batch["x"].shape)
        loss = nn.functional.cross_entropy(model(images)[1], batch["y"], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    batch = held_out.__getitems__(list(range(len(held_out))))
    with torch.no_grad():
        logits = model.eval()(batch["x"])[1]
    accuracy = (logits.argmax(1) == batch["y"]).float().mean()
    save_tensors(weights(name), model.state_dict(), {"held_out_accuracy": f"{accuracy:.4f}", "licence": "Apache-2.0"})
    print(f"held-out accuracy {accuracy:.4f} -> {weights(name)}")


if __name__ == "__main__":
    main(sys.argv[1])
