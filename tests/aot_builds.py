"""What aot.py compiles: every Triton kernel in the configurations in which its launcher calls it, at least one of each kind."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import triton
from triton.compiler import ASTSource


@dataclass(frozen=True, kw_only=True)
class Build:
    """A kernel and what its launcher passes: element types of pointers, constants, lengths of tuples; all else is an int32."""

    name: str
    kernel: Any
    pointers: dict[str, str]
    constants: dict[str, Any]
    floats: tuple[str, ...] = ()
    options: dict[str, Any]
    tuples: dict[str, int] = field(default_factory=dict)
    packed: bool = False  # strides in `tuples` are multiples of 16
    # element type, and the power of two that holds the head dim (of a scan: the states)
    cell: tuple[str, int]
    everywhere: bool = False  # compiled for every target: shared memory and registers end there

    def source(self) -> ASTSource:
        signature, constants = {}, {}
        for i, name in enumerate(self.kernel.arg_names):
            if name in self.tuples:
                length = self.tuples[name]
                signature[name] = ("i32",) * length
                if name.endswith("_s"):  # strides, of which the innermost is 1
                    signature[name], constants[i, length - 1] = (*signature[name][:-1], "constexpr"), 1
            elif name in self.constants:
                signature[name], constants[name] = "constexpr", self.constants[name]
            elif name in self.pointers:
                signature[name] = f"*{self.pointers[name]}"
            elif re.search(r"_s[del]$", name) and name != "d_sd":
                # Innermost strides are 1 where the tensor is contiguous, and Triton makes that a constant.
                signature[name], constants[name] = "constexpr", 1
            else:
                signature[name] = "fp32" if name in self.floats else "i32"
        aligned = {
            (i,): [["tt.divisibility", 16]]
            for i, kind in enumerate(signature.values())
            if kind[0].startswith("*")
        }
        if self.packed:
            for i, name in enumerate(self.kernel.arg_names):
                aligned |= {
                    (i, j): [["tt.divisibility", 16]]
                    for j in range(self.tuples.get(name, 0) - 1)
                    if name.endswith("_s")
                }
        return ASTSource(self.kernel, signature, constants, aligned)


def padded(*dims: int) -> int:
    return triton.next_power_of_2(max(dims))


def _linear() -> Iterator[Build]:
    from visionhybrid.kernels.linear_attention import triton as linear

    def build(label, kernel, D, E, kind, absent=(), floats=(), **flags):
        sizes = linear.blocks(D, E, kind == "fp32", kernel is linear._pull)
        options = {key: sizes.pop(key) for key in ("num_warps",)}
        fp32 = dict.fromkeys(("weights", "out", "state"), "fp32")
        if kernel is linear._apply:
            fp32.pop("out")
        pointers = dict.fromkeys(("x", "y", "rotated", "dx", "drotated", "out"), kind) | fp32 | {"keep": "i1"}
        constants = sizes | flags | dict.fromkeys(absent)
        constants["PRECISION"] = "ieee" if kind == "fp32" else "tf32"
        pointers = {n: t for n, t in pointers.items() if n in kernel.arg_names and n not in constants}
        name = f"linear_attention {label} D={D} E={E} {kind} " + " ".join(str(f) for f in flags.values())
        return Build(
            name=name,
            kernel=kernel,
            pointers=pointers,
            constants=constants,
            floats=floats,
            options=options,
            cell=(kind, padded(D, E)),
            everywhere=D == 256 and not flags["ROTATED"],
        )

    # Every tile size in both precisions, with the flags of training without extras ...
    plain = dict(FEATURES="elu", ROTATED=False, KEEP=False)
    absent, eps = ("rotated", "keep"), ("eps",)
    for D in (16, 32, 40, 128, 256):
        for kind in ("bf16", "fp32"):
            yield build("outer", linear._outer, D, D, kind, (*absent, "weights"), **plain, WEIGHTED=False)
            yield build("apply", linear._apply, D, D, kind, absent, eps, **plain, NORMALISE=True)
            yield build("pull", linear._pull, D, D, kind, absent, eps, **plain, MODE="divided")
    # ... then every value of every flag, at the largest tiles.
    for features, mode in zip(
        ("elu", "relu", "identity", "softmax"), ("keys", "divided", "plain", "divided"), strict=True
    ):
        flags = dict(FEATURES=features, ROTATED=True, KEEP=True)
        yield build("outer", linear._outer, 256, 256, "bf16", **flags, WEIGHTED=True)
        yield build("apply", linear._apply, 256, 256, "bf16", floats=eps, **flags, NORMALISE=mode != "plain")
        yield build("pull", linear._pull, 256, 256, "bf16", floats=eps, **flags, MODE=mode)


def _scan() -> Iterator[Build]:
    from visionhybrid.kernels.selective_scan import triton as scan

    fp32 = ("A", "D", "bias", "starts", "dA", "dB", "dC", "dD", "dbias")

    def build(label, kernel, N, kind, absent=(), **flags):
        sizes = scan.blocks(N, kernel is scan._bwd)
        options = {key: sizes.pop(key) for key in ("num_warps",)}
        pointers = dict.fromkeys(("u", "delta", "B", "C", "grad", "out", "du", "ddelta"), kind)
        pointers |= dict.fromkeys(fp32, "fp32")
        if flags["STATES"]:
            pointers |= {"out": "fp32", "grad": "fp32"}
        constants = sizes | flags | dict.fromkeys(absent)
        pointers = {n: t for n, t in pointers.items() if n in kernel.arg_names and n not in constants}
        name = f"selective_scan {label} N={N} {kind} " + " ".join(f"{k}={v}" for k, v in flags.items())
        return Build(
            name=name,
            kernel=kernel,
            pointers=pointers,
            constants=constants,
            options=options,
            cell=(kind, padded(N)),
            everywhere=not flags["STATES"] and not flags.get("STARTS"),
        )

    for N in (1, 16, 256):
        for kind in ("bf16", "fp32"):
            common = dict(BIAS=True, SOFTPLUS=True)
            yield build(
                "fwd", scan._fwd, N, kind, ("starts",), STATES=False, STARTS=False, SKIP=True, **common
            )
            yield build("bwd", scan._bwd, N, kind, STATES=False, SKIP=True, **common)
    for common in (dict(BIAS=True, SOFTPLUS=True), dict(BIAS=False, SOFTPLUS=False)):
        none = () if common["BIAS"] else ("bias",)
        for N in (1, 3):
            states = dict(STATES=True, SKIP=False)
            yield build(
                "fwd", scan._fwd, N, "bf16", ("C", "D", "starts", *none), **states, STARTS=False, **common
            )
            yield build("bwd", scan._bwd, N, "bf16", ("C", "D", *none), **states, **common)
            yield build(
                "starts",
                scan._fwd,
                N,
                "bf16",
                ("out", "D", *none),
                STATES=False,
                STARTS=True,
                SKIP=False,
                **common,
            )


def _taken(
    kernel: Any, pointers: dict[str, str], constants: dict[str, Any], lengths: dict[str, int]
) -> dict[str, Any]:
    """Of what several kernels are given, what this one has arguments for."""
    names = kernel.arg_names
    return dict(
        kernel=kernel,
        pointers={n: t for n, t in pointers.items() if n in names and n not in constants},
        constants=constants,
        tuples={n: length for n, length in lengths.items() if n in names},
    )


def _window() -> Iterator[Build]:
    from visionhybrid.kernels.window_attention import triton as windows

    lengths = dict.fromkeys(("g_s", "q_s", "k_s", "v_s", "o_s", "dq_s", "dk_s", "dv_s"), 5)
    lengths |= dict(shape=2, grid=2, shift=2)

    def build(kernel, D, kind, window=(16, 16), reach=None, E=None, bias=True, shifted=False):
        reach, E = reach or window, E or D
        sizes = windows.blocks(kernel, window[0] * window[1], reach[0] * reach[1], D, E, kind == "fp32")
        options = {key: sizes.pop(key) for key in ("num_warps", "num_stages")}
        constants = sizes | dict(window=window, reach=reach, BIAS=bias, SHIFTED=shifted)
        constants["PRECISION"] = "ieee" if kind == "fp32" else "tf32"
        if not bias:
            constants["bias"] = None
        pointers = dict.fromkeys(("grad", "q", "k", "v", "bias", "out", "dq", "dk", "dv"), kind)
        pointers |= dict.fromkeys(("lse", "delta", "parts"), "fp32")
        if kind == "fp16":
            pointers["bias"] = "fp32"
        return Build(
            name=f"window_attention {kernel.__name__} D={D} E={E} {kind} {window} {reach} {bias=} {shifted=}",
            **_taken(kernel, pointers, constants, lengths),
            floats=("scale",),
            options=options,
            packed=D % 16 == E % 16 == 0,
            cell=(kind, padded(D, E)),
            everywhere=D == 128 and kind != "fp16" and not shifted,
        )

    kernels = windows.kernels
    for kernel in (kernels._fwd, kernels._bwd_q, kernels._bwd_kv, kernels._bwd_bias):
        for D in (16, 24, 30, 40, 64, 128):
            yield build(kernel, D, "bf16")
            if D != 40:
                yield build(kernel, D, "fp32")
        for D in (30, 128):
            yield build(kernel, D, "fp16", shifted=True)
            yield build(kernel, D, "bf16", (7, 7), shifted=True)
            yield build(kernel, D, "bf16", (16, 16), (24, 24))
        yield build(kernel, 30, "fp32", shifted=True)
        yield build(kernel, 24, "bf16", (3, 4), (5, 8), E=64)
        if kernel is not kernels._bwd_bias:
            yield build(kernel, 30, "bf16", bias=False, shifted=True)
            yield build(kernel, 30, "bf16", (16, 16), (24, 24), bias=False)


def _sparse(amd: bool) -> Iterator[Build]:
    """Every head dim, type, mask, alignment and length of block at least once in each kernel."""
    from visionhybrid.kernels.sparse_linear_attention import tiles
    from visionhybrid.kernels.sparse_linear_attention import triton as sparse

    cases = [
        (16, 16, "bf16", "none", 16, 32, 16),
        (40, 40, "fp16", "pairs", 128, 64, 8),
        (64, 64, "bf16", "none", 128, 128, 16),
        (64, 64, "fp32", "pairs", 64, 64, 16),
        (72, 80, "bf16", "keys", 72, 100, 8),
        (128, 128, "bf16", "none", 64, 64, 16),
        (128, 128, "fp32", "keys", 128, 64, 1),
        (160, 160, "bf16", "none", 64, 64, 16),
        (256, 256, "bf16", "pairs", 128, 128, 1),
        (256, 256, "fp32", "none", 64, 64, 16),
    ]
    for D, E, kind, mask, block_q, block_k, unit in cases:
        size = 4 if kind == "fp32" else 2
        if not tiles.fits(D, E, size, amd):
            continue
        for name, kernel in sparse.KERNELS.items():
            constants = tiles.constants(name, D, E, block_q, block_k, mask, unit, size, amd)
            options = {key: constants.pop(key) for key in ("num_warps", "num_stages")}
            pointers = dict.fromkeys(("q", "k", "v", "out", "grad", "dq", "dk", "dv"), kind)
            pointers |= {"lut": "i32", "count": "i32", "lse": "fp32", "delta": "fp32", "mask": "u8"}
            if mask == "none":
                constants["mask"] = None
            yield Build(
                name=f"sparse_linear_attention {name} {D=} {E=} {kind} {mask=} {block_q=} {block_k=} {unit=}",
                kernel=kernel,
                pointers={n: t for n, t in pointers.items() if n in kernel.arg_names and n not in constants},
                constants=constants,
                floats=("scale",),
                options=options,
                cell=(kind, padded(D, E)),
                everywhere=D >= 160 or (D, kind) == (128, "fp32"),
            )


def _neighborhood() -> Iterator[Build]:
    from visionhybrid.kernels.neighborhood_attention import triton as neighbours
    from visionhybrid.kernels.neighborhood_attention.triton import launch

    lengths = dict.fromkeys(
        ("g_s", "q_s", "k_s", "v_s", "o_s", "w_s", "x_s", "lse_s", "dq_s", "dk_s", "dv_s", "kx_s", "vx_s"), 6
    )
    lengths |= dict.fromkeys(("length", "kernel", "dilation", "stride", "causal", "tiles", "walk"), 3)
    fused, halves = neighbours.fused, neighbours.halves

    def build(kernel, D, kind, E=None, side=(1, 64, 64), first=1, weights=None, absent=(), **flags):
        E = E or D
        sizes = launch.blocks(kernel, side, D, E, kind == "fp32")
        options = {key: sizes.pop(key) for key in ("num_warps", "num_stages")}
        constants = sizes | flags | dict.fromkeys(absent)
        constants["PRECISION"] = "ieee" if kind == "fp32" else "tf32"
        if "FIRST" in kernel.arg_names:
            constants["FIRST"] = first
        if flags.get("BIAS") is False:
            constants["rpb"] = None
        if "EXTRA" in kernel.arg_names and not constants.setdefault("EXTRA", False):
            constants["kx"] = constants["vx"] = None
        pointers = dict.fromkeys(("grad", "q", "k", "v", "x", "kx", "vx", "out", "dq", "dk", "dv"), kind)
        pointers |= dict.fromkeys(("rpb", "lse", "delta", "dkx", "dvx", "parts"), "fp32")
        pointers["w"] = weights or kind
        said = " ".join(f"{k}={v}" for k, v in flags.items())
        return Build(
            name=f"neighborhood_attention {kernel.__name__} D={D} E={E} {kind} {side} {first} {weights or kind} {said}",
            **_taken(kernel, pointers, constants, lengths),
            floats=("scale",),
            options=options,
            packed=D % 16 == E % 16 == 0,
            cell=(weights or kind, padded(D, E)),
            everywhere=D in (1, 128),  # 1: no head dim at all
        )

    for D in (16, 24, 30, 40, 64, 128):
        for kind in ("bf16", "fp32") if D != 40 else ("bf16",):
            for kernel in (fused._fwd, fused._bwd_q, fused._bwd_kv):
                yield build(kernel, D, kind, BIAS=True)
            yield build(halves._table, D, kind, absent=("w",), STORED=False)
            yield build(halves._scores, D, kind, BIAS=True)
            yield build(halves._gather, D, kind)
            yield build(halves._scatter, D, kind)
            if D != 24:
                yield build(fused._bwd_extra, D, kind)
    for kernel in (fused._fwd, fused._bwd_q):
        for kind in ("bf16", "fp32"):
            yield build(kernel, 128, kind, BIAS=True, EXTRA=True)
        yield build(kernel, 24, "bf16", E=64, BIAS=True, EXTRA=True)
    yield build(fused._bwd_kv, 24, "bf16", E=64, BIAS=True)
    yield build(fused._bwd_extra, 24, "bf16", E=64)
    read = ("grad", "q", "k", "v", "rpb", "lse", "delta")
    for kind in ("bf16", "fp32"):
        yield build(halves._table, 1, kind, absent=read, STORED=True)
    # Three axes, a map smaller than a tile, one axis.
    for first, side in ((0, (16, 16, 16)), (1, (1, 4, 7)), (2, (1, 1, 300))):
        axes = dict(first=first, side=side)
        for kernel in (fused._fwd, fused._bwd_q, fused._bwd_kv):
            yield build(kernel, 24, "fp16", **axes, BIAS=False)
        yield build(halves._table, 24, "bf16", **axes, absent=("w",), STORED=False)
        yield build(halves._scores, 24, "fp16", **axes, BIAS=False)
        yield build(halves._gather, 24, "bf16", **axes, weights="fp32")
        yield build(halves._scatter, 24, "bf16", **axes, weights="fp32")


OPERATORS = {
    "linear_attention": lambda target: _linear(),
    "neighborhood_attention": lambda target: _neighborhood(),
    "selective_scan": lambda target: _scan(),
    "sparse_linear_attention": lambda target: _sparse(target.backend == "hip"),
    "window_attention": lambda target: _window(),
}
