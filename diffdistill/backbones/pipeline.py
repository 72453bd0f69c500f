"""The network of a text-conditioned pipeline: called as its pipeline was heard to call it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffdistill.denoiser import Backbone, Condition
from diffdistill.prompts import Prompts


class PipelineBackbone(Backbone):
    """A network of diffusers, of any class, and the prompts that it can be told.

    A prompt's place in the list is its label, so that prompts are classes to whatever handles these.

    Args:
        network: of the pipeline that `prompts` was made by.
        gradient_checkpointing: recompute activations in the backward pass.
    """

    def __init__(self, network: nn.Module, prompts: Prompts, *, gradient_checkpointing: bool = False):
        super().__init__()
        self.network, self.prompts = network, prompts
        self.sample_shape = tuple(prompts.shape)
        self.num_classes, self.condition_names = len(prompts.texts), ("label",)
        if gradient_checkpointing:
            network.enable_gradient_checkpointing()

    def forward(self, x: Tensor, time: Tensor, cond: Condition) -> Tensor:
        call, channels = self.prompts.call, x.shape[1]
        told = {
            call.sample: list(x.unsqueeze(2).unbind()) if call.listed else x,
            call.time: time * call.time_scale + call.time_shift,
        }
        output = self.network(**told, **self.prompts.arguments(cond["label"], x.dtype))[0]
        if call.listed:
            output = torch.stack(output).squeeze(2)
        output = output[:, :channels] if output.shape[1] == 2 * channels else output
        return output * call.sign

    def null(self, cond: Condition) -> Condition:
        if self.prompts.null is None:
            raise ValueError(
                "these prompts have no negative prompt, because their pipeline takes none; leave guidance out"
            )
        return {"label": torch.full_like(cond["label"], self.prompts.null)}

    def blocks(self) -> Sequence[nn.Module]:
        lists = [part for part in self.network.children() if isinstance(part, nn.ModuleList)]
        return [block for part in lists for block in part]
