"""Sparse-linear attention against the authors' kernels and against its own dense definition."""

import pytest
import torch
from golden import list_cases, load_case
from hypothesis import given, settings
from hypothesis import strategies as st

from visionhybrid.kernels.sparse_linear_attention import (
    BACKENDS,
    blocks_of,
    classify,
    sparse_linear_attention,
)
from visionhybrid.kernels.sparse_linear_attention.blocks import block_means, lookup

CASES = [name for name in list_cases() if name.startswith(("sla_main_", "sla_v1_"))]


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("backend", ["reference", "eager", "triton"])
@pytest.mark.parametrize("name", CASES)
def test_published_kernels(name, backend):
    case = load_case(name)
    kwargs = case.facts["kwargs"]
    dtype = getattr(torch, case.facts["compute_dtype"])
    q, k, v = (case.input(n).to(dtype).requires_grad_() for n in "qkv")
    weight, bias = (case.state_dict()[f"proj_l.{n}"].requires_grad_() for n in ("weight", "bias"))
    got = sparse_linear_attention(
        q,
        k,
        v,
        topk=kwargs["topk"],
        feature_map=kwargs["feature_map"],
        block_q=kwargs["BLKQ"],
        block_k=kwargs["BLKK"],
        variant="main" if "main" in name else "v1",
        backend=backend,
    )
    assert torch.equal(got.block_map.float(), case.outputs["block_map"].float())
    case.check("o_s", got.sparse)
    if "o_l" in case.outputs:
        case.check("o_l", got.linear)
    else:  # every block is critical: nothing is left for the linear branch
        assert not got.linear.any()
    out = got.sparse.to(weight.dtype) + got.linear.to(weight.dtype) @ weight.mT + bias
    case.check("out", out)
    out.backward(case.input("g"))
    for key, leaf in dict(dq=q, dk=k, dv=v, dproj_weight=weight, dproj_bias=bias).items():
        if key in case.outputs:
            case.check(key, leaf.grad)


VARIANT = st.sampled_from(["main", "v1", "paper", "sparse"])
FEATURE = st.sampled_from(["softmax", "elu", "relu"])


@settings(max_examples=25, deadline=None)
@given(data=st.data(), variant=VARIANT, feature_map=FEATURE)
def test_eager_equals_definition(data, variant, feature_map):
    agrees("eager", data, variant, feature_map)


@pytest.mark.skipif("triton" not in BACKENDS, reason="triton does not import here")
@pytest.mark.parametrize("masked", ["none", "keys", "pairs"])
@pytest.mark.parametrize(("block_q", "block_k", "width"), [(7, 16, 5), (32, 20, 24), (40, 72, 8)])
def test_triton_equals_definition(block_q, block_k, width, masked):
    """Blocks and head dims that are no powers of two, blocks longer than a tile, rows without a key, strided inputs."""
    n, m = 2 * block_q + 3, 2 * block_k + 5
    q = torch.randn(1, n, 2, width).transpose(1, 2)
    k = torch.randn(1, m, 2, width).transpose(1, 2)
    v = torch.randn(1, m, 2, 11).transpose(1, 2)
    options = dict(topk=0.4, variant="sparse", block_q=block_q, block_k=block_k)
    if masked != "none":
        options["key_mask"] = torch.rand(1, m) > 0.2
    if masked == "pairs":
        options["mask"] = torch.rand(n, m) > 0.3
        options["mask"][3] = False
    cotangent = torch.randn(1, 2, n, 11)
    results = {}
    for backend, dtype in (("reference", torch.float64), ("triton", torch.float32)):
        leaves = [x.to(dtype).detach().requires_grad_() for x in (q, k, v)]
        out = sparse_linear_attention(*leaves, backend=backend, **options).sparse
        results[backend] = [out, *torch.autograd.grad(out, leaves, cotangent.to(out.dtype))]
    for got, want in zip(results["triton"], results["reference"], strict=True):
        assert relative(got, want) < 1e-5


