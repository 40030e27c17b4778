"""What `restore` and `restore_path` share: planes of any colour kind through a model, tiled, on a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from visionhybrid.data.images import Picture
from visionhybrid.infer import memory
from visionhybrid.infer.tiles import tiled

# Two windows of HAT. Measured on a small HAT x2 (window 8, its channel attention at 100 times the usual weight, trained on the
# sample photographs), tiles of 64 on the three held-out ones: overlap 0 loses up to 0.05 dB and shows seams of 37 grey
# levels; two windows (16) stay within 0.003 dB and 0.8 levels of the whole image, and more overlap gains nothing: what
# is left is the channel attention, which averages over the tile. (tests/test_restoration.py has the like with random weights.)
OVERLAP = 32


def _ignore(fraction: float) -> None:
    pass


class Engine:
    """A restorer and how to run it. Arguments as in `restoration.restore`."""

    def __init__(
        self,
        model: nn.Module,
        *,
        tile: int | None = None,
        overlap: int | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        self_ensemble: bool = False,
    ):
        traits: dict[str, Any] = {n: getattr(model, n, None) for n in ("scale", "in_chans", "multiple_of")}
        if lacking := [name for name, value in traits.items() if value is None]:
            kind = type(model).__name__
            raise ValueError(f"restore: {kind} is not a restorer, it has no {', '.join(lacking)}")
        self.scale, self.in_chans, self.multiple_of = (int(value) for value in traits.values())
        if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"restore: dtype must be float32, bfloat16 or float16, got {dtype}")
        if tile is not None and tile < self.multiple_of:
            raise ValueError(
                f"restore: a tile is at least the model's window of {self.multiple_of} pixels, got {tile}"
            )
        if overlap is not None and tile is not None and not 0 <= overlap <= tile // 2:
            raise ValueError(f"restore: overlap goes from 0 to half the tile ({tile // 2}), got {overlap}")
        self.model = model if device is None else model.to(device)
        self.tile, self.overlap, self.self_ensemble = tile, overlap, self_ensemble
        weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0, device=device))
        self.device, self.weight_dtype = weight.device, weight.dtype
        self._per_pixel: float | None = None  # bytes; measured once, when first needed
        self.autocast = dtype if dtype != torch.float32 and dtype != weight.dtype else None

    def picture(self, picture: Picture, advance: Callable[[float], object] = _ignore) -> Picture:
        """`picture` restored; bits, format and metadata stay."""
        alpha = None if picture.alpha is None else picture.alpha[None]
        pixels, alpha = self._restore(picture.pixels[None], alpha, advance)
        return replace(picture, pixels=pixels[0].clamp_(0, 1), alpha=None if alpha is None else alpha[0])

    def channels(self, x: Tensor, advance: Callable[[float], object] = _ignore) -> Tensor:
        """x (B, C, H, W) float32 on the CPU -> (B, C, H * scale, W * scale), not clamped; C as `restore` says."""
        if 0 in x.shape:
            raise ValueError(f"restore: the image is empty, shape {tuple(x.shape)}")
        colours = x.shape[1]
        if colours != self.in_chans and colours in (2, 4):
            pixels, alpha = self._restore(x[:, :-1], x[:, -1:], advance)
            return pixels if alpha is None else torch.cat([pixels, alpha], 1)
        return self._restore(x, None, advance)[0]

    def _restore(self, pixels: Tensor, alpha: Tensor | None, advance) -> tuple[Tensor, Tensor | None]:
        """(B, 1, 3 or in_chans, H, W) and (B, 1, H, W) -> the same at scale; alpha clamped."""
        colours = pixels.shape[1]
        if colours != self.in_chans and (colours, self.in_chans) not in ((1, 3), (3, 1)):
            raise ValueError(f"restore: the model takes {self.in_chans} channels, the image has {colours}")
        planes = list(pixels.split(1, 1)) if self.in_chans == 1 else [pixels]
        # A constant alpha stays what it is; a model might not keep it to the last bit.
        flat = alpha is not None and bool((alpha == alpha.flatten()[0]).all())
        if alpha is not None and not flat:
            planes.append(alpha)
        results = []
        with self._ready():
            for i, plane in enumerate(planes):
                wide = plane if plane.shape[1] == self.in_chans else plane.expand(-1, self.in_chans, -1, -1)
                y = self._run(wide, lambda fraction, i=i: advance((i + fraction) / len(planes)))
                results.append(y if plane.shape[1] == self.in_chans else y.mean(1, keepdim=True))
        if alpha is None:
            return torch.cat(results, 1) if len(results) > 1 else results[0], None
        if flat:
            alpha = alpha.flatten()[0].expand(len(pixels), 1, *results[0].shape[-2:])
        else:
            alpha = results.pop().clamp_(0, 1)
        return torch.cat(results, 1) if len(results) > 1 else results[0], alpha

    def _run(self, x: Tensor, advance) -> Tensor:
        tile = self.tile or self._automatic_tile(x)
        overlap = min(OVERLAP if self.overlap is None else self.overlap, tile // 2)
        fn = _eightfold(self._forward) if self.self_ensemble else self._forward
        return tiled(
            fn,
            x,
            scale=self.scale,
            tile=tile,
            overlap=overlap,
            multiple_of=self.multiple_of,
            progress=advance,
        )

    def _automatic_tile(self, x: Tensor) -> int:
        height, width = x.shape[-2:]
        if len(x) * height * width <= (2 * memory.PROBE) ** 2:  # not worth a probe
            return -(-max(height, width) // self.multiple_of) * self.multiple_of
        if self._per_pixel is None:
            self._per_pixel = memory.bytes_per_pixel(self._forward, x, self.multiple_of, self.device)
        return memory.largest_tile(self._per_pixel, x, self.scale, self.multiple_of, self.device)

    def _forward(self, x: Tensor) -> Tensor:
        """One window, (B, C, h, w) float32 on the CPU -> (B, C, h * scale, w * scale) likewise."""
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            y = self.model(x.to(self.device, self.weight_dtype))
        height, width = x.shape[-2] * self.scale, x.shape[-1] * self.scale
        if y.shape != (len(x), self.in_chans, height, width):
            raise ValueError(
                f"restore: the model made {tuple(y.shape)} of {tuple(x.shape)}, at scale {self.scale}"
            )
        y = y.float().to(x.device)
        if not torch.isfinite(y).all():
            kind = self.autocast or self.weight_dtype
            raise ValueError(
                f"restore: the model gave values that are not finite in {kind}; try bfloat16 or float32"
            )
        return y

    @contextmanager
    def _ready(self) -> Iterator[None]:
        """Eval mode and no gradients; every module's training flag is put back afterwards."""
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for module in training:
                module.training = True


def _eightfold(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The mean of `fn` over the eight flips and rotations of its input, each undone."""

    def run(x: Tensor) -> Tensor:
        total: Tensor | None = None
        for flip in (False, True):
            for turns in range(4):
                y = torch.rot90(fn(torch.rot90(x.flip(-1) if flip else x, turns, (-2, -1))), -turns, (-2, -1))
                y = y.flip(-1) if flip else y
                total = y if total is None else total + y
        assert total is not None
        return total / 8

    return run
