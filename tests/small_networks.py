"""Constructor arguments of tiny diffusers networks, and weights under which a mistake shows."""

import torch

UNET = dict(
    sample_size=8,
    block_out_channels=(16, 32),
    layers_per_block=1,
    norm_num_groups=8,
    attention_head_dim=8,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)
DIT = dict(
    sample_size=8,
    in_channels=4,
    num_attention_heads=2,
    attention_head_dim=8,
    num_layers=2,
    patch_size=2,
    num_embeds_ada_norm=10,
)


def lively(network):
    """Random weights everywhere: what diffusers initialises to zero would hide a mistake."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return network