def agrees(fast, data, variant, feature_map):
    """Any lengths (unequal too), head dims, blocks, shares, masks; strided inputs; outputs and gradients."""
    torch.manual_seed(data.draw(st.integers(0, 99)))
    length_q, length_k = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70))
    width, value_width = data.draw(st.sampled_from([1, 5, 8])), data.draw(st.sampled_from([3, 8]))
    options = dict(
        variant=variant,
        feature_map=feature_map,
        topk=data.draw(st.floats(0.01, 1)),
        negligible=data.draw(st.floats(0, 0.9)),
        block_q=data.draw(st.sampled_from([1, 7, 16, 64])),
        block_k=data.draw(st.sampled_from([1, 7, 16, 64])),
    )
    q = torch.randn(2, length_q, 3, width).transpose(1, 2)
    k = torch.randn(2, length_k, 3, width).transpose(1, 2)
    v = torch.randn(2, length_k, 3, value_width).transpose(1, 2)
    if data.draw(st.booleans()):
        options["key_mask"] = torch.rand(2, length_k) > 0.3
    if data.draw(st.booleans()):
        options["mask"] = torch.rand(length_q, length_k) > 0.3
    # The choice of blocks is a constant; both backends get the same one.
    options["block_map"] = sparse_linear_attention(q, k, v, **options).block_map
    results = {}
    cotangents = [torch.randn(2, 3, length_q, value_width) for _ in range(2)]
    for backend, dtype in (("reference", torch.float64), (fast, torch.float32)):
        leaves = [x.to(dtype).detach().requires_grad_() for x in (q, k, v)]
        got = sparse_linear_attention(*leaves, backend=backend, **options)
        loss = (got.sparse * cotangents[0]).sum()
        if variant != "sparse":
            loss = loss + (got.linear * cotangents[1]).sum()
        parts = [got.sparse] if variant == "sparse" else [got.sparse, got.linear]
        results[backend] = parts + list(torch.autograd.grad(loss, leaves))
    for got, want in zip(results[fast], results["reference"], strict=True):
        scale = want.norm().clamp(min=cotangents[0].norm() * 1e-2)
        assert (got.double() - want).norm() / scale < 5e-5


def test_three_classes():
    scores = torch.tensor([[[[5.0, 1.0, 4.0, 2.0, 3.0]]]])
    assert classify(scores, 0.4, 0.2).tolist() == [[[[1, -1, 1, 0, 0]]]]
    assert classify(scores, 0.01).sum() == 1, "at least one block, where the authors' code gives NaN"
    assert classify(scores, 1.0, 0.9).eq(1).all(), "critical blocks win over negligible ones"
    big = torch.rand(1, 1, 1, 100)
    assert classify(big, 0.29).eq(1).sum() == 28, "int(0.29 * 100) is 28; the authors truncate, so do we"


def test_lookup_pads_short_rows():
    block_map = torch.tensor([[[[0, 1, 0, 1], [1, 0, 0, -1], [0, 0, -1, 0]]]], dtype=torch.int8)
    assert lookup(block_map).tolist() == [[[[1, 3], [0, -1], [-1, -1]]]]


def test_short_last_block_divides_by_its_rows():
    x = torch.arange(5.0).view(1, 1, 5, 1)
    assert block_means(x, 2).flatten().tolist() == [0.5, 2.5, 4.0]


@pytest.mark.parametrize(
    "name", ["clear_mask_16x16_t4_r8", "clear_mask_6x9_t5_r3", "clear_mask_8x12_t6_r3_down4"]
)
def test_windows_run_through_the_same_kernel(name):
    """CLEAR's published masks: a block map and a token mask give exactly masked attention."""
    mask = load_case(name).outputs["mask"].bool()
    q, k, v = (torch.randn(1, 2, n, 8) for n in (mask.shape[0], mask.shape[1], mask.shape[1]))
    options = dict(block_q=16, block_k=16)
    block_map = blocks_of(mask, 16, 16)[None, None]
    got = sparse_linear_attention(q, k, v, variant="sparse", block_map=block_map, mask=mask, **options).sparse
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert relative(got, want) < 1e-6


