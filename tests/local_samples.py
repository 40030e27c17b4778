"""Samples of window attention and neighbourhood attention with its halves."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import strategies as st
from samples import Operator, Sample

from visionhybrid.kernels import neighborhood_attention as neighbours
from visionhybrid.kernels import window_attention as windows


def _window(B, H, W, heads, D, E, bias=True, **options) -> Callable[[], Sample]:
    def build():
        inputs = dict(q=(B, H, W, heads, D), k=(B, H, W, heads, D), v=(B, H, W, heads, E))
        inputs = {name: torch.randn(*shape, dtype=torch.float64) for name, shape in inputs.items()}
        if bias:
            window, reach = windows.arguments(**inputs, **options)[4:6]
            shape = heads, window[0] * window[1], reach[0] * reach[1]
            inputs["bias"] = torch.randn(*shape, dtype=torch.float64)
        return Sample(inputs=inputs, options=options, single=("bias",))

    return build


def _window_drawn(rows, columns, window, extra, shift, heads, D, E, bias):
    options = dict(key_window_size=window + 2 * extra) if extra else dict(shift=shift % window)
    return _window(1, rows * window, columns * window, heads, D, E, bias, window_size=window, **options)


def _window_ops() -> list[tuple[Any, tuple]]:
    calls = []  # Triton's interpreter is slow: one call
    for bias, options in ((True, dict(shift=1)), (False, dict(key_window_size=4))):
        inputs = _window(1, 4, 6, 2, 5, 3, bias, window_size=2, **options)().cast(torch.float32)
        q, k, v, bias, window, reach, shift, scale = windows.arguments(**inputs, **options, window_size=2)
        args = q, k, v, bias, [*window], [*reach], [*shift], scale
        calls += [(op, args) for op in _of_backends("window_attention")[: 1 if args[3] is None else 2]]
    return calls


def _of_backends(name: str) -> list[Any]:
    """The operator of the eager backend, and of Triton where it is installed."""
    ops = torch.ops.visionhybrid
    return [getattr(ops, n) for n in (name, f"{name}_triton") if hasattr(ops, n)]


def _neighbours(spatial, heads, D, E, kernel_size, rpb=True, B=1, extra=0, **options) -> Callable[[], Sample]:
    def build():
        inputs = {name: torch.randn(B, heads, *spatial, D, dtype=torch.float64) for name in "qk"}
        inputs["v"] = torch.randn(B, heads, *spatial, E, dtype=torch.float64)
        if rpb:
            inputs["rpb"] = torch.randn(heads, *(2 * k - 1 for k in kernel_size), dtype=torch.float64)
        if extra:
            inputs["k_extra"] = torch.randn(B, heads, extra, D, dtype=torch.float64)
            inputs["v_extra"] = torch.randn(B, heads, extra, E, dtype=torch.float64)
        return Sample(inputs=inputs, options={"kernel_size": kernel_size, **options}, single=("rpb",))

    return build


def _with_extra(inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What the function calls `extra` is a pair."""
    extra = tuple(x for name, x in inputs.items() if name.endswith("_extra"))
    return {name: x for name, x in inputs.items() if not name.endswith("_extra")} | dict(extra=extra or None)


def _scores(*args, **options) -> Callable[[], Sample]:
    def build():
        sample = _neighbours(*args, **options)()
        inputs = {name: x for name, x in sample.inputs.items() if name != "v"}
        return Sample(inputs=inputs, options=sample.options, single=("rpb",))

    return build


def _aggregate(spatial, heads, D, kernel_size, B=1, **options) -> Callable[[], Sample]:
    def build():
        slots = torch.Size(kernel_size).numel()
        inputs = dict(weights=torch.rand(B, heads, *spatial, slots, dtype=torch.float64))
        inputs["v"] = torch.randn(B, heads, *spatial, D, dtype=torch.float64)
        return Sample(inputs=inputs, options={"kernel_size": kernel_size, **options})

    return build


def _half(arguments: Callable[..., tuple[Any, ...]]) -> SimpleNamespace:
    return SimpleNamespace(BACKENDS=neighbours.BACKENDS, arguments=arguments)


def _neighbours_drawn(spatial, kernel, dilation, stride, causal, D, E, rpb, extra):
    n = len(spatial)
    strides = [min(s, k) for s, k in zip(stride[:n], kernel[:n], strict=True)]
    return _neighbours(
        spatial, 2, D, E, kernel[:n], rpb, 1, extra, dilation=dilation[:n], stride=strides, causal=causal[:n]
    )


def _triples(values: st.SearchStrategy) -> st.SearchStrategy:
    return st.lists(values, min_size=3, max_size=3)


