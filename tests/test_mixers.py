"""The contract of a mixer, over the whole registry: any grid, text, type, gradient, compile, saving, cost."""

import ast
import copy
import json
from itertools import pairwise
from math import prod
from pathlib import Path

import pytest
import torch
from mixing import SAMPLES, Sample
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from visionhybrid import mixers
from visionhybrid.mixers import window

HEADS, WIDTH = 2, 12
# A grid and its text; sides below, at and above windows, primes, one axis, video, one token.
GRIDS = {
    "8x8": ((8, 8), 0),
    "7x11, 3 text": ((7, 11), 3),
    "13x5, 9 text": ((13, 5), 9),
    "1x1, 2 text": ((1, 1), 2),
    "1x17": ((1, 17), 0),
    "3x5x6, 4 text": ((3, 5, 6), 4),
}
each_sample = pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES.keys())
# One sample a mixer, for what does not depend on options.
each_mixer = pytest.mark.parametrize(
    "sample", {s.name: s for s in SAMPLES.values()}.values(), ids=lambda s: s.name
)


def build(sample: Sample) -> mixers.Mixer:
    """Its parameters, which start at zero as a rule, drawn so that all of them matter."""
    mixer = mixers.create(sample.name, dim=HEADS * WIDTH, heads=HEADS, head_dim=WIDTH, **sample.options)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return mixer


def tokens(grid: tuple[int, ...], text: int, batch: int = 2) -> list[torch.Tensor]:
    """q, k, v and a cotangent as projections leave them: heads are strides, not storage."""
    return [torch.randn(batch, prod(grid) + text, HEADS, WIDTH).transpose(1, 2) for _ in range(4)]


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.isfinite().all()
    return ((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-6)).item()


@pytest.mark.parametrize(("grid", "text"), GRIDS.values(), ids=GRIDS.keys())
@each_sample
def test_output_and_gradients_are_those_of_the_definition(sample, grid, text):
    mixer = build(sample)
    *qkv, cotangent = tokens(grid, text)
    got = [x.clone().requires_grad_() for x in qkv]
    want = [x.double().requires_grad_() for x in qkv]
    out = mixer(*got, grid=grid, text_tokens=text)
    truth = sample.definition(mixer, *want, grid, text)
    assert out.dtype == torch.float32
    assert error(out, truth) < 1e-5
    leaves = dict(mixer.named_parameters())
    leaves = {name: p for name, p in leaves.items() if not name.startswith(("to_q_", "to_k_"))}  # before q, k
    ours = torch.autograd.grad(out, [*got, *leaves.values()], cotangent)
    theirs = torch.autograd.grad(truth, [*want, *leaves.values()], cotangent.double())
    for name, a, b in zip([*"qkv", *leaves], ours, theirs, strict=True):
        # Where one key is seen the gradient of its logit vanishes: compared on the scale of the cotangent.
        assert (a.double() - b).norm() <= 2e-5 * max(b.norm(), cotangent.norm()), name


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("neighborhood", dict(kernel_size=[2, 3, 4], stride=[1, 1, 4], dilation=[1, 2, 1])),
        ("neighborhood", dict(kernel_size=[None, 4, 3], causal=[True, False, False])),
        ("window", dict(window_size=[2, 4, 3], shift=[1, 0, 2])),
        ("window", dict(window_size=[3, 2, 4], shift=[0, 1, 2], overlap=[0.0, 1.0, 0.5])),
    ],
)
def test_one_option_for_each_axis(name, options):
    grid, text = (4, 7, 10), 3
    definition = SAMPLES[name].definition
    mixer = build(Sample(name=name, definition=definition, options=options))
    q, k, v, _ = tokens(grid, text)
    want = definition(mixer, q.double(), k.double(), v.double(), grid, text)
    assert error(mixer(q, k, v, grid=grid, text_tokens=text), want) < 1e-5


