"""Attention that carries tangents, in the attention dispatch of diffusers.

Not every transformer of diffusers asks its dispatch (some processors call scaled_dot_product_attention themselves), so
`flash_jvp.dual_attention`, which covers those too, is the first choice; this one is for backends other than PyTorch's.
A backend of a new name is not offered: names are members of a closed enum of diffusers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from flash_jvp.modes import carries_tangent, routed_attention


@contextmanager
def diffusers_backend() -> Iterator[None]:
    """A context in which every attention backend of diffusers is `flash_jvp.attention` where an input has a tangent.

    Whatever backend a model has chosen, it is called as before when no input carries a tangent. The registry is
    restored on exit.

    Raises, from within a call that carries a tangent:
        NotImplementedError: what `dual_attention` refuses; return_lse; the context parallelism of diffusers.
    """
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    backends = dict(registry._backends)
    registry._backends.update({name: _routed(backend) for name, backend in backends.items()})
    try:
        yield
    finally:
        registry._backends.update(backends)


def _routed(backend: Callable) -> Callable:
    @functools.wraps(backend)
    def route(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options):
        tensors = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
        if not any(carries_tangent(x) for x in tensors):
            options = options if attn_mask is None else {"attn_mask": attn_mask, **options}
            return backend(query=query, key=key, value=value, **options)
        if options.pop("_parallel_config", None) is not None:
            raise NotImplementedError(
                "the context parallelism of diffusers drops tangents; disable it and call flash_jvp.ulysses_attention "
                "in the attention processor"
            )
        if options.pop("return_lse", False):
            raise NotImplementedError("return_lse with a tangent; call flash_jvp.attention_jvp, which returns it")
        if attn_mask is not None and attn_mask.shape == (query.shape[0], key.shape[1]):
            attn_mask = attn_mask[:, None, None]  # diffusers: a matrix of this shape is a mask of keys
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # BSHD there
        return routed_attention(q, k, v, attn_mask, **options).transpose(1, 2)

    return route