LOCAL = {
    "window_attention": Operator(
        module=windows,
        function=windows.window_attention,
        ops=_window_ops,
        small=_window(1, 4, 6, 2, 5, 3, window_size=2, shift=1),
        drawn=st.builds(
            _window_drawn,
            # Windows from 3 on: a shifted one of 2 leaves nearly every token alone, and no slope but of exp(-100).
            *(
                st.integers(low, high)
                for low, high in ((1, 3), (1, 3), (3, 6), (0, 2), (0, 5), (1, 3), (1, 40), (1, 40))
            ),
            st.booleans(),
        ),
        samples={
            "window 8, head 30": _window(1, 16, 8, 2, 30, 30, window_size=8),
            "shifted, other value dim": _window(2, 10, 15, 2, 24, 40, window_size=5, shift=2),
            "shifted, one window high, no bias": _window(1, 7, 14, 1, 16, 16, False, window_size=7, shift=3),
            "overlapping": _window(1, 8, 12, 2, 24, 24, window_size=4, key_window_size=6),
            "reach beyond the next window, rectangles": _window(
                1, 6, 8, 1, 16, 16, window_size=(2, 4), key_window_size=(8, 6)
            ),
            "rows shifted, head 128, scaled": _window(
                1, 6, 8, 1, 128, 64, window_size=(3, 4), shift=(1, 0), scale=0.05
            ),
        },
    ),
    "neighborhood_attention": Operator(
        module=neighbours,
        function=neighbours.neighborhood_attention,
        named=_with_extra,
        ops=lambda: [
            (op, (*x.values(), *rest, [3, 3], [1, 2], [2, 1], [0, 1], 0.5))
            for op in _of_backends("neighborhood_attention")
            for rpb, extra, rest in ((True, 2, ()), (False, 0, (None, None, None)))
            for x in [_neighbours((5, 6), 2, 4, 3, (3, 3), rpb, extra=extra)().cast(torch.float32)]
        ],
        small=_neighbours((5, 4), 2, 3, 2, (3, 3), dilation=(1, 2)),
        drawn=st.builds(
            _neighbours_drawn,
            st.lists(st.integers(1, 9), min_size=1, max_size=3),
            _triples(st.integers(1, 5)),
            _triples(st.integers(1, 3)),
            _triples(st.integers(1, 5)),
            _triples(st.booleans()),
            st.integers(1, 20),
            st.integers(1, 20),
            st.booleans(),
            st.integers(0, 3),
        ),
        samples={
            "one token": _neighbours((1, 2), 1, 16, 16, (3, 3)),
            "two axes, head 24, extra keys": _neighbours((9, 11), 2, 24, 24, (5, 3), B=2, extra=19),
            "unequal groups, other value dim": _neighbours((7, 13), 2, 20, 36, (3, 3), dilation=(2, 3)),
            "shorter than the window": _neighbours((3, 12), 1, 16, 16, (5, 5), dilation=(1, 2)),
            "strided, even, no bias": _neighbours((12, 10), 2, 30, 30, (6, 4), False, stride=(3, 2)),
            "one axis, causal": _neighbours((37,), 2, 16, 16, (7,), causal=True, stride=(2,)),
            "three axes": _neighbours((4, 5, 6), 1, 16, 16, (3, 3, 4), causal=(True, False, False)),
        },
    ),
    "neighborhood_scores": Operator(
        module=_half(lambda q, k, rpb=None, **options: (q, k, rpb, *options.values())),
        function=neighbours.neighborhood_scores,
        ops=lambda: [
            (op, (*_scores((5, 6), 2, 4, 4, (3, 3))().cast(torch.float32).values(), [3, 3], [1, 2], 0.5))
            for op in _of_backends("neighborhood_scores")
        ],
        small=_scores((5, 4), 2, 3, 3, (3, 3), scale=0.7),
        drawn=st.builds(
            lambda H, W, D, k, rpb: _scores((H, W), 2, D, D, (k, 3), rpb),
            *(st.integers(low, high) for low, high in ((5, 20), (3, 20), (1, 40), (1, 5))),
            st.booleans(),
        ),
        samples={
            "two axes, head 24": _scores((9, 11), 2, 24, 24, (5, 3)),
            "dilated, no bias": _scores((7, 13), 2, 20, 20, (3, 3), False, dilation=(2, 3), scale=0.2),
        },
    ),
    "neighborhood_aggregate": Operator(
        module=_half(lambda weights, v, **options: (weights, v, *options.values())),
        function=neighbours.neighborhood_aggregate,
        autocasts=False,  # the second value tensor of A2Mamba, states of a scan, must stay float32
        ops=lambda: [
            (op, (*_aggregate((5, 6), 2, 4, (3, 3))().cast(torch.float32).values(), [3, 3], [1, 2]))
            for op in _of_backends("neighborhood_aggregate")
        ],
        small=_aggregate((5, 4), 2, 3, (3, 3), dilation=(1, 2)),
        drawn=st.builds(
            lambda H, W, D, k, d: _aggregate((H, W), 2, D, (k, 3), dilation=d),
            *(st.integers(1, high) for high in (20, 20, 40, 5, 3)),
        ),
        samples={
            "two axes, head 24": _aggregate((9, 11), 2, 24, (5, 3)),
            "dilated, short": _aggregate((7, 13), 2, 20, (5, 3), dilation=(2, 3)),
        },
    ),
}
