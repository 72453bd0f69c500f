"""CLIP and DINOv2 of the transformers package as feature extractors, and CLIP as a judge of pictures and prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.evaluation.checksums import weights_checksum
from diffdistill.evaluation.convention import InputConvention
from diffdistill.evaluation.features import Extractor
from diffdistill.evaluation.resize import RESIZES

# Means and deviations of pixels in [0, 1], as each was trained.
CLIP_PIXELS = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_PIXELS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
KINDS = ("clip", "dinov2")
DINOV2_SIZE = 224  # pixels a side of its evaluation; its own config names the 518 of its last training
PROMPT_BATCH = 64


class Normalised(nn.Module):
    """A vision model behind the shift and scale of its pixels; features only.

    Args:
        kind: "clip" for the projected embedding, "dinov2" for the class token.
    """

    def __init__(self, model: nn.Module, kind: str):
        super().__init__()
        mean, std = CLIP_PIXELS if kind == "clip" else IMAGENET_PIXELS
        self.model, self.kind = model, kind
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        """Features (N, D) of pixels (N, 3, size, size) in [0, 1]."""
        pixels = (images - self.mean) / self.std
        if self.kind == "clip":
            return self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output), None
        return self.model(pixel_values=pixels).last_hidden_state[:, 0], None


def pretrained_extractor(name: str, *, kind: str, device: torch.device | str = "cpu") -> Extractor:
    """CLIP's image embedding or DINOv2's class token.

    Args:
        name: a folder, or a name of the hub, from which transformers fetches what is not on this machine.
        kind: "clip" or "dinov2".
    Raises:
        ValueError: another kind, or the model is not to be had.
    """
    if kind not in KINDS:
        raise ValueError(
            f"{name} holds a model of type {kind!r}; feature networks of transformers are {', '.join(KINDS)}"
        )
    model = _loaded("CLIPModel" if kind == "clip" else "Dinov2Model", name)
    config = model.config
    size = config.vision_config.image_size if kind == "clip" else DINOV2_SIZE
    module = Normalised(model, kind).to(device).eval().requires_grad_(False)
    return Extractor(
        name=f"{kind}:{name.rstrip('/').rpartition('/')[2]}",
        module=module,
        num_features=config.projection_dim if kind == "clip" else config.hidden_size,
        input=InputConvention(size, size, low=0.0, high=1.0, resize="shorter_bicubic"),
        has_logits=False,
        checksum=weights_checksum(model),
        knows_classes=False,
    )


def _loaded(kind: str, name: str, **options: Any) -> Any:
    """A class of transformers from a folder or the hub; safetensors alone."""
    try:
        import transformers
    except ImportError as error:
        raise ValueError(f"{name} needs the package transformers; pip install transformers") from error
    try:
        return getattr(transformers, kind).from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{kind} could not be read from {name}: {first}; give a folder that has it, or a name of the hub where "
            "this machine reaches it"
        ) from error


class ClipScorer:
    """How well pictures fit their prompts.

    Args:
        name: a CLIP model's folder or name of the hub.

    Source: Hessel et al. 2021 (CLIPScore), 100 max(cos, 0) as in torchmetrics, where the paper has 2.5 max(cos, 0).
    """

    def __init__(self, name: str, *, device: torch.device | str = "cpu"):
        self.name, self.device = f"clip:{name.rstrip('/').rpartition('/')[2]}", torch.device(device)
        self._model = _loaded("CLIPModel", name).to(device).eval().requires_grad_(False)
        self._tokenizer = _loaded("CLIPTokenizer", name)
        self._seen = Normalised(self._model, "clip").to(device)

    @torch.no_grad()
    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Unit embeddings (N, D); prompts are cut at the length that CLIP reads."""
        parts = []
        for first in range(0, len(prompts), PROMPT_BATCH):
            chosen = list(prompts[first : first + PROMPT_BATCH])
            length = self._model.config.text_config.max_position_embeddings
            tokens = self._tokenizer(chosen, padding=True, truncation=True, max_length=length, return_tensors="pt")
            states = self._model.text_model(**tokens.to(self.device)).pooler_output
            parts.append(self._model.text_projection(states).cpu())
        return nn.functional.normalize(torch.cat(parts).double(), dim=1)

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """Unit embeddings (N, D) of images (N, 3, height, width) in [-1, 1]."""
        size = self._model.config.vision_config.image_size
        parts = []
        for chunk in images.split(PROMPT_BATCH):
            pixels = (RESIZES["shorter_bicubic"](chunk.float().to(self.device), size, size) + 1) / 2
            parts.append(self._seen(pixels)[0].cpu())
        return nn.functional.normalize(torch.cat(parts).double(), dim=1)

    def scores(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """100 max(cos, 0) of each picture with its own prompt, float64 (N,).

        Raises:
            ValueError: the numbers of pictures and prompts differ.
        """
        if len(images) != len(prompts):
            raise ValueError(f"each picture needs a prompt, got {len(images)} and {len(prompts)}")
        known = list(dict.fromkeys(prompts))
        place = torch.tensor([known.index(prompt) for prompt in prompts])
        return 100 * (self.embed_images(images) * self.embed_prompts(known)[place]).sum(1).clamp(min=0)
