"""Attention with Jacobian-vector products: exact, in memory linear in the length, on any device."""

from flash_jvp.api import attention, attention_jvp
from flash_jvp.blocks import jvp_block
from flash_jvp.diffusers_backend import diffusers_backend
from flash_jvp.modes import dual_attention
from flash_jvp.ulysses import ulysses_attention

__all__ = [
    "attention",
    "attention_jvp",
    "diffusers_backend",
    "dual_attention",
    "jvp_block",
    "ulysses_attention",
]