def test_full_share_is_full_attention():
    q, k, v = (torch.randn(2, 2, 100, 16) for _ in range(3))
    got = sparse_linear_attention(q, k, v, topk=1.0, variant="v1")
    assert relative(got.sparse, torch.nn.functional.scaled_dot_product_attention(q, k, v)) < 1e-6
    assert not got.linear.any()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_operators_are_registered_whole():
    q, k, v = (torch.randn(1, 2, 40, 8, requires_grad=True) for _ in range(3))
    lut = torch.tensor([0, 2, 1, -1, 2, 1]).view(1, 1, 3, 2).repeat(1, 2, 1, 1)
    mask = torch.rand(1, 40, 40) > 0.2
    for op in (BACKENDS[name].SPARSE for name in BACKENDS if name != "reference"):
        torch.library.opcheck(op, (q, k, v, lut, None, 16, 16, 0.3))
        torch.library.opcheck(op, (q, k, v, lut, mask, 16, 16, 0.3))
    torch.library.opcheck(torch.ops.visionhybrid.block_lookup, (torch.ones(1, 2, 3, 4, dtype=torch.int8), 4))


def test_gradients_by_finite_differences():
    q, k, v = (torch.randn(1, 1, 9, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    block_map = torch.tensor([[1, 0, -1], [0, 1, 1], [0, 0, 1]], dtype=torch.int8).view(1, 1, 3, 3)
    for variant in ("main", "paper"):
        options = dict(variant=variant, block_map=block_map, block_q=4, block_k=4)
        assert torch.autograd.gradcheck(
            lambda q, k, v, o=options: sparse_linear_attention(q, k, v, **o)[:2], (q, k, v)
        )


def test_compiles_without_a_break():
    q, k, v = (torch.randn(1, 2, 100, 8) for _ in range(3))

    def layer(q, k, v):
        got = sparse_linear_attention(q, k, v, topk=0.3, block_q=16, block_k=16)
        return got.sparse + got.linear

    torch.testing.assert_close(
        torch.compile(layer, fullgraph=True, backend="aot_eager")(q, k, v), layer(q, k, v)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(q=torch.randn(2, 5, 4)), r"q must be \(B, heads, L, D\)"),
        (dict(k=torch.randn(1, 2, 0, 4)), "k must be .* without empty axes"),
        (dict(k=torch.randn(1, 2, 9, 3)), "k must agree with q"),
        (dict(v=torch.randn(1, 2, 8, 4)), "v must agree with k"),
        (dict(v=torch.randn(1, 2, 9, 4).half()), "one dtype"),
        (dict(topk=0.0), r"topk must be a share in \(0, 1\], got 0.0"),
        (dict(negligible=1.0), "negligible must be a share"),
        (dict(variant="mian"), "variant must be one of main, v1, paper, sparse, got 'mian'"),
        (dict(feature_map="hedgehog"), "feature_map must be one of"),
        (dict(block_q=0), "block_q must be positive"),
        (dict(block_map=torch.ones(1, 1, 2, 2)), "block_map must broadcast to"),
        (dict(key_mask=torch.ones(1, 9)), "key_mask must be bool"),
        (dict(mask=torch.ones(9, 8, dtype=torch.bool)), "mask must be bool"),
        (dict(backend="tritn"), "no backend 'tritn' here; have reference, eager, triton"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = dict(zip("qkv", (torch.randn(1, 2, 9, 4) for _ in range(3)), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        sparse_linear_attention(**arguments)


def test_autocast_rounds_inputs_and_nothing_else():
    q, k, v = (torch.randn(1, 2, 90, 16) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        got = sparse_linear_attention(q, k, v, topk=0.5)
    want = sparse_linear_attention(*(x.bfloat16() for x in (q, k, v)), topk=0.5)
    assert got.sparse.dtype == got.linear.dtype == torch.bfloat16
    assert torch.equal(got.sparse, want.sparse)
    assert torch.equal(got.linear, want.linear)


def test_second_derivative_is_refused():
    q, k, v = (torch.randn(1, 1, 20, 4, requires_grad=True) for _ in range(3))
    out = sparse_linear_attention(q, k, v, variant="sparse", block_q=8, block_k=8).sparse
    (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="sparse_linear_attention: second derivatives"):
        grad.sum().backward()
