"""InceptionV3 of 2015-12-05, the network of published FID and inception scores, from a TorchScript file.

A file is known by what it computes: its features of one picture, so that any conversion of the same weights counts, and
another InceptionV3 (torchvision's was trained anew) does not.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffdistill.evaluation.convention import InputConvention

# The first of its 2,048 features of `probe()`, in float32.
FIRST_FEATURES = (
    *(0.0643, 0.1257, 0.0, 0.0424, 0.2268, 0.5184, 0.9409, 0.0, 0.0027, 1.1632, 0.8366, 0.1318),
    *(0.681, 0.3558, 0.0775, 0.005, 1.2221, 0.1267, 0.1524, 1.6004, 1.229, 0.27, 0.0, 0.408),
)


class InceptionFeatures(nn.Module):
    """The network's pooled features, and its logits where the file has them.

    Args:
        features: pixels (N, 3, 299, 299) in [-1, 127 / 128] to features (N, 2048).
        classify: features to logits (N, 1008) without bias, as in the inception score; None for a file without.
    """

    num_features = 2048
    input = InputConvention(299, 299, low=-1.0, high=127 / 128, resize="tf1_bilinear")

    def __init__(self, features: nn.Module, classify: Tensor | None):
        super().__init__()
        self.features = features
        self.has_logits = classify is not None
        self.register_buffer("classify", classify)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features (N, 2048), and logits (N, 1008) or None."""
        features = self.features(images).flatten(1)
        return features, features @ self.classify.T if self.has_logits else None


def inception_features(module: torch.jit.ScriptModule) -> InceptionFeatures:
    """The features of a TorchScript file, with its parts `layers` and `output` where it has them."""
    parts = dict(module.named_children())
    if "layers" in parts and "output" in parts:  # the file of StyleGAN's metrics, which else scales and resizes itself
        return InceptionFeatures(parts["layers"], parts["output"].weight).eval()
    return InceptionFeatures(module, None).eval()


def probe() -> Tensor:
    """A picture (1, 3, 299, 299) in [-1, 1] with structure at several scales."""
    rows, columns = torch.meshgrid(torch.arange(299.0), torch.arange(299.0), indexing="ij")
    return torch.stack([((rows * (channel + 1) + 2 * columns) / 23).sin() for channel in range(3)])[None]


def is_inception(module: InceptionFeatures, device: torch.device | str) -> bool:
    """Whether it gives the features of 2015-12-05 within two per cent, which half precision keeps."""
    try:
        with torch.no_grad():
            features, _ = module(probe().to(device))
    except RuntimeError:  # it takes no such pictures
        return False
    if features.shape != (1, InceptionFeatures.num_features):
        return False
    wanted = torch.tensor(FIRST_FEATURES)
    found = features[0, : len(wanted)].float().cpu()
    return bool((found - wanted).norm() < 0.02 * wanted.norm())
