"""Sparse-linear attention against the authors' kernels; the choice of blocks; bad input. Its definition: test_operators.py."""

import pytest
import torch
from golden import list_cases, load_case

from visionhybrid.kernels.sparse_linear_attention import (
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
    assert lookup(block_map[:, :, 2:]).tolist() == [[[[-1]]]], (
        "a column to gather by, where nothing is critical"
    )


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
