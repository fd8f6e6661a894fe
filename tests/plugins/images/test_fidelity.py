"""FID and its relatives: torch-fidelity's numbers, where the pictures come from, and going on after an interruption."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image
from torch import nn
from torch_fidelity import feature_extractor_inceptionv3 as inception

import tinyfusion_core as tiny
from shared_work import TRAINER, OnlyHere, ToyFeatures
from small_run import digits_task
from tinyfusion_core.errors import MissingFileError
from tinyfusion_core.evaluation.generation import balanced_labels, sample_rows
from tinyfusion_core.runtime.distributed import batches
from tinyfusion_core.runtime.files import save_tensors
from tinyfusion_dit import GaussianDiffusion
from tinyfusion_images import Digits, fidelity
from tinyfusion_images import inception as inception_plugin
from tinyfusion_images.fidelity import Fidelity
from tinyfusion_images.image_sets import open_images, rgb, write_archive, write_png
from tinyfusion_images.inception import INCEPTION, INCEPTION_FILE, FeatureNetwork, inception_weights
from tinyfusion_images.pictures import pictures

TOY = Fidelity(num_samples=24, batch_size=10, num_reference=30, features="toy")


def figures(metric: Fidelity, task: tiny.Task, folder: Path | None = None) -> dict[str, float | None]:
    models = {"teacher": task.teacher}
    rows = metric(task, models, TRAINER) if folder is None else metric.resume(task, models, TRAINER, folder)
    return {row.name: row.values["teacher"] for row in rows}


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 training pictures in a folder and in archives, with statistics and without."""
    folder = tmp_path_factory.mktemp("real")
    x = Digits().train().__getitems__([50 * i for i in range(30)])["x"]
    images = rgb(pictures(digits_task(), x))
    for i, image in enumerate(images):
        # In the same order: the KID draws subsets.
        write_png(folder / "pictures" / f"class{i // 15}" / f"{i:03d}.png", image)
    write_archive(folder / "set.npz", iter(images.split(7)), torch.arange(30) % 10)
    features = FeatureNetwork("toy", None, torch.device("cpu"))(images)["16"].double().numpy()
    statistics = {"mu": features.mean(0), "sigma": np.cov(features, rowvar=False)}
    np.savez(folder / "statistics.npz", **statistics)
    np.savez_compressed(folder / "both.npz", arr_0=images[:20].permute(0, 2, 3, 1).numpy(), **statistics)
    return folder


class Pictures(torch.utils.data.Dataset):
    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.images[i]


def test_the_numbers_are_those_of_torch_fidelity() -> None:
    task = digits_task()
    found = figures(TOY, task)
    net = task.teacher
    made = [sample_rows(task, net, TRAINER, rows, balanced_labels(task, net, rows)) for rows in batches(24, 10)]
    x = Digits().train().__getitems__([50 * i for i in range(30)])["x"]
    theirs = torch_fidelity.calculate_metrics(
        input1=Pictures(rgb(pictures(task, torch.cat(made)))),
        input2=Pictures(rgb(pictures(task, x))),
        isc=True, fid=True, kid=True, prc=True, kid_subset_size=24, feature_extractor="toy",
        cuda=False, cache=False, verbose=False, save_cpu_ram=True,
    )  # fmt: skip
    names = {
        "FID (toy)": "frechet_inception_distance",
        "inception score (toy)": "inception_score_mean",
        "KID (toy)": "kernel_inception_distance_mean",
        "precision (toy)": "precision",
        "recall (toy)": "recall",
    }
    assert found == {ours: pytest.approx(theirs[name], rel=1e-3) for ours, name in names.items()}
    (row, *_) = TOY(task, {"teacher": task.teacher}, TRAINER)
    assert "24 samples against 30 of the training data; features: toy, torch-fidelity" in row.note
    assert "no sFID, which Inception alone has" in row.note


