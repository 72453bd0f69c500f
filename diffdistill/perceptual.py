"""LPIPS: how far two pictures are apart in the features of a network that was trained to classify pictures."""

import importlib.util
import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from diffdistill.losses import full

STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # of VGG16: width and number of convolutions
TAPS = (3, 8, 15, 22, 29)  # places of the last activation of each stage
CLASSIFIER = "classifier."  # begins the tensors of torchvision's file that are behind the features
HEADS = Path("functional", "image", "lpips_models", "vgg.pth")  # where torchmetrics keeps LPIPS v0.1's learnt weights
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels in [0, 1], as torchvision trains


class LpipsNetwork(nn.Module):
    """The learned perceptual image patch similarity of pictures, smaller for those that look more alike.

    The features of both pictures at each tap are divided by their norm over the channels; the squared differences are
    weighted by channel, summed over channels and taps, and averaged over places. Gradient flows to both pictures, and
    no parameter has one.

    The learnt weights multiply the squares, as in the authors' code; the paper writes weights within the square, so
    that these are theirs squared. A norm is sqrt(sum + 1e-8), which has a gradient where all features are 0.

    Args:
        features: layers in order of execution; put in eval mode and frozen, like all of this module.
        heads: the weight of each channel of each tap, not negative.
        taps: places in `features` whose outputs are compared.
        size: pixels a side that pictures are enlarged to; 0 for none.

    Source: Zhang et al. 2018 (LPIPS), and its released version 0.1.
    """

    def __init__(self, features: nn.Sequential, heads: Sequence[Tensor], *, size: int, taps: Sequence[int] = TAPS):
        super().__init__()
        self.features, self.taps, self.size = features, tuple(taps), size
        self.heads = nn.ParameterList(heads)
        self.eval().requires_grad_(False)

    def forward(self, made: Tensor, target: Tensor) -> Tensor:
        """The distance of each pair, shape (N,), in float32 or higher.

        Args:
            made, target: pictures (N, 3, height, width) in [-1, 1], or grey ones (N, 1, height, width).
        """
        value = 0
        for a, b, head in zip(self._seen(made), self._seen(target), self.heads, strict=True):
            difference = _unit(full(a)) - _unit(full(b))
            value = value + (head[:, None, None] * difference.square()).sum(1).mean((1, 2))
        return value

    def _seen(self, pictures: Tensor) -> Iterator[Tensor]:
        """The features of pictures at each tap; grey ones become three equal channels."""
        channels = pictures.expand(-1, len(MEAN), -1, -1).unbind(1)
        x = torch.stack([((c + 1) / 2 - mean) / std for c, mean, std in zip(channels, MEAN, STD, strict=True)], 1)
        if self.size and tuple(x.shape[2:]) != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", align_corners=False)
        for place, layer in enumerate(self.features):
            x = layer(x)
            if place in self.taps:
                yield x


def _unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(1, keepdim=True) + 1e-8).sqrt()


def vgg16() -> nn.Sequential:
    """VGG16's layers up to its last activation, numbered as in torchvision, on the meta device.

    Source: Simonyan and Zisserman 2015, table 1, configuration D.
    """
    layers: list[nn.Module] = []
    channels = 3
    with torch.device("meta"):  # so that no random number is drawn for weights that are replaced
        for width, convolutions in STAGES:
            layers += [nn.MaxPool2d(2)] if layers else []
            for _ in range(convolutions):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
    return nn.Sequential(*layers)


def read_lpips(weights: Path, *, size: int) -> LpipsNetwork:
    """LPIPS on VGG16 in float32, on the CPU.

    Args:
        weights: torchvision's VGG16 (.pth), or a .safetensors with the same names; what is behind its features is left.
        size: pixels a side that pictures are enlarged to; 0 for none.
    Raises:
        ValueError: a file is missing or damaged, or its tensors are not VGG16's; or torchmetrics is not installed.
    """
    features = vgg16()
    given = {name: tensor for name, tensor in _read(weights).items() if not name.startswith(CLASSIFIER)}
    wanted = {f"features.{name}": tensor.shape for name, tensor in features.state_dict().items()}
    _refuse_other(given, wanted, weights)
    # cloned: tensors mapped from a file start anywhere, and unaligned ones give other last bits
    state = {name: given[f"features.{name}"].float().clone() for name in features.state_dict()}
    features.load_state_dict(state, assign=True)
    return LpipsNetwork(features, _heads(), size=size)


def _read(file: Path) -> Mapping[str, Tensor]:
    if not file.is_file():
        raise ValueError(
            f"distance.weights={file} is no file; give torchvision's VGG16, which is at "
            "https://download.pytorch.org/models/vgg16-397923af.pth"
        )
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        found = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"distance.weights={file} could not be read: {first}; fetch it again") from error
    if not isinstance(found, Mapping) or not all(isinstance(entry, Tensor) for entry in found.values()):
        raise ValueError(f"distance.weights={file} holds no mapping of names to tensors; give torchvision's VGG16")
    return found


def _refuse_other(given: Mapping[str, Tensor], wanted: Mapping[str, torch.Size], file: Path) -> None:
    """Refuses tensors of other names or shapes than those wanted, and names the first."""
    for name in sorted(given.keys() | wanted.keys()):
        if name not in given or name not in wanted or given[name].shape != wanted[name]:
            ours = f"shape {tuple(wanted[name])}" if name in wanted else "none of this name"
            theirs = f"shape {tuple(given[name].shape)}" if name in given else "none of this name"
            raise ValueError(
                f"distance.weights={file} is no VGG16 of torchvision's: for {name} it has {theirs}, and VGG16 {ours}; "
                "give vgg16-397923af.pth"
            )


def _heads() -> list[Tensor]:
    """The learnt weight of each channel, as the package torchmetrics ships them."""
    package = importlib.util.find_spec("torchmetrics")
    if package is None:
        raise ValueError(
            "distance.name=lpips takes its learnt weights from torchmetrics, which is not installed; "
            "try: pip install 'diffdistill[metrics]'"
        )
    file = Path(package.submodule_search_locations[0]) / HEADS
    if not file.is_file():
        raise ValueError(
            f"distance.name=lpips needs {HEADS}, which this torchmetrics lacks; try: pip install 'torchmetrics>=1.9'"
        )
    found = torch.load(file, map_location="cpu", weights_only=True)
    return [found[f"lin{number}.model.1.weight"].reshape(width) for number, (width, _) in enumerate(STAGES)]
