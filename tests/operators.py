"""The operators of `visionhybrid.kernels` and samples of their arguments, for the tests that treat all alike."""

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from local_samples import LOCAL
from samples import Operator, Sample
from torch import Tensor

from visionhybrid.kernels import linear_attention as linear
from visionhybrid.kernels import selective_scan as scan
from visionhybrid.kernels import sparse_linear_attention as sparse


def _linear_named(inputs: dict[str, Tensor]) -> dict[str, Any]:
    inputs = dict(inputs)
    rotated = tuple(inputs.pop(name) for name in ("q_rotated", "k_rotated") if name in inputs)
    return inputs | {"rotated": rotated or None}


def _linear_ops() -> list[tuple[Any, tuple]]:
    q, k, v = (torch.randn(2, 3, n, d, requires_grad=True) for n, d in ((5, 8), (7, 8), (7, 4)))
    keep = torch.rand(2, 7) < 0.7
    state = torch.rand(2, 3, 8, 5, requires_grad=True)
    grad = torch.randn(2, 5, 3, 4).transpose(1, 2)
    plain = dict(q=q.detach(), k=k.detach(), v=v.detach(), state=state.detach())
    ops = linear.eager.OPERATORS
    return [
        (ops.state, (k, v, None, None, "elu")),
        (ops.state, (k, v, torch.randn_like(k, requires_grad=True), keep, "softmax")),
        (ops.apply, (q, state, None, "relu", True, 1e-3)),
        (ops.apply, (q, state, torch.randn_like(q, requires_grad=True), "elu", True, 1e-3)),
        (ops.state_backward, (plain["state"], plain["k"], plain["v"], None, keep, "softmax")),
        (ops.apply_backward, (grad, plain["q"], plain["state"], None, "elu", True, 1e-3)),
    ]


def _linear(B, heads, N, M, D, E, rotated=False, mask=False, **options) -> Callable[[], Sample]:
    def build():
        shapes = dict(q=(N, D), k=(M, D), v=(M, E))
        if rotated:
            shapes |= dict(q_rotated=(N, D), k_rotated=(M, D))
        inputs = {name: torch.randn(B, heads, *shape, dtype=torch.float64) for name, shape in shapes.items()}
        if rotated:  # a signed numerator over a normaliser of its own, kept away from zero
            options.setdefault("eps", 0.1)
        if mask:
            keep = torch.rand(B, M) < 0.7
            keep[0] = False  # a row of the batch without keys
            keep[-1, 0] = True
            return Sample(inputs=inputs, options={**options, "key_mask": keep})
        return Sample(inputs=inputs, options=options)

    return build


def _scan(batch, channels, length, N, groups=1, C=True, bias=True, **options) -> Callable[[], Sample]:
    def build():
        shapes = dict(u=(batch, channels, length), delta=(batch, channels, length), A=(channels, N))
        shapes |= dict(B=(batch, groups, N, length))
        if C:
            shapes |= dict(C=(batch, groups, N, length), D=(channels,))
        if bias:
            shapes |= dict(delta_bias=(channels,))
        inputs = {name: torch.randn(*shape, dtype=torch.float64) for name, shape in shapes.items()}
        inputs["A"] = -(inputs["A"] / 2).exp()
        if not options.get("delta_softplus"):  # d may be negative, h must not explode
            for name in {"delta", "delta_bias"} & inputs.keys():
                inputs[name] *= 0.02
        return Sample(inputs=inputs, options=options, single=("A", "D", "delta_bias"))

    return build


def _scan_ops() -> list[tuple[Any, tuple]]:
    def args(C, D):
        inputs = _scan(2, 4, 7, 3, groups=2)().cast(torch.float32)
        inputs |= {} if C else {"C": None}
        inputs |= {} if D else {"D": None}
        return *inputs.values(), True, [False, True]

    plain, states = (
        [x.detach() if isinstance(x, Tensor) else x for x in args(*both)]
        for both in ((True, True), (False, False))
    )
    made = []
    for ops in (
        backend.OPERATORS for backend in (scan.eager, scan.native) if not backend.unsupported(*plain)
    ):
        made += [
            (ops.scan, args(True, True)),
            (ops.scan, args(False, False)),
            (ops.scan_backward, (torch.randn(2, 4, 7), *plain)),
            (ops.scan_backward, (torch.randn(2, 4, 3, 7), *states)),
        ]
    return made


