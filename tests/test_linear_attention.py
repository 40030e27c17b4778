"""Linear attention: the published implementations' numbers, its options, its errors, its memory."""

import math

import pytest
import torch
from golden import load_case
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from visionhybrid.kernels.linear_attention import FEATURE_MAPS, NORMS, arguments, eager, linear_attention

BACKENDS = ("reference", "eager")


def leaf(x):
    return x.clone().requires_grad_()


def heads_first(x, heads):  # (B, N, C) -> (B, heads, N, C / heads)
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name", ["linear_b1h2n129d16v24_shift6", "linear_b2h3n50d40", "simple_b2h2n33d32", "decoupled_b1h2n40d32"]
)
def test_equals_flash_bidirectional(name, backend):
    case = load_case(f"fbila_{name}")
    inputs = {key: leaf(case.input(key)) for key in case.facts["inputs"] if key != "do"}
    shift = case.facts["kwargs"].get("shift", 0.0)
    q, k, v, *rotated = inputs.values()
    options = {}
    if name.startswith("simple"):
        options = dict(norm="none", scale=q.shape[-1] ** -0.5)
    if rotated:
        options = dict(rotated=tuple(rotated))
    out = linear_attention(q - shift, k - shift, v, backend=backend, **options)
    case.check("o", out, rel=1e-5)
    out.backward(case.input("do").to(out.dtype))
    for key, x in inputs.items():
        case.check(f"d_{key}", x.grad, rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_linfusion(backend):
    case = load_case("linfusion_core_n60d32_shift6")
    x, c = leaf(case.input("x")), leaf(case.input("c"))
    out = linear_attention(*(heads_first(t, 2) for t in (x - 6, c - 6, c)), norm="linfusion", backend=backend)
    out = out.transpose(1, 2).flatten(2)
    case.check("o", out, rel=1e-5)
    out.backward(case.input("do").to(out.dtype))
    case.check("d_x", x.grad, rel=1e-5)
    case.check("d_c", c.grad, rel=1e-5)


def test_equals_linfusion_module():
    """The whole attention module, also with a context of another length, where LinFusion divides by the queries."""
    case = load_case("linfusion_attn_d128h2_mid8")
    state = case.state_dict()

    def project(x, name):
        y = F.linear(x, state[f"to_{name}_.0.weight"], state[f"to_{name}_.0.bias"])
        y = F.layer_norm(y, y.shape[-1:], state[f"to_{name}_.1.weight"], state[f"to_{name}_.1.bias"])
        y = F.linear(F.leaky_relu(y), state[f"to_{name}_.3.weight"], state[f"to_{name}_.3.bias"])
        return F.linear(x + y, state[f"to_{name}.weight"])

    def module(x, c):
        q, k, v = project(x, "q"), project(c, "k"), F.linear(c, state["to_v.weight"])
        out = linear_attention(
            *(heads_first(t, 2) for t in (q, k, v)), norm="linfusion", scale=c.shape[1] / x.shape[1]
        )
        return F.linear(out.transpose(1, 2).flatten(2), state["to_out.0.weight"], state["to_out.0.bias"])

    for tokens in (1, 16, 77, 121):
        x = case.input(f"x{tokens}")
        case.check(f"y{tokens}", module(x, x), rel=1e-5)
    case.check("y77_ctx33", module(case.input("x77"), case.input("ctx33")), rel=1e-5)


def test_equals_sana():
    case = load_case("sana_block_6x5")
    state = case.state_dict()
    x = case.input("hidden_states")
    q, k, v = (heads_first(F.linear(x, state[f"attn1.to_{n}.weight"]), 4) for n in "qkv")
    out = linear_attention(q, k, v, feature_map="relu", norm="sana").transpose(1, 2).flatten(2)
    out = F.linear(out, state["attn1.to_out.0.weight"], state["attn1.to_out.0.bias"])
    case.check("attn", out, rel=1e-5)


def test_equals_dcae():
    """EfficientViT's multi-scale attention as in DC-AE: relu, sums, heads of 8 from two scales."""
    case = load_case("dcae_linattn_6x9")
    state = case.state_dict()
    x = case.input("x")  # (B, C, H, W)
    qkv = torch.cat([F.linear(x.movedim(1, -1), state[f"to_{n}.weight"]).movedim(-1, 1) for n in "qkv"], 1)
    coarse = F.conv2d(qkv, state["to_qkv_multiscale.0.proj_in.weight"], padding=2, groups=48)
    coarse = F.conv2d(coarse, state["to_qkv_multiscale.0.proj_out.weight"], groups=6)
    q, k, v = torch.cat([qkv, coarse], 1).flatten(2).unflatten(1, (-1, 24)).transpose(2, 3).split(8, -1)
    out = linear_attention(q, k, v, feature_map="relu", norm="sana")
    out = out.transpose(2, 3).flatten(1, 2).unflatten(2, x.shape[2:])
    out = F.linear(out.movedim(1, -1), state["to_out.weight"])
    out = F.rms_norm(out, (16,), state["norm_out.weight"], 1e-5) + state["norm_out.bias"]
    case.check("y", out.movedim(-1, 1) + x, rel=1e-5)


def test_padding_may_hold_anything():
    q, k, v = (torch.randn(2, 3, 20, 16) for _ in range(3))
    keep = torch.arange(20) < torch.tensor([[13], [20]])
    alone = linear_attention(q[:1], k[:1, :, :13], v[:1, :, :13])
    k[0, :, 13:], v[0, :, 13:] = math.nan, math.inf
    k.requires_grad_(), v.requires_grad_()
    out = linear_attention(q, k, v, key_mask=keep)
    torch.testing.assert_close(out[:1], alone)
    out.backward(torch.randn_like(out))
    for x in (k, v):
        assert torch.isfinite(x.grad).all()
        assert (x.grad[0, :, 13:] == 0).all()


def test_small_features_keep_their_digits():
    """elu(x) + 1 near -12 is 6e-6, of which float32 keeps three bits if computed as written."""
    q, k, v = torch.randn(1, 1, 8, 16), torch.randn(1, 1, 8, 16) - 12, torch.randn(1, 1, 8, 16)
    got, want = (linear_attention(q, k, v, backend=b).double() for b in ("eager", "reference"))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-8)