def test_a_reference_is_the_same_from_data_folder_and_archive(
    real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = digits_task()
    plain = figures(TOY, task)
    for name in ("set.npz", "pictures"):
        assert figures(replace(TOY, reference=str(real / name)), task) == pytest.approx(plain, rel=1e-3), name
    monkeypatch.setattr(fidelity, "INCEPTION", "toy")  # whose statistics the archives of ADM have
    weights = tmp_path / "toy.safetensors"
    save_tensors(weights, ToyFeatures("toy", ["16"]).state_dict())
    metric = replace(TOY, weights=str(weights))
    alone = figures(replace(metric, reference=str(real / "statistics.npz")), task)
    assert alone["FID"] == pytest.approx(plain["FID (toy)"], rel=1e-3)
    assert alone["inception score"] == pytest.approx(plain["inception score (toy)"])
    assert (alone["KID"], alone["precision"], alone["recall"]) == (None, None, None)
    both = figures(replace(metric, reference=str(real / "both.npz")), task)
    assert both["FID"] == pytest.approx(plain["FID (toy)"], rel=1e-3)
    assert both["KID"] != pytest.approx(plain["KID (toy)"], rel=1e-3)  # of the 20 pictures in it


@dataclass(frozen=True)
class Counting(GaussianDiffusion):
    """Counts the samples it makes; interrupted, or without a number, where it is told."""

    made: list[int] = field(default_factory=list)
    stop_at: int = 99
    bad: bool = False

    def sample(self, model, like, labels, rng):
        if len(self.made) == self.stop_at:
            raise KeyboardInterrupt
        self.made.append(rng.first)
        x = super().sample(model, like, labels, rng)
        return x.fill_(float("nan")) if self.bad else x


def counting(**options: Any) -> tiny.Task:
    task = digits_task()
    task.loss = Counting(learn_sigma=False, sampler="ddim", sampling_steps=3, guided_channels=None, **options)
    return task


def test_an_interrupted_evaluation_goes_on(tmp_path: Path) -> None:
    models = {"teacher": digits_task().teacher}
    whole = [m.values for m in tiny.evaluate(counting(), models, [OnlyHere(), TOY], TRAINER)]
    stopped = counting(stop_at=2)
    with pytest.raises(KeyboardInterrupt):
        tiny.evaluate(stopped, models, [OnlyHere(), TOY], TRAINER, tmp_path)
    again = counting()
    # A finished metric is read back, a long one goes on: the failing one is not asked again.
    found = tiny.evaluate(again, models, [OnlyHere(fail=True), TOY], TRAINER, tmp_path)
    assert stopped.loss.made + again.loss.made == [0, 10, 20]
    assert [m.values for m in found] == whole


def test_a_network_that_diverged_or_was_just_pruned_has_no_figures() -> None:
    task = counting(bad=True)
    models = {"teacher": task.teacher, "pruned": task.teacher}
    rows = replace(TOY, num_samples=10)(task, models, TRAINER)
    assert all(row.values == {"teacher": None, "pruned": None} for row in rows)
    assert "not sampled, or not finite: teacher, pruned" in rows[0].note
    assert task.loss.made == [0]


def test_what_is_missing_is_said_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert inception.URL_INCEPTION_V3.endswith(INCEPTION_FILE)
    task = digits_task()
    with pytest.raises(MissingFileError) as e:
        Fidelity(reference="none.npz").check_task(replace(task, data=Digits()))
    assert "reference: 'none.npz' does not exist" in str(e.value)
    assert f"weights: '{tmp_path / 'hub' / 'checkpoints' / INCEPTION_FILE}' does not exist" in str(e.value)
    Fidelity(download=True).check_task(replace(task, data=Digits()))
    inception_weights().parent.mkdir(parents=True)
    inception_weights().touch()
    Fidelity().check_task(replace(task, data=Digits()))
    with pytest.raises(MissingFileError, match=r"weights: 'mine.pth'"):
        Fidelity(weights="mine.pth", download=True).check_task(replace(task, data=Digits()))

    class Latents(Digits):
        has_pixels = False

    with pytest.raises(MissingFileError, match="data: Latents as configured does not decode any"):
        TOY.check_task(replace(task, data=Latents()))


@pytest.fixture
def random_inception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, Path]:
    """torch-fidelity's network with random weights, and their file."""
    monkeypatch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: {})

    class Random(inception.FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict, **_):
            """Keep the random weights."""

    network = Random(INCEPTION, ["2048", "logits_unbiased"])
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    return network, tmp_path / "weights.pth"


