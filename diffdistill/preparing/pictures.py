"""Between pictures and a pipeline's samples: its own decoding, and that decoding backwards."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffdistill.preparing.hearing import Listener, Unheard
from diffdistill.preparing.listening import NETWORKS


class _Decoding(Exception):
    """The pipeline has come to its decoder, with this."""

    def __init__(self, latents: Tensor):
        self.latents = latents


@contextmanager
def ending_in(pipeline: Any, samples: Tensor) -> Iterator[None]:
    """Within the block, every call of the pipeline ends in `samples`, whatever its network would have made."""
    networks = [part for name in NETWORKS if (part := getattr(pipeline, name, None)) is not None]

    def silent(x, *args, **kwargs):
        x = kwargs.get("hidden_states", kwargs.get("sample", x)) if x is None else x
        return [torch.zeros_like(x) if isinstance(x, Tensor) else x]

    for network in networks:
        network.forward = lambda *args, **kwargs: silent(args[0] if args else None, **kwargs)
    pipeline.scheduler.step = lambda *args, **kwargs: (samples,)
    try:
        yield
    finally:
        del pipeline.scheduler.step
        for network in networks:
            del network.forward


@torch.no_grad()
def decoded(listener: Listener, samples: Tensor, *, output_type: str = "pil") -> Sequence[Any]:
    """The pictures, or the frames of videos, that the pipeline makes of samples (N, *sample_shape)."""
    with ending_in(listener.pipeline, samples.to(listener.pipeline.device)):
        return listener.pipeline(
            prompt=[""] * len(samples),
            **{"num_inference_steps": 2, **listener.options, **listener.off},
            output_type=output_type,
            return_dict=False,
        )[0]


def picture_size(listener: Listener) -> tuple[int, int]:
    """Height and width of the pictures that the pipeline makes as it is called."""
    shape = listener.unguided([""], steps=2, first_step_only=False).steps[0].before.shape[1:]
    (picture,) = decoded(listener, torch.zeros(1, *shape), output_type="pt")
    return tuple(picture.shape[-2:])


@dataclass(frozen=True)
class Encoder:
    """The pipeline's decoding backwards: what its autoencoder makes of pictures, scaled, shifted and packed as samples.

    Whatever a pipeline does between its samples and its autoencoder moves and scales single numbers, so that three
    samples tell all of it: zeros give the shift, ones the scale, and numbers in order where each goes.

    Args:
        place: int64, for each number of a sample the place in the autoencoder's latent.
        shift, scale: of the latent's numbers, in its shape.
    """

    pipeline: Any
    shape: tuple[int, ...]
    place: Tensor
    shift: Tensor
    scale: Tensor

    @staticmethod
    def of(listener: Listener, shape: tuple[int, ...]) -> "Encoder":
        """For samples of a shape.

        Raises:
            Unheard: the pipeline has no autoencoder, or does more than move and scale.
        """
        pipeline = listener.pipeline
        if getattr(pipeline, "vae", None) is None:
            raise Unheard(f"{type(pipeline).__name__} has no autoencoder, so no pictures can be prepared for it")
        count = torch.Size(shape).numel()
        order = torch.arange(count, dtype=torch.float32).reshape(shape)
        zeros, ones, ordered = (_given(listener, x) for x in (torch.zeros(shape), torch.ones(shape), order))
        scale = ones - zeros
        source = ((ordered - zeros) / scale).flatten().round().long()
        if source.sort().values.tolist() != list(range(count)):
            raise Unheard("between its samples and its autoencoder, the pipeline does more than move and scale numbers")
        return Encoder(pipeline, tuple(shape), source.argsort(), zeros, scale)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Samples (N, *shape) of images (N, 3, H, W) in [-1, 1]: the mode of the autoencoder's posterior.

        Raises:
            Unheard: the autoencoder makes latents of another shape than the pipeline decodes.
        """
        autoencoder = self.pipeline.vae
        parameter = next(autoencoder.parameters())
        pixels = images.to(parameter.device, parameter.dtype)
        found = autoencoder.encode(pixels if self.shift.ndim == 3 else pixels.unsqueeze(2))
        latents = found.latent_dist.mode() if "latent_dist" in found else found.latent
        if latents.shape[1:] != self.shift.shape:
            raise Unheard(
                f"pictures of {tuple(images.shape[2:])} pixels become latents {tuple(latents.shape[1:])}, and the "
                f"pipeline decodes {tuple(self.shift.shape)}; give pictures of the size it was prepared with"
            )
        plain = ((latents.float().cpu() - self.shift) / self.scale).flatten(1)
        return plain[:, self.place].reshape(-1, *self.shape)


def _given(listener: Listener, sample: Tensor) -> Tensor:
    """What the autoencoder is given to decode at the end of a call that ends in a sample, without the batch."""
    autoencoder = listener.pipeline.vae

    def decoding(latents, *args, **kwargs):
        raise _Decoding(latents)

    autoencoder.decode = decoding
    try:
        decoded(listener, sample.unsqueeze(0))
    except _Decoding as given:
        return given.latents[0].float().cpu()
    finally:
        del autoencoder.decode
    raise Unheard("the pipeline never came to its autoencoder")
