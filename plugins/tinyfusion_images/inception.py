"""The feature networks of torch-fidelity, with weights that are read without running code.

Of Inception also the spatial features of sFID (arXiv:2103.03841), as ADM (arXiv:2105.05233) takes them.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from tinyfusion_core.errors import UserError, nearest
from tinyfusion_core.parsing.weights import read_weights
from tinyfusion_core.runtime.distributed import on_main_process

INCEPTION = "inception-v3-compat"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
"""File name of torch-fidelity's weights; it contains the first digits of their sha256."""
SPATIAL = "spatial"
"""Name of Inception's spatial features: 7 channels of 17x17 positions, in the order of ADM's archives."""
_SPATIAL_MODULE, _SPATIAL_CHANNELS = "Mixed_6d.branch1x1", 7
"""What is `mixed_6/conv` in the original graph, and how many of its channels."""


def inception_weights() -> Path:
    """Return where torch's hub stores torch-fidelity's Inception weights."""
    return Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE


class FeatureNetwork:
    """A network that torch-fidelity knows, or a plugin has registered there.

    Args:
        name: its registered name.
        weights: its file, safetensors or a torch file of plain tensors; None if the network finds them itself.
        device: where it computes.

    Attributes:
        layers: which features each metric uses (`isc`, `fid`, `kid`, `prc`; of Inception also `sfid`).

    Raises:
        UserError: there is no such network, or the weights do not fit it.
    """

    def __init__(self, name: str, weights: Path | None, device: torch.device) -> None:
        from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
        from torch_fidelity.utils import create_feature_extractor

        if name not in FEATURE_EXTRACTORS_REGISTRY:
            raise UserError(f"features: torch-fidelity knows no '{name}'{nearest(name, FEATURE_EXTRACTORS_REGISTRY)}")
        layer_for = FEATURE_EXTRACTORS_REGISTRY[name].get_default_feature_layer_for_metric
        self.layers: dict[str, str] = {metric: layer_for(metric) for metric in ("isc", "fid", "kid", "prc")}
        self.device = device
        with tempfile.TemporaryDirectory(prefix="tinyfusion-") as folder:
            options = {}
            if weights is not None:
                # torch-fidelity would unpickle the file: it gets a copy of the tensors in it, written here.
                options["feature_extractor_weights_path"] = str(Path(folder) / "weights.pth")
                torch.save(read_weights(weights), options["feature_extractor_weights_path"])
            try:
                needed = list(dict.fromkeys(self.layers.values()))
                self._network = create_feature_extractor(name, needed, cuda=False, verbose=False, **options)
            except RuntimeError as e:  # of load_state_dict
                raise UserError(f"{weights}: not the weights of {name} ({str(e).splitlines()[0]})") from None
        self._network.to(device)
        self._spatial: Tensor | None = None
        if name == INCEPTION:
            self.layers["sfid"] = SPATIAL
            self._network.get_submodule(_SPATIAL_MODULE).register_forward_hook(self._keep)

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Compute the features of every layer that a metric uses, each (n, features), on the CPU.

        Args:
            images: (n, 3, height, width) uint8.
        """
        with torch.no_grad():
            found = self._network.convert_features_tuple_to_dict(self._network(images.to(self.device)))
        if self._spatial is not None:
            found[SPATIAL], self._spatial = self._spatial, None
        return {layer: values.cpu() for layer, values in found.items()}

    def _keep(self, module: nn.Module, args: object, output: Tensor) -> None:
        # Channels last, as TensorFlow has them.
        self._spatial = output[:, :_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1).float()


def fetch_inception() -> None:
    """Download the Inception weights of torch-fidelity to `inception_weights()`, if they are missing.

    Raises:
        UserError: they cannot be downloaded.
    """
    on_main_process(_fetch)
    _fetch()  # on a machine that does not see the main process's disk


def _fetch() -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    path = inception_weights()
    if path.exists():
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix="6726825d", progress=False)
    except (OSError, RuntimeError) as e:
        raise UserError(f"{URL_INCEPTION_V3} cannot be fetched ({e}); put the file at '{path}'") from None
