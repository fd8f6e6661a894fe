"""Autoencoders from folders and from checkpoints of the latent-diffusion code base, and what is not one."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d, group_norm, interpolate, pad, silu

from tinyfusion_core.errors import MissingFileError, UserError
from tinyfusion_core.parsing.weights import fingerprint
from tinyfusion_images.encoding.autoencoder import check_autoencoder, decode, load_autoencoder

pytestmark = pytest.mark.numerics

MULT, BLOCKS, WIDTH, Z = (1, 1, 2), 2, 32, 6


class Ldm:
    """The autoencoder of latent diffusion (arXiv:2112.10752) as functions; weights are made as they are asked for.

    KL-16 has attention in the last level of its encoder, where MAR's decoder does without.
    """

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}
        self.random = torch.Generator().manual_seed(0)

    def weight(self, name: str, *sizes: int) -> Tensor:
        shape = torch.Size(sizes)
        if name not in self.weights:
            drawn = torch.randn(shape, generator=self.random)
            gain = len(shape) == 1 and name.endswith(".weight")
            self.weights[name] = drawn * (0.3 if len(shape) == 1 else shape[1:].numel() ** -0.5) + gain
        return self.weights[name]

    def conv(self, name: str, x: Tensor, out: int, kernel: int = 3, stride: int = 1, padding: int = 1) -> Tensor:
        weight = self.weight(f"{name}.weight", out, x.shape[1], kernel, kernel)
        return conv2d(x, weight, self.weight(f"{name}.bias", out), stride, padding if kernel == 3 else 0)

    def norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias = (self.weight(f"{name}.{which}", x.shape[1]) for which in ("weight", "bias"))
        return group_norm(x, 32, weight, bias, 1e-6)

    def residual(self, name: str, x: Tensor, out: int) -> Tensor:
        h = self.conv(f"{name}.conv1", silu(self.norm(f"{name}.norm1", x)), out)
        h = self.conv(f"{name}.conv2", silu(self.norm(f"{name}.norm2", h)), out)
        return h + (x if x.shape[1] == out else self.conv(f"{name}.nin_shortcut", x, out, 1))

    def attention(self, name: str, x: Tensor) -> Tensor:
        h, width = self.norm(f"{name}.norm", x), x.shape[1]
        q, k, v = (self.conv(f"{name}.{part}", h, width, 1).flatten(2) for part in "qkv")
        mixed = v @ (q.transpose(1, 2) @ k * width**-0.5).softmax(2).transpose(1, 2)
        return x + self.conv(f"{name}.proj_out", mixed.view_as(x), width, 1)

    def middle(self, name: str, x: Tensor) -> Tensor:
        x = self.residual(f"{name}.block_1", x, x.shape[1])
        return self.residual(f"{name}.block_2", self.attention(f"{name}.attn_1", x), x.shape[1])

    def encode(self, x: Tensor) -> Tensor:
        """Means and logarithms of variances."""
        x = self.conv("encoder.conv_in", x, WIDTH)
        for i, factor in enumerate(MULT):
            for j in range(BLOCKS):
                x = self.residual(f"encoder.down.{i}.block.{j}", x, WIDTH * factor)
                if i == len(MULT) - 1:
                    x = self.attention(f"encoder.down.{i}.attn.{j}", x)
            if i < len(MULT) - 1:
                x = self.conv(f"encoder.down.{i}.downsample.conv", pad(x, (0, 1, 0, 1)), x.shape[1], 3, 2, 0)
        x = silu(self.norm("encoder.norm_out", self.middle("encoder.mid", x)))
        return self.conv("quant_conv", self.conv("encoder.conv_out", x, 2 * Z), 2 * Z, 1)

    def decode(self, z: Tensor) -> Tensor:
        x = self.conv("decoder.conv_in", self.conv("post_quant_conv", z, Z, 1), WIDTH * MULT[-1])
        x = self.middle("decoder.mid", x)
        for i, factor in reversed(list(enumerate(MULT))):
            for j in range(BLOCKS + 1):
                x = self.residual(f"decoder.up.{i}.block.{j}", x, WIDTH * factor)
            if i:
                x = self.conv(f"decoder.up.{i}.upsample.conv", interpolate(x, scale_factor=2.0), x.shape[1])
        return self.conv("decoder.conv_out", silu(self.norm("decoder.norm_out", x)), 3)


def test_a_latent_diffusion_checkpoint_encodes_and_decodes_as_it_did(tmp_path: Path) -> None:
    ldm, x = Ldm(), torch.rand(2, 3, 16, 16) * 2 - 1
    moments = ldm.encode(x)
    mean, logvar = moments.chunk(2, 1)
    pictures = ldm.decode(mean)
    for name, container in (("kl.ckpt", "model"), ("whole.ckpt", "state_dict")):
        prefix = "first_stage_model." if container == "state_dict" else ""
        weights = {prefix + k: v for k, v in ldm.weights.items()} | {"loss.logvar": torch.zeros(())}
        torch.save({container: weights}, tmp_path / name)
        model = load_autoencoder(str(tmp_path / name))
        found = model.encode(x).latent_dist
        torch.testing.assert_close(found.mean, mean, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.std, (0.5 * logvar.clamp(-30, 20)).exp(), rtol=1e-4, atol=1e-4)
        expected = ((pictures + 1) / 2).clamp(0, 1)
        torch.testing.assert_close(decode(model, (mean - 0.5) * 0.2325, 0.2325, 0.5), expected, rtol=1e-4, atol=1e-4)
        assert model.config["scaling_factor"] is None
    assert expected.std() > 0.02


def test_a_folder_and_a_pipeline_that_has_it(tiny_vae: Path, tmp_path: Path) -> None:
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "vae").symlink_to(tiny_vae)
    one, other = load_autoencoder(str(tiny_vae)), load_autoencoder(str(tmp_path / "pipeline"))
    assert fingerprint(one) == fingerprint(other)
    with torch.no_grad():
        next(other.parameters()).add_(1e-3)
    assert fingerprint(one) != fingerprint(other)
    for where in (tiny_vae, tmp_path / "pipeline"):
        check_autoencoder(str(where))


def test_what_is_not_an_autoencoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    for check in (load_autoencoder, check_autoencoder):
        with pytest.raises(MissingFileError, match="empty: no autoencoder there; expected a folder of diffusers'"):
            check(str(tmp_path / "empty"))
        with pytest.raises(MissingFileError, match=r"kl16\.ckpt: no such file"):
            check(str(tmp_path / "kl16.ckpt"))
    torch.save({"blocks.0.weight": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"other\.pt: not an autoencoder of the latent-diffusion code base"):
        load_autoencoder(str(tmp_path / "other.pt"))
    (tmp_path / "code.ckpt").write_bytes(pickle.dumps(Path))
    with pytest.raises(UserError, match=r"code\.ckpt: refused"):
        load_autoencoder(str(tmp_path / "code.ckpt"))
