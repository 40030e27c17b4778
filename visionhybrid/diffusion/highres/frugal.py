"""Less memory for the same numbers: a VAE in tiles, guidance one sample at a time, feed-forward networks in chunks of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from visionhybrid.hosts.diffusers.feed_forward import in_pieces

__all__ = ["frugal"]

# Flux's positions are tables of tokens, without a batch.
_SHARED = frozenset({"img_ids", "txt_ids"})


@contextmanager
def frugal(pipe: Any, *, tile: int | None, one_by_one: bool, chunk: int | None) -> Iterator[None]:
    """Inside, the components of `pipe` need less memory; afterwards they are as they were.

    Args:
        tile: the VAE works in squares of this side, in pixels, on larger pictures; blended where they overlap, so not quite the
            same numbers. None: as it is set.
        one_by_one: the denoiser runs for one element of its batch at a time.
        chunk: feed-forward networks take so many tokens at a time; None: all.
    """
    denoiser = pipe.components.get("unet") or pipe.components["transformer"]
    with ExitStack() as stack:
        if tile is not None and hasattr(pipe.vae, "tile_latent_min_size"):
            stack.enter_context(_tiled(pipe.vae, tile, pipe.vae_scale_factor))
        if chunk is not None:
            for module in denoiser.modules():
                if isinstance(module, FeedForward):
                    stack.enter_context(_hooked(module, TokenChunks(chunk), "visionhybrid_chunks"))
        if one_by_one:
            stack.enter_context(_hooked(denoiser, OneByOne(), "visionhybrid_one_by_one"))
        yield


@contextmanager
def _tiled(vae: Any, tile: int, scale: int) -> Iterator[None]:
    if tile < 4 * scale or tile % scale:
        raise ValueError(f"highres: tile is a multiple of {scale} and at least {4 * scale}, got {tile}")
    names = ("use_tiling", "tile_sample_min_size", "tile_latent_min_size")
    before = {name: getattr(vae, name) for name in names}
    for name, value in zip(names, (True, tile, tile // scale), strict=True):
        setattr(vae, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(vae, name, value)


@contextmanager
def _hooked(module: nn.Module, hook: ModelHook, name: str) -> Iterator[None]:
    before = {key: module.__dict__.get(key) for key in ("forward", "_diffusers_hook")}
    registry = HookRegistry.check_if_exists_or_initialize(module)
    registry.register_hook(hook, name)
    try:
        yield
    finally:
        registry.remove_hook(name, recurse=False)
        for key, value in before.items():
            if value is None:  # a hook that is gone leaves its registry, and `forward` in the instance
                delattr(module, key)


class TokenChunks(ModelHook):
    """(B, N, C) in pieces of at most `size` tokens; diffusers' own chunks must divide N."""

    def __init__(self, size: int) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"highres: chunk_tokens must be positive, got {size}")
        self.size = size

    def new_forward(self, module: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        run = self.fn_ref.original_forward
        return in_pieces(lambda part: run(part, *args, **kwargs), x, -(-x.shape[1] // self.size))


class OneByOne(ModelHook):
    """Each element of the batch by itself: every tensor argument with the batch's length is taken apart, at any depth."""

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        run = self.fn_ref.original_forward
        sample = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
        batch = sample.shape[0]
        if batch == 1:
            return run(*args, **kwargs)
        outputs = [run(*_element(args, i, batch), **_element(kwargs, i, batch)) for i in range(batch)]
        first = outputs[0]
        if isinstance(first, tuple):
            return (torch.cat([output[0] for output in outputs]),)
        return type(first)(sample=torch.cat([output.sample for output in outputs]))


def _element(value: Any, i: int, batch: int) -> Any:
    """`value` of the element `i`, as a batch of one."""
    if isinstance(value, Tensor):
        return value[i : i + 1] if value.ndim and value.shape[0] == batch else value
    if isinstance(value, Mapping):
        return {k: v if k in _SHARED else _element(v, i, batch) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_element(v, i, batch) for v in value)
    return value
