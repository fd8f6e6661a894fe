"""The conformance kit, and weights as timm publishes them."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from tinyfusion_timm import CrossEntropy, TimmViT

import tinyfusion_core as tiny
from tinyfusion_core.testing import parametrize_with_checks

SMALL = {"img_size": 16, "patch_size": 4, "num_classes": 5, "embed_dim": 16, "depth": 3, "num_heads": 2}


@parametrize_with_checks([(TimmViT, CrossEntropy), (TimmViT, CrossEntropy(shift=2, label_smoothing=0.1))])
def test_conformance(check):
    check()


def test_published_weights_are_read(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", **SMALL).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    backbone = TimmViT(options=SMALL, checkpoint=str(tmp_path / "model.safetensors"))
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(backbone.build()(x), model(x))
    assert backbone.example(2)["x"].shape == x.shape
    assert backbone.source()["sha256"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "vit_tinyy"}, "timm cannot make 'vit_tinyy'"),
        ({"model": "resnet18"}, "'resnet18' has no list `blocks`"),
        ({"checkpoint": "nowhere.pth"}, "no file 'nowhere.pth'"),
    ],
)
def test_what_cannot_be_had(options, message):
    with pytest.raises(tiny.UserError, match=message):
        backbone = TimmViT(**options)
        backbone.construct(backbone.config())
        backbone.build()


def test_every_image_is_shifted_by_its_own_draw_and_keeps_its_size():
    x = torch.arange(64.0).view(1, 1, 8, 8).expand(200, 1, 8, 8)
    moved = CrossEntropy(shift=1).prepare({"x": x, "y": torch.zeros(200)}, tiny.Rng(0, "test"))["x"]
    assert moved.shape == x.shape
    corners = {tuple(int(v) for v in (image[0, 4, 4] - 36,)) for image in moved}
    assert corners == {(9 * 0 + 8 * r + c,) for r in (-1, 0, 1) for c in (-1, 0, 1)}
    assert moved.min() >= 0
