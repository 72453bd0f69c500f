"""One adapter for the networks of diffusers. A family is a row of a table; nothing else knows the class."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.denoiser import Backbone, Condition
from diffdistill.told import beside


@dataclass(frozen=True)
class Family:
    """What the adapter must know about one diffusers class.

    Args:
        call: (network, x, time, cond) -> output of the shape of x.
        sample_shape: of its inputs, from its config.
        num_classes: real classes, 0 for none, from its config.
        null_label: the label that means "no class", or None where the network was built without one.
        blocks: the modules to shard and to checkpoint, in order of execution.
        tell: make the network add to the embedding of its time what comes beside each label (`told.Label`).
        clocks: the last layers of the embeddings of its time, to each of which `tell` adds.
        prepare: once after loading: switch off randomness that the slots do not control.
    """

    call: Callable[[nn.Module, Tensor, Tensor, Condition], Tensor]
    sample_shape: Callable[[Mapping[str, Any]], tuple[int, ...]]
    num_classes: Callable[[Mapping[str, Any]], int]
    null_label: Callable[[Mapping[str, Any]], int | None]
    blocks: Callable[[nn.Module], Sequence[nn.Module]]
    tell: Callable[[nn.Module], None]
    clocks: Callable[[nn.Module], Sequence[nn.Linear]]
    prepare: Callable[[nn.Module], None] = lambda network: None


def _call_unet(network: nn.Module, x: Tensor, time: Tensor, cond: Condition) -> Tensor:
    return network(x, time, class_labels=cond.get("label"), return_dict=False)[0]


def _call_dit(network: nn.Module, x: Tensor, time: Tensor, cond: Condition) -> Tensor:
    output = network(x, time, class_labels=cond["label"], return_dict=False)[0]
    return output[:, : x.shape[1]]  # a learned variance, where there is one, is the second half


def _prepare_dit(network: nn.Module) -> None:
    """Labels are dropped by `condition_dropout`, slot by slot, and not by the embedding itself."""
    for block in network.transformer_blocks:
        block.norm1.emb.class_embedder.dropout_prob = 0.0


def _tell_unet(network: nn.Module) -> None:
    network.class_embedding = beside(network.class_embedding)


def _tell_dit(network: nn.Module) -> None:
    for block in network.transformer_blocks:
        embedder = block.norm1.emb.class_embedder
        embedder.embedding_table = beside(embedder.embedding_table)


def _square(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


FAMILIES: dict[str, Family] = {
    "UNet2DModel": Family(
        call=_call_unet,
        sample_shape=lambda config: (config["in_channels"], *_square(config["sample_size"])),
        num_classes=lambda config: config["num_class_embeds"] or 0,
        null_label=lambda config: None,
        blocks=lambda network: [*network.down_blocks, network.mid_block, *network.up_blocks],
        tell=_tell_unet,
        clocks=lambda network: [network.time_embedding.linear_2],
    ),
    "DiTTransformer2DModel": Family(
        call=_call_dit,
        sample_shape=lambda config: (config["in_channels"], *_square(config["sample_size"])),
        num_classes=lambda config: config["num_embeds_ada_norm"],
        null_label=lambda config: config["num_embeds_ada_norm"],
        blocks=lambda network: list(network.transformer_blocks),
        tell=_tell_dit,
        clocks=lambda network: [block.norm1.emb.timestep_embedder.linear_2 for block in network.transformer_blocks],
        prepare=_prepare_dit,
    ),
}


class DiffusersBackbone(Backbone):
    """A diffusers network.

    Args:
        network: of a class in FAMILIES.
        null_label: the last of a UNet's `num_class_embeds` labels may have been trained as "no class"; name it here.
        gradient_checkpointing: recompute activations in the backward pass.
    """

    def __init__(self, network: nn.Module, *, null_label: int | None = None, gradient_checkpointing: bool = False):
        super().__init__()
        name = type(network).__name__
        if name not in FAMILIES:
            raise ValueError(f"no family for {name}; known are {', '.join(FAMILIES)}; add a row to FAMILIES")
        self._family = FAMILIES[name]
        self.network = network
        config = network.config
        self._null_label = self._family.null_label(config) if null_label is None else null_label
        self.num_classes = self._family.num_classes(config)
        if null_label is not None:
            if null_label != self.num_classes - 1:
                raise ValueError(f"null_label must be the last of {self.num_classes} labels, got {null_label}")
            self.num_classes -= 1
        self.sample_shape = self._family.sample_shape(config)
        self.condition_names = ("label",) if self.num_classes else ()
        self._family.prepare(network)
        if gradient_checkpointing:
            network.enable_gradient_checkpointing()

    def forward(self, x: Tensor, time: Tensor, cond: Condition) -> Tensor:
        if self.told:
            cond = {"label": self._beside_label(cond, time).to(x.dtype)}
        return self._family.call(self.network, x, time, cond)

    def tell(self, name: str) -> None:
        if not self.told:
            self._family.tell(self.network)
        clock = self._family.clocks(self.network)[0]
        self.told.add(name, clock.out_features, clock.weight)

    @torch.no_grad()
    def folded(self, **numbers: float) -> "DiffusersBackbone":
        """What is told is added to the embedding of the time, and so goes into the bias of its last layer."""
        with torch.random.fork_rng(devices=[]):
            network = type(self.network).from_config(self.network.config)
        parameter = next(self.network.parameters())
        network = network.to(parameter).train(self.network.training)
        network.load_state_dict(self.network.state_dict())
        cond = {name: torch.tensor([number]).to(parameter) for name, number in numbers.items()}
        (vector,) = self.told(cond, torch.zeros(1).to(parameter))
        for clock in self._family.clocks(network):
            clock.bias += vector
        own = self._null_label != self._family.null_label(network.config)
        return DiffusersBackbone(network, null_label=self._null_label if own else None)

    def _beside_label(self, cond: Condition, time: Tensor) -> Tensor:
        """[label, vector of what is told], (N, 1 + width)."""
        vector = self.told(cond, time)
        label = cond["label"] if "label" in cond else torch.zeros_like(time)
        return torch.cat([label[:, None].to(vector.dtype), vector], dim=1)

    def null(self, cond: Condition) -> Condition:
        if self._null_label is None:
            raise ValueError(
                "this network was trained without an unconditional label, so it cannot be guided; leave "
                "guidance out, or name its null_label in teacher.denoiser"
            )
        return {"label": torch.full_like(cond["label"], self._null_label)}

    def blocks(self) -> Sequence[nn.Module]:
        return self._family.blocks(self.network)
