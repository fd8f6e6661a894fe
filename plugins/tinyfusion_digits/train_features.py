"""Make `features.safetensors`: `python -m tinyfusion_digits.train_features`. Prints the held-out accuracy."""

from __future__ import annotations

import torch
from torch import nn

from tinyfusion_core.files import save_tensors
from tinyfusion_core.randomness import Order

from .data import Digits
from .features import WEIGHTS, DigitsFeatures

STEPS, BATCH_SIZE, SEED = 1500, 128, 0


def main() -> None:
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    train, held_out = Digits().train(), Digits().held_out()
    model = DigitsFeatures()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    order = Order(SEED, "features", len(train), BATCH_SIZE)
    for indices in order.steps(0, STEPS, 0, BATCH_SIZE):
        batch = train.__getitems__(indices)
        # Shifts by up to one pixel and a little noise keep the features smooth on generated images.
        shift = [int(s) for s in torch.randint(-1, 2, (2,))]
        images = batch["x"].roll(shift, (2, 3)) + 0.1 * torch.randn(batch["x"].shape)
        loss = nn.functional.cross_entropy(model(images)[1], batch["y"], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        logits = model.eval()(held_out.columns["x"])[1]
    accuracy = (logits.argmax(1) == held_out.columns["y"]).float().mean()
    save_tensors(WEIGHTS, model.state_dict(), {"held_out_accuracy": f"{accuracy:.4f}", "licence": "Apache-2.0"})
    print(f"held-out accuracy {accuracy:.4f} -> {WEIGHTS}")


if __name__ == "__main__":
    main()