@pytest.mark.parametrize("grid", [(43, 3), (17, 3, 2)])
@each_sample
def test_rows_and_their_halo_give_the_rows(sample, grid):
    """What ranks that hold slabs of the grid rely on."""
    mixer, text = build(sample), 3
    halo = mixer.halo(grid)
    if halo is None:  # every token, or a state of all: not for the halo of a neighbour
        assert sample.name in ("softmax", "linfusion", "linear", "lina", "sla", "agent") or mixer.down > 1
        return
    row = prod(grid[1:])
    qkv = tokens(grid, text)[:3]
    want = mixer(*qkv, grid=grid, text_tokens=text)[:, :, text:]
    cuts = [0, 1, grid[0] // 3, grid[0] // 2, grid[0] // 2 + 1, grid[0]]
    for first, last in pairwise(cuts):
        start, stop = halo.around(first, last, grid[0])
        part = [torch.cat([x[:, :, :text], x[:, :, text + start * row : text + stop * row]], 2) for x in qkv]
        got = mixer(*part, grid=(stop - start, *grid[1:]), text_tokens=text)[:, :, text:]
        own = slice((first - start) * row, (last - start) * row)
        torch.testing.assert_close(got[:, :, own], want[:, :, first * row : last * row])


@pytest.mark.parametrize("options", [dict(shift=2), dict(overlap=0.5)])
def test_windows_a_few_at_a_time(options, monkeypatch):
    mixer = build(
        Sample(name="window", definition=SAMPLES["window"].definition, options=dict(window_size=4, **options))
    )
    q, k, v, _ = tokens((22, 9), 3)
    want = mixer(q, k, v, grid=(22, 9), text_tokens=3)
    monkeypatch.setattr(window, "BUDGET", 1)
    torch.testing.assert_close(mixer(q, k, v, grid=(22, 9), text_tokens=3), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_sample
def test_half_precision(sample, dtype):
    """In weights and tokens. Mixers that choose (blocks, agents) may choose otherwise here and there."""
    mixer = build(sample)
    (grid, text) = (9, 10), 5
    *qkv, cotangent = (x.to(dtype) for x in tokens(grid, text))
    want = sample.definition(mixer, *(x.double() for x in qkv), grid, text)
    leaves = [x.requires_grad_() for x in qkv]
    out = mixer.to(dtype)(*leaves, grid=grid, text_tokens=text)
    assert out.dtype == dtype
    rows = (out.double() - want).norm(dim=-1) / want.norm(dim=-1)
    assert rows.quantile(0.75 if sample.name in ("sla", "agent") else 1.0) < 5e-2
    for grad in torch.autograd.grad(out, leaves, cotangent):
        assert grad.dtype == dtype
        assert grad.isfinite().all()


@each_mixer
def test_autocast(sample):
    mixer = build(sample)
    *qkv, _ = tokens((6, 7), 3)
    want = mixer(*qkv, grid=(6, 7), text_tokens=3)
    with torch.autocast("cpu", torch.bfloat16):
        got = mixer(*qkv, grid=(6, 7), text_tokens=3)
    rows = (got.float() - want).norm(dim=-1) / want.norm(dim=-1)
    assert rows.quantile(0.75) < 5e-2


@each_sample
def test_compiles_whole(sample):
    mixer = build(sample)
    torch._dynamo.reset()
    compiled = torch.compile(mixer, fullgraph=True, backend="eager")
    for grid, text in (((6, 7), 3), ((5, 9), 3)):
        *qkv, cotangent = tokens(grid, text)
        leaves = [x.requires_grad_() for x in qkv]
        want, got = (f(*leaves, grid=grid, text_tokens=text) for f in (mixer, compiled))
        torch.testing.assert_close(got, want)
        for a, b in zip(*(torch.autograd.grad(out, leaves, cotangent) for out in (got, want)), strict=True):
            torch.testing.assert_close(a, b)


@each_sample
def test_gradient_checkpointing_changes_nothing(sample):
    mixer = build(sample)
    *qkv, cotangent = tokens((6, 7), 3)
    leaves = [x.requires_grad_() for x in qkv]
    want = mixer(*leaves, grid=(6, 7), text_tokens=3)
    got = checkpoint(mixer, *leaves, grid=(6, 7), text_tokens=3, use_reentrant=False)
    for a, b in zip(*(torch.autograd.grad(out, leaves, cotangent) for out in (got, want)), strict=True):
        assert torch.equal(a, b)


@each_sample
def test_options_rebuild_the_mixer_and_its_state_is_its_parameters(sample):
    mixer = build(sample)
    *qkv, _ = tokens((6, 7), 3)
    want = mixer(*qkv, grid=(6, 7), text_tokens=3)
    state = mixer.state_dict()
    assert state.keys() == dict(mixer.named_parameters()).keys()
    options = json.loads(json.dumps(mixer.options))
    again = mixers.create(sample.name, dim=HEADS * WIDTH, heads=HEADS, head_dim=WIDTH, **options)
    again.load_state_dict(state, strict=True)
    for twin in (again, copy.deepcopy(mixer)):
        assert torch.equal(twin(*qkv, grid=(6, 7), text_tokens=3), want)


class Types(TorchDispatchMode):
    """Collects the types of every floating-point tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.seen |= {x.dtype for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor)}
        return out


@each_sample
def test_no_float64_in_a_forward(sample):
    """Apple's and Intel's GPUs have none."""
    mixer = build(sample)
    *qkv, _ = tokens((6, 7), 3)
    with Types() as types:
        mixer(*qkv, grid=(6, 7), text_tokens=3)
    assert torch.float32 in types.seen
    assert torch.float64 not in types.seen


@pytest.mark.parametrize("name", [name for name in mixers.list_mixers() if mixers.about(name).masks])
def test_hidden_text_is_absent_text(name):
    """Padding among the text, as HunyuanVideo has it, changes no other token; what it holds does not matter."""
    options = dict(block_q=8, block_k=8, topk=0.3) if name == "sla" else {}
    mixer = build(Sample(name=name, definition=None, options=options))
    grid, text = (5, 7), 9
    q, k, v, _ = tokens(grid, text)
    keep = torch.ones(2, text + 35, dtype=torch.bool)
    keep[:, 4:text] = False
    got = mixer(q, k, v, grid=grid, text_tokens=text, key_mask=keep)
    shorter = [x[:, :, keep[0]] for x in (q, k, v)]
    want = mixer(*shorter, grid=grid, text_tokens=4)
    torch.testing.assert_close(got[:, :, keep[0]], want, rtol=1e-5, atol=1e-5)


@each_sample
def test_cost_grows_with_the_grid(sample):
    mixer = build(sample)
    for small, large, text in (((8, 8), (8, 9), 0), ((16, 16), (32, 32), 7), ((2, 9, 9), (3, 9, 9), 7)):
        a, b = mixer.cost(grid=small, text_tokens=text), mixer.cost(grid=large, text_tokens=text)
        assert a.macs < b.macs
        assert a.bytes < b.bytes
    assert mixer.cost(grid=(8, 8), bytes_per=4).bytes > mixer.cost(grid=(8, 8), bytes_per=2).bytes


@pytest.mark.parametrize(
    ("name", "text", "options"),
    [
        ("softmax", 5, {}),
        ("window", 5, dict(window_size=4)),
        ("window", 0, dict(window_size=8, overlap=0.5)),
        ("agent", 5, {}),
        ("neighborhood", 5, dict(kernel_size=5, dilation=2)),
        ("linear", 5, {}),
        ("linear", 0, dict(conv=3)),
        ("linfusion", 5, dict(mid_dim=7)),
        ("lina", 5, dict(conv=3)),
        ("hyena", 5, {}),
        ("sla", 0, dict(block_q=16, block_k=8)),
        ("sla", 16, dict(block_q=16, block_k=8)),
    ],
)
def test_cost_is_what_pytorch_counts(name, text, options):
    mixer = build(Sample(name=name, definition=None, options=options))
    *qkv, _ = tokens((16, 24), text, batch=1)
    with FlopCounterMode(display=False) as counter:
        mixer(*qkv, grid=(16, 24), text_tokens=text)
        if hasattr(mixer, "hidden"):
            mixer.hidden(torch.randn(1, 16 * 24 + text, HEADS * WIDTH))
        if hasattr(mixer, "beside"):
            mixer.beside(torch.randn(1, 16 * 24 + text, HEADS * WIDTH), grid=(16, 24), text_tokens=text)
    assert counter.get_total_flops() == 2 * mixer.cost(grid=(16, 24), text_tokens=text).macs


@each_mixer
def test_what_replaces_softmax_is_cheaper_at_length(sample):
    if sample.name == "softmax":
        return
    mixer = mixers.create(sample.name, dim=640, heads=10, head_dim=64)
    softmax = mixers.create("softmax", dim=640, heads=10, head_dim=64)
    assert mixer.cost(grid=(256, 256)).macs < softmax.cost(grid=(256, 256)).macs / 2


@pytest.mark.parametrize(
    ("name", "options", "side"),
    [
        ("softmax", {}, None),
        # 2 N C (D + 1) + 4 N C M < 2 N^2 C where N > D + 1 + 2 M
        ("linfusion", {}, 37),
        ("linfusion", dict(mid_dim=40), 13),
        ("linear", {}, 9),
        ("window", dict(window_size=8), 9),
        ("neighborhood", dict(kernel_size=13), 14),
        ("clear", dict(radius=8), 14),  # 193 tokens in the disc
    ],
)
def test_crossover(name, options, side):
    mixer = mixers.create(name, dim=640, heads=10, head_dim=64, **options)
    assert mixers.crossover(mixer) == (None if side is None else side**2)


@pytest.mark.parametrize("mid_dim", [None, 5, -1])
def test_linfusion_gates(mid_dim):
    """`hidden` adds the networks' outputs to x, which it leaves alone, with the gradients of the sum."""
    mixer = mixers.create("linfusion", dim=24, heads=2, head_dim=12, mid_dim=mid_dim, zero_init=False)
    x = torch.randn(2, 7, 24, requires_grad=True)
    cotangents = torch.randn(2, 2, 7, 24)
    before = x.detach().clone()
    want = x + mixer.to_q_(x), x + mixer.to_k_(x)
    got = mixer.hidden(x)
    assert torch.equal(x, before)
    leaves = [x, *mixer.parameters()]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    grads = [torch.autograd.grad(pair, leaves, tuple(cotangents)) for pair in (got, want)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
    fresh = mixers.create("linfusion", dim=24, heads=2, head_dim=12)
    assert all(torch.equal(y, x) for y in fresh.hidden(x))


def test_costs_add_and_say_a_time():
    cost = mixers.Cost(macs=6, bytes=10) + mixers.Cost(macs=2, bytes=30)
    assert cost == mixers.Cost(macs=8, bytes=40)
    assert cost.seconds(macs_per_second=4, bytes_per_second=100) == 2
    assert cost.seconds(macs_per_second=400, bytes_per_second=10) == 4


def test_registry_knows_what_mixers_need():
    assert set(mixers.list_mixers()) == {sample.name for sample in SAMPLES.values()}
    for name in mixers.list_mixers():
        about = mixers.about(name)
        assert about.purpose
        assert about.paper.startswith("arXiv:")
        mixer = about.mixer(dim=24, heads=2, head_dim=12)
        assert about.parameters == any(True for _ in mixer.parameters())
        assert mixer.about is about


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: mixers.about("lin_fusion"),
            r"no mixer 'lin_fusion' \(did you mean 'linfusion'\?\); have agent",
        ),
        (lambda: made("sla", top_k=0.2), r"sla has no option 'top_k' \(did you mean 'topk'\?\); have scale"),
        (lambda: made("linear", scale=1.0), "linear has no option 'scale'; have"),
        (lambda: made("softmax", scale=torch.ones(1)), "softmax: options are saved as JSON"),
        (lambda: made("sla", version="v2"), "sla: no version 'v2'; have main, v1, paper"),
        (lambda: made("linfusion", mid_dim=0), "linfusion: mid_dim must be positive"),
        (lambda: made("linear", conv=4), "linear: conv must be odd"),
        (lambda: made("linear", feature_map="gelu"), "linear: feature_map must be one of elu, relu"),
        (lambda: made("lina", conv=2), "lina: conv must be odd"),
        (lambda: mixed("lina", gates=11), "lina: has gates for 11 tokens, got 12"),
        (lambda: made("hyena", short=-1), "hyena: short and inner are numbers of taps"),
        (lambda: made("clear", radius=0), "clear: radius must be above 0"),
        (
            lambda: made("clear", scale=1.0, trained_tokens=9),
            "clear: scale and trained_tokens exclude each other",
        ),
        (lambda: made("agent", ratio=0.9, agent_ratio=0.5), "agent: need 0 <= ratio <= agent_ratio"),
        (lambda: made("agent", cell=[1, 2, 3]), "agent: cell needs one value, or one for each of the 2 axes"),
        (lambda: mixed("neighborhood", kernel_size=[3]), "neighborhood: kernel_size needs one value"),
        (lambda: mixed("window", window_size=4, shift=4), "window: need window_size >= 1"),
        (
            lambda: mixed("softmax", grid=(3, 3)),
            r"softmax: 12 tokens are not 0 of text and a grid of \(3, 3\)",
        ),
        (lambda: mixed("clear", grid=(12,)), r"clear: grid must have 2 or 3 axes, got \(12,\)"),
        (lambda: mixed("softmax", width=5), "softmax: built for head dim 6, got 5"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def made(name: str, **options) -> mixers.Mixer:
    return mixers.create(name, dim=12, heads=2, head_dim=6, **options)


def mixed(name: str, grid: tuple[int, ...] = (3, 4), width: int = 6, **options) -> torch.Tensor:
    x = torch.randn(1, 2, 12, width)
    return made(name, **options)(x, x, x, grid=grid)


def test_mixer_files_do_not_import_each_other():
    folder = Path(mixers.__file__).parent
    owners = {
        Path(about.mixer.__module__.replace(".", "/")).name
        for about in map(mixers.about, mixers.list_mixers())
    }
    for owner in owners:
        tree = ast.parse((folder / f"{owner}.py").read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                names = {(node.module or "").rsplit(".", 1)[-1], *(alias.name for alias in node.names)}
                assert not names & (owners - {owner}) or not (node.module or "").startswith(
                    "visionhybrid.mixers"
                )