def test_inception_weights_are_read_without_running_them(
    random_inception: tuple[nn.Module, Path], tmp_path: Path
) -> None:
    network, weights = random_inception
    images = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8)
    expected = network.convert_features_tuple_to_dict(network(images))
    found = FeatureNetwork(INCEPTION, weights, torch.device("cpu"))(images)
    assert found.keys() == {*expected, "spatial"}
    assert all(torch.equal(value, found[layer]) for layer, value in expected.items())
    assert found["spatial"].shape == (1, 17 * 17 * 7)
    assert torch.allclose(found["spatial"].double(), spatial_by_hand(network, images), rtol=1e-3, atol=1e-6)
    assert found["spatial"].std() > 0
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(tiny.UserError, match=r"other.pth: not the weights of inception-v3-compat"):
        FeatureNetwork(INCEPTION, tmp_path / "other.pth", torch.device("cpu"))
    torch.save({"a": print}, tmp_path / "code.pth")
    with pytest.raises(tiny.UserError, match=r"code.pth: refused"):
        FeatureNetwork(INCEPTION, tmp_path / "code.pth", torch.device("cpu"))
    with pytest.raises(tiny.UserError, match="torch-fidelity knows no 'inceptoin'"):
        FeatureNetwork("inceptoin", None, torch.device("cpu"))