def test_result_lies_as_the_queries():
    """Queries from a projection have tokens outside heads; so has the result, and merging heads is free."""
    q, k, v = (heads_first(torch.randn(2, 12, 48), 3) for _ in range(3))
    out = linear_attention(q, k, v)
    assert out.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(out, linear_attention(q.contiguous(), k, v))


class Largest(TorchDispatchMode):
    """The most elements of any tensor made inside, views aside."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not function.is_view:
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_exports_as_plain_operations_that_equal_the_reference(feature_map, norm):
    q, k, v, q_rotated, k_rotated = (
        torch.rand(2, 3, n, d) for n, d in ((5, 8), (7, 8), (7, 4), (5, 8), (7, 8))
    )
    keep = torch.rand(2, 7) < 0.6
    keep[0] = False
    options = dict(feature_map=feature_map, norm=norm, key_mask=keep, scale=0.7)
    if norm != "none":
        options["rotated"] = (q_rotated, k_rotated)

    class Call(torch.nn.Module):
        def forward(self, q, k, v):
            return linear_attention(q, k, v, **options)

    program = torch.export.export(Call(), (q, k, v))
    assert not [node for node in program.graph.nodes if "visionhybrid" in str(node.target)]
    want = linear_attention(q, k, v, backend="reference", **options).float()
    torch.testing.assert_close(program.module()(q, k, v), want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("feature_map", ["elu", "softmax"])
def test_nothing_as_long_as_the_sequence_but_results(feature_map):
    q, k, v = (torch.randn(1, 2, 3 * eager.CHUNK // 32, 16) for _ in range(3))
    with Largest() as forward:
        state = eager.state(k, v, None, None, feature_map)
        out = eager.apply(q, state, None, feature_map, True, 1e-6)
    assert forward.elements == out.numel()
    with Largest() as backward:
        eager.apply_backward(out, q, state, None, feature_map, True, 1e-6)
        eager.state_backward(state, k, v, None, None, feature_map)
    assert backward.elements == q.numel()


def test_the_reference_has_second_derivatives():
    q, k, v = (torch.randn(1, 1, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(3))
    assert torch.autograd.gradgradcheck(
        lambda *x: linear_attention(*x, feature_map="softmax", backend="reference"), (q, k, v)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(q=torch.randn(3, 4)), r"q must be \(B, heads, tokens, dim\), got \(3, 4\)"),
        (dict(k=torch.randn(1, 2, 5, 6)), r"k must be \(1, 2, 5, 4\).*got \(1, 2, 5, 6\)"),
        (dict(k=torch.randn(1, 3, 5, 4)), r"k must be \(1, 2, 5, 4\).*got \(1, 3, 5, 4\)"),
        (dict(v=torch.randn(1, 2, 6, 4)), r"v must be \(1, 2, 5, 4\).*got \(1, 2, 6, 4\)"),
        (
            dict(v=torch.randn(1, 2, 5, 4).half()),
            "q and v need one dtype, got torch.float32 and torch.float16",
        ),
        (dict(k=torch.randn(1, 2, 0, 4)), r"k has an empty axis, got \(1, 2, 0, 4\)"),
        (dict(norm="sena"), "no norm 'sena'; have linfusion, fbla, sana, none"),
        (dict(feature_map="gelu"), "no feature_map 'gelu'; have elu, relu, softmax, identity"),
        (
            dict(key_mask=torch.ones(1, 4, dtype=torch.bool)),
            r"key_mask must be boolean \(1, 5\), got torch.bool \(1, 4\)",
        ),
        (dict(key_mask=torch.ones(1, 5)), r"key_mask must be boolean \(1, 5\), got torch.float32"),
        (
            dict(rotated=(torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4))),
            r"rotated k must be \(1, 2, 5, 4\)",
        ),
        (dict(rotated=(torch.randn(1, 2, 3, 4),) * 2, norm="none"), "rotated concerns the numerator beside"),
    ],
)
def test_bad_input_names_it(change, message):
    given = dict(q=torch.randn(1, 2, 3, 4), k=torch.randn(1, 2, 5, 4), v=torch.randn(1, 2, 5, 4)) | change
    with pytest.raises(ValueError, match=f"linear_attention: {message}"):
        arguments(**given)


def shards(x, sizes, rank):
    return x.split(sizes, 2)[rank]


def sharded(rank: int, world: int, sizes: list[int], folder: str) -> None:
    """One rank: its shard of a problem that every rank draws whole; forward and gradients against the whole."""
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    generator = torch.Generator().manual_seed(0)
    q, k, v, cotangent = (
        torch.randn(2, 3, sum(sizes), 8, dtype=torch.float64, generator=generator) for _ in range(4)
    )
    keep = torch.rand(2, sum(sizes), generator=generator) < 0.6
    for options in (dict(norm="linfusion"), dict(norm="sana", feature_map="relu", eps=0.1)):
        whole = [x.clone().requires_grad_() for x in (q, k, v)]
        out = linear_attention(*whole, key_mask=keep, **options)
        grads = torch.autograd.grad(out, whole, cotangent)
        mine = [shards(x, sizes, rank).clone().requires_grad_() for x in (q, k, v)]
        own = linear_attention(
            *mine,
            key_mask=keep.split(sizes, 1)[rank],
            group=torch.distributed.group.WORLD,
            **options,
        )
        torch.testing.assert_close(own, shards(out, sizes, rank))
        own_grads = torch.autograd.grad(own, mine, shards(cotangent, sizes, rank))
        for a, b in zip(own_grads, grads, strict=True):
            torch.testing.assert_close(a, shards(b, sizes, rank))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("sizes", [[13, 13], [5, 20, 1]], ids=["two equal ranks", "three uneven ranks"])
def test_a_sequence_over_several_processes_equals_one(sizes, tmp_path):
    torch.multiprocessing.spawn(sharded, (len(sizes), sizes, str(tmp_path)), nprocs=len(sizes))


def test_the_reference_refuses_a_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        x = torch.randn(1, 1, 4, 4)
        with pytest.raises(ValueError, match="knows one process"):
            linear_attention(x, x, x, group=torch.distributed.group.WORLD, backend="reference")
    finally:
        torch.distributed.destroy_process_group()