def _sparse(
    B, heads, N, M, D, E, block_q=16, block_k=16, critical=0.4, keys=False, pairs=False, **options
) -> Callable[[], Sample]:
    def build():
        inputs = {
            name: torch.randn(B, heads, *shape, dtype=torch.float64)
            for name, shape in dict(q=(N, D), k=(M, D), v=(M, E)).items()
        }
        # Blocks are given: they must not change with the rounding of q and k. Some rows have none.
        draw = torch.rand(B, heads, -(-N // block_q), -(-M // block_k))
        block_map = (draw < critical).to(torch.int8) - (draw > 0.8).to(torch.int8)
        given = dict(block_q=block_q, block_k=block_k, block_map=block_map, **options)
        if keys:
            given["key_mask"] = torch.rand(B, M) < 0.7
        if pairs:
            given["mask"] = torch.rand(N, M) < 0.7
            given["mask"][N // 2] = False  # a query without keys
        return Sample(inputs=inputs, options=given)

    return build


def _sparse_small() -> Sample:
    inputs = {
        name: torch.randn(2, 2, n, d, dtype=torch.float64)
        for name, n, d in (("q", 7, 4), ("k", 9, 4), ("v", 9, 3))
    }
    keep = torch.rand(2, 9) < 0.8
    return Sample(inputs=inputs, options=dict(topk=0.5, block_q=4, block_k=3, variant="v1", key_mask=keep))


def _sparse_call(**kwargs: Any) -> tuple[Tensor, ...]:
    """The branches that there are, without the map."""
    return tuple(x for x in sparse.sparse_linear_attention(**kwargs)[:2] if x is not None)


def _sparse_ops() -> list[tuple[Any, tuple]]:
    q, k, v = (torch.randn(1, 2, 40, 8, requires_grad=True) for _ in range(3))
    lut = torch.tensor([0, 2, 1, -1, 2, 1]).view(1, 1, 3, 2).repeat(1, 2, 1, 1)
    mask = torch.rand(1, 40, 40) > 0.2
    made = [
        (torch.ops.visionhybrid.block_lookup, (torch.ones(1, 2, 3, 4, dtype=torch.int8), 4)),
        (torch.ops.visionhybrid.wide_product, (q, k.mT)),
    ]
    for name, backend in sparse.BACKENDS.items():
        if name != "reference":
            made += [(backend.SPARSE, (q, k, v, lut, see, 16, 16, 0.3)) for see in (None, mask)]
            plain = [x.detach() for x in (q, k, v)]
            saved = [x.detach() for x in backend.SPARSE(q, k, v, lut, mask, 16, 16, 0.3)]
            backward = getattr(torch.ops.visionhybrid, f"block_sparse_attention_{name}_backward")
            made.append((backward, (torch.randn(1, 2, 40, 8), *plain, *saved, lut, mask, 16, 16, 0.3)))
    return made


OPERATORS = {
    "linear_attention": Operator(
        module=linear,
        function=linear.linear_attention,
        named=_linear_named,
        ops=_linear_ops,
        small=_linear(2, 2, 3, 5, 4, 3, mask=True),
        drawn=st.builds(
            _linear,
            *(st.integers(1, high) for high in (3, 3, 300, 300, 48, 48)),
            rotated=st.booleans(),
            mask=st.booleans(),
            feature_map=st.sampled_from(["elu", "softmax"]),
            eps=st.just(0.1),
        ),
        samples={
            # With one key and no eps the result does not depend on q at all.
            "one token": _linear(1, 1, 1, 1, 16, 16, eps=0.1),
            "prime lengths, other value dim": _linear(1, 3, 131, 67, 24, 40),
            "linfusion, head 40": _linear(2, 2, 129, 129, 40, 40, norm="linfusion"),
            "sana, relu, head 72": _linear(1, 2, 65, 127, 72, 72, norm="sana", feature_map="relu", eps=1e-2),
            "softmax, head 80": _linear(1, 2, 33, 64, 80, 80, feature_map="softmax"),
            "softmax, head 160": _linear(1, 1, 33, 40, 160, 160, feature_map="softmax"),
            "head 256": _linear(1, 1, 20, 31, 256, 256),
            "unnormalised, scaled": _linear(
                1, 2, 50, 70, 32, 32, norm="none", feature_map="identity", scale=0.18
            ),
            "padding": _linear(3, 2, 40, 130, 32, 24, mask=True),
            "padding, softmax, sums": _linear(
                2, 1, 9, 37, 16, 16, mask=True, norm="sana", feature_map="softmax"
            ),
            "rotated": _linear(2, 2, 37, 70, 32, 40, rotated=True),
            "rotated, padding, sums, softmax, scaled": _linear(
                2, 1, 37, 70, 80, 80, rotated=True, mask=True, feature_map="softmax", norm="sana", scale=0.5
            ),
        },
    ),
    "selective_scan": Operator(
        module=scan,
        function=scan.selective_scan,
        ops=_scan_ops,
        small=_scan(2, 4, 5, 2, groups=2, delta_softplus=True, reverse=(False, True)),
        drawn=st.builds(
            lambda batch, per_group, length, N, groups, C, bias, softplus, reverse: _scan(
                batch,
                per_group * groups,
                length,
                N,
                groups,
                C,
                bias,
                delta_softplus=softplus,
                reverse=reverse,
            ),
            *(st.integers(1, high) for high in (3, 5, 200, 4, 3)),
            *(st.booleans() for _ in range(4)),
        ),
        samples={
            "one token": _scan(1, 1, 1, 1, delta_softplus=True),
            "states, one a channel": _scan(2, 8, 67, 1, groups=4, C=False, delta_softplus=True),
            "states, three, steps of any sign": _scan(1, 6, 40, 3, groups=2, C=False, bias=False),
            "16 states, skip": _scan(1, 5, 33, 16, delta_softplus=True),
            "a group a channel": _scan(2, 3, 40, 2, groups=3, delta_softplus=True),
            "reversed": _scan(2, 6, 65, 1, delta_softplus=True, reverse=True),
            "cross-scan": _scan(
                1, 20, 99, 2, groups=4, delta_softplus=True, reverse=(False, False, True, True)
            ),
        },
    ),
    "sparse_linear_attention": Operator(
        module=sparse,
        function=_sparse_call,
        ops=_sparse_ops,
        small=_sparse_small,
        drawn=st.builds(
            _sparse,
            *(st.integers(low, high) for low, high in ((1, 2), (1, 3), (1, 90), (20, 90), (1, 12), (1, 12))),
            block_q=st.sampled_from([1, 7, 16, 64]),
            block_k=st.sampled_from([7, 16, 64]),
            critical=st.floats(0.0, 1.0),
            keys=st.booleans(),
            pairs=st.booleans(),
            variant=st.sampled_from(["main", "v1", "paper", "sparse"]),
            feature_map=st.sampled_from(["softmax", "elu"]),
        ),
        samples={
            # With one key neither branch depends on q at all.
            "one query, two keys": _sparse(1, 1, 1, 2, 16, 16, critical=1.0),
            "prime lengths, other value dim": _sparse(1, 3, 131, 67, 24, 40, 32, 16),
            "v1, elu, head 40, padding": _sparse(
                2, 2, 65, 65, 40, 40, variant="v1", feature_map="elu", keys=True
            ),
            "three classes, head 72, blocks of no power of two": _sparse(
                1, 2, 83, 147, 72, 72, 40, 72, variant="paper"
            ),
            "windows, head 80": _sparse(1, 2, 50, 67, 80, 80, 32, 20, variant="sparse", pairs=True),
            "padding and windows, head 160": _sparse(2, 1, 33, 40, 160, 160, keys=True, pairs=True),
            "relu, head 256": _sparse(1, 1, 20, 31, 256, 256, feature_map="relu"),
            "blocks longer than the map, scaled": _sparse(
                1, 2, 100, 90, 32, 32, 128, 128, critical=1.0, scale=0.3
            ),
            "nothing critical": _sparse(1, 1, 40, 40, 16, 16, critical=0.0, variant="v1"),
        },
    ),
    **LOCAL,
}