def spatial_by_hand(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """From the input of a block on: a convolution, a normalisation, ReLU; 7 channels, last as TensorFlow has them."""
    seen: list[torch.Tensor] = []
    hook = network.Mixed_6d.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    network(images)
    hook.remove()
    conv, bn = network.Mixed_6d.branch1x1.conv, network.Mixed_6d.branch1x1.bn
    y = torch.einsum("nchw,dc->nhwd", seen[0].double(), conv.weight[:, :, 0, 0].double())
    y = (y - bn.running_mean) / (bn.running_var + bn.eps).double().sqrt() * bn.weight + bn.bias
    return y.relu()[..., :7].flatten(1)


def statistics_of(features: torch.Tensor, suffix: str = "") -> dict[str, Any]:
    x = features.double().numpy()
    return {f"mu{suffix}": x.mean(0), f"sigma{suffix}": np.cov(x, rowvar=False)}


def distance(real: torch.Tensor, made: torch.Tensor) -> float:
    """The Fréchet distance by its formula: the trace of a product's root is the sum of the eigenvalues' roots."""
    (mu, sigma), (mu2, sigma2) = (statistics_of(x).values() for x in (real, made))
    roots = np.sqrt(np.abs(np.linalg.eigvals(sigma @ sigma2)))
    return float(((mu - mu2) ** 2).sum() + np.trace(sigma) + np.trace(sigma2) - 2 * roots.sum())


def shown(task: tiny.Task, num: int) -> list[torch.Tensor]:
    """Pictures of the training data, evenly spaced, and samples."""
    x = Digits().train().__getitems__([1500 // num * i for i in range(num)])["x"]
    rows = range(num)
    made = sample_rows(task, task.teacher, TRAINER, rows, balanced_labels(task, task.teacher, rows))
    return [rgb(pictures(task, some)) for some in (x, made)]


def test_sfid_is_the_distance_of_spatial_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (fidelity, inception_plugin):
        monkeypatch.setattr(module, "INCEPTION", "toy")  # it has a module of that name, and features of less width
    weights = tmp_path / "toy.safetensors"
    save_tensors(weights, ToyFeatures("toy", ["16"]).state_dict())
    task, metric = digits_task(), replace(TOY, num_samples=30, batch_size=30, weights=str(weights))
    network = FeatureNetwork("toy", weights, torch.device("cpu"))
    real, made = (network(images) for images in shown(task, 30))
    expected = distance(real["spatial"], made["spatial"])
    found = figures(metric, task)
    assert list(found) == ["FID", "sFID", "inception score", "KID", "precision", "recall"]
    assert found["sFID"] == pytest.approx(expected, rel=1e-3)
    assert found["FID"] == pytest.approx(distance(real["16"], made["16"]), rel=1e-3)
    # Against the statistics of an archive, as ADM's carry them.
    of_fid = statistics_of(real["16"])
    np.savez(tmp_path / "both.npz", **of_fid, **statistics_of(real["spatial"], "_s"))
    np.savez(tmp_path / "fid.npz", **of_fid)
    both = replace(metric, reference=str(tmp_path / "both.npz"))
    assert {what: figures(both, task)[what] for what in ("FID", "sFID")} == pytest.approx(
        {what: found[what] for what in ("FID", "sFID")}, rel=1e-3
    )
    assert "(FID, sFID: against its statistics)" in both(task, {"teacher": task.teacher}, TRAINER)[0].note
    assert figures(replace(metric, reference=str(tmp_path / "fid.npz")), task)["sFID"] is None


@pytest.mark.slow
def test_sfid_of_inception(random_inception: tuple[nn.Module, Path]) -> None:
    network, weights = random_inception
    task, metric = digits_task(), Fidelity(num_samples=12, num_reference=12, weights=str(weights))
    expected = distance(*(spatial_by_hand(network, images) for images in shown(task, 12)))
    assert figures(metric, task)["sFID"] == pytest.approx(expected, rel=1e-3)


def test_bad_pictures(real: Path, tmp_path: Path) -> None:
    content = (real / "set.npz").read_bytes()
    (tmp_path / "short.npz").write_bytes(content[: len(content) // 2])
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    np.savez(tmp_path / "float.npz", arr_0=np.zeros((3, 8, 8, 3)))
    np.savez(tmp_path / "code.npz", arr_0=np.array([Path("code")], dtype=object))
    (tmp_path / "empty").mkdir()
    (tmp_path / "sizes").mkdir()
    for size in (8, 9):
        Image.new("RGB", (size, 8)).save(tmp_path / "sizes" / f"{size}.png")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no picture")
    for name, message in [
        ("none", "reference: .*none' does not exist"),
        ("short.npz", "short.npz: not an .npz"),
        ("other.npz", "other.npz: not an .npz with pictures in `arr_0`"),
        ("float.npz", r"float.npz: `arr_0` is float64 .* expected uint8"),
        ("code.npz", "code.npz: `arr_0` is object"),
        ("empty", "empty' holds no pictures"),
    ]:
        with pytest.raises(tiny.UserError, match=message):
            open_images(tmp_path / name, "reference")
    for name, message in [("sizes", r"9.png: 9x8 pixels, 8.png has 8x8"), ("broken", "a.png: not a readable picture")]:
        images = open_images(tmp_path / name, "reference").images
        with pytest.raises(tiny.UserError, match=message):
            images.read(range(len(images)))
    # Read in any order.
    images = open_images(real / "set.npz", "reference").images
    assert torch.equal(images.read(range(20, 30)), rgb(images.read(range(30)))[20:])
    with pytest.raises(tiny.UserError, match="too few"):
        folder = tmp_path / "few"
        write_png(folder / "0.png", torch.zeros(1, 8, 8, dtype=torch.uint8))
        figures(replace(TOY, reference=str(folder)), digits_task())
    with pytest.raises(tiny.UserError, match="2 channels"):
        rgb(torch.zeros(1, 2, 8, 8))
