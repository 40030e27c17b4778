"""Mixers against the authors' code: the projections around them are done here, as their hosts do."""

import pytest
import torch
from golden import list_cases, load_case
from torch import Tensor
from torch.nn import functional as F

from visionhybrid import mixers
from visionhybrid.diffusion.feed_forward import HyenaFeedForward
from visionhybrid.mixers.agent import agent_attention


def cases(*prefixes: str) -> list[str]:
    return [name for name in list_cases() if name.startswith(prefixes)]


def heads_of(x: Tensor, heads: int) -> Tensor:
    """(B, N, C) -> (B, heads, N, D)."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    """(B, heads, N, D) -> (B, N, C)."""
    return x.transpose(1, 2).flatten(2)


def linear(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def attended(mixer: mixers.Mixer, grid: tuple[int, ...], text: int = 0, tokens: int = 0) -> Tensor:
    """(N, N): the weights of zero logits, which are 1 / keys where a key is seen."""
    tokens = tokens or text + torch.Size(grid).numel()
    zeros = torch.zeros(1, 1, tokens, mixer.head_dim)
    return mixer(zeros, zeros, torch.eye(tokens)[None, None], grid=grid, text_tokens=text)[0, 0]


@pytest.mark.parametrize("name", cases("linfusion_attn_"))
def test_linfusion(name):
    case = load_case(name)
    state, kwargs = case.state_dict(), case.facts["kwargs"]
    heads = kwargs["out_dim"] // kwargs["dim_head"]
    mixer = mixers.create(
        "linfusion",
        dim=kwargs["query_dim"],
        heads=heads,
        head_dim=kwargs["dim_head"],
        mid_dim=kwargs["projection_mid_dim"],
    )
    mixer.load_state_dict({k: v for k, v in state.items() if k.startswith(("to_q_.", "to_k_."))})

    def attention(x, context):
        pairs = zip(
            ("to_q", "to_k", "to_v"), (mixer.hidden(x)[0], mixer.hidden(context)[1], context), strict=True
        )
        q, k, v = (heads_of(linear(state, key, y), heads) for key, y in pairs)
        return linear(state, "to_out.0", joined(mixer(q, k, v, grid=(x.shape[1],))))

    for output in case.outputs:
        query, _, context = output[1:].partition("_ctx")
        x = case.input(f"x{query}")
        case.check(output, attention(x, case.input(f"ctx{context}") if context else x))


@pytest.mark.parametrize("name", cases("linfusion_core_"))
def test_linfusion_core(name):
    case = load_case(name)
    kwargs = case.facts["kwargs"]
    dim = kwargs["heads"] * kwargs["head_dim"]
    mixer = mixers.create(
        "linfusion", dim=dim, heads=kwargs["heads"], head_dim=kwargs["head_dim"], mid_dim=-1
    )
    x, c = (case.input(key).requires_grad_() for key in "xc")
    q, k, v = (heads_of(y, kwargs["heads"]) for y in (x - kwargs["shift"], c - kwargs["shift"], c))
    out = joined(mixer(q, k, v, grid=(x.shape[1],)))
    case.check("o", out)
    for key, grad in zip(("d_x", "d_c"), torch.autograd.grad(out, (x, c), case.input("do")), strict=True):
        case.check(key, grad)


@pytest.mark.parametrize("name", cases("sla_main_", "sla_v1_"))
def test_sla(name):
    case = load_case(name)
    kwargs, dtype = case.facts["kwargs"], getattr(torch, case.facts["compute_dtype"])
    mixer = mixers.create(
        "sla",
        dim=kwargs["head_dim"],
        heads=1,
        head_dim=kwargs["head_dim"],
        topk=kwargs["topk"],
        version="main" if name.startswith("sla_main") else "v1",
        feature_map=kwargs["feature_map"],
        block_q=kwargs["BLKQ"],
        block_k=kwargs["BLKK"],
    )
    mixer.load_state_dict(case.state_dict())
    q, k, v = (case.input(key).requires_grad_() for key in "qkv")
    out = mixer(*(x.to(dtype) for x in (q, k, v)), grid=(q.shape[2],)).to(q.dtype)
    case.check("out", out)
    out.backward(case.input("g"))
    grads = dict(
        dq=q.grad,
        dk=k.grad,
        dv=v.grad,
        dproj_weight=mixer.proj_l.weight.grad,
        dproj_bias=mixer.proj_l.bias.grad,
    )
    for key in grads.keys() & case.outputs.keys():
        case.check(key, grads[key])


@pytest.mark.parametrize("name", cases("clear_mask_"))
def test_clear_masks(name):
    case = load_case(name)
    kwargs = case.facts["kwargs"]
    grid, text, down = (kwargs["height"], kwargs["width"]), kwargs["text_length"], kwargs["down_factor"]
    mixer = mixers.create("clear", dim=4, heads=1, head_dim=4, radius=kwargs["window_size"], down=down)
    want = case.outputs["mask"]
    tokens = text + grid[0] * grid[1]
    # Seen through the values, a pooled token is the mean of its cell.
    values = torch.eye(tokens)
    if down > 1:
        cell = torch.arange(grid[0])[:, None] // down * (grid[1] // down) + torch.arange(grid[1]) // down
        pooled = F.one_hot(cell.flatten()).T.float() / down**2
        values = torch.cat([values, F.pad(pooled, (text, 0))])
    want = want[:tokens, : len(values)] @ values / want[:tokens].sum(1, keepdim=True)
    torch.testing.assert_close(attended(mixer, grid, text), want)


def flux_rotary(x: Tensor, text: int, grid: tuple[int, int], axes=(4, 6, 6), theta: float = 1e4) -> Tensor:
    """FLUX's rotary embedding on (B, heads, N, D): interleaved pairs; text at (0, 0, 0), image at (0, y, x)."""
    ids = torch.zeros(text + grid[0] * grid[1], 3, dtype=torch.float64)
    ids[text:, 1] = torch.arange(grid[0]).repeat_interleave(grid[1])
    ids[text:, 2] = torch.arange(grid[1]).repeat(grid[0])
    angles = [
        ids[:, i, None] * theta ** (-torch.arange(0, n, 2, dtype=torch.float64) / n)
        for i, n in enumerate(axes)
    ]
    turn = torch.polar(torch.ones(()).double(), torch.cat(angles, 1))
    pairs = torch.view_as_complex(x.double().unflatten(3, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(3).to(x.dtype)


@pytest.mark.parametrize("name", cases("clear_attn_"))
def test_clear(name):
    case = load_case(name)
    state, kwargs = case.state_dict(), case.facts["kwargs"]
    heads, width, grid, text = kwargs["heads"], kwargs["hd"], (kwargs["h"], kwargs["w"]), kwargs["text"]
    mixer = mixers.create(
        "clear",
        dim=heads * width,
        heads=heads,
        head_dim=width,
        radius=kwargs["r"],
        down=kwargs["down"],
        trained_tokens=4608 if kwargs["prop"] else None,
    )
    if kwargs["down"] > 1:
        weight = state["processor.spatial_weight"].reshape(kwargs["down"], kwargs["down"])
        mixer.load_state_dict({"spatial_weight": weight})

    def project(x, keys, norms):
        q, k, v = (heads_of(linear(state, key, x), heads) for key in keys)
        q, k = (
            F.rms_norm(y, (width,), state[f"{n}.weight"], 1e-6) for y, n in zip((q, k), norms, strict=True)
        )
        return q, k, v

    tokens = project(case.input("hidden_states"), ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"))
    if kwargs["kind"] == "double":
        names = ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k")
        extra = project(case.input("encoder_hidden_states"), *names)
        tokens = tuple(torch.cat(pair, 2) for pair in zip(extra, tokens, strict=True))
    q, k, v = tokens
    q, k = (flux_rotary(x, text, grid) for x in (q, k))
    out = joined(mixer(q, k, v, grid=grid, text_tokens=text))
    if kwargs["kind"] == "single":
        case.check("img_txt", out)
        return
    case.check("txt", linear(state, "to_add_out", out[:, :text]))
    case.check("img", linear(state, "to_out.0", out[:, text:]))


@pytest.mark.parametrize("name", cases("agentsd_attn_"))
def test_agents(name):
    case = load_case(name)
    state, kwargs = case.state_dict(), case.facts["kwargs"]
    x, agents = case.input("x"), case.input("agent")
    q, k, v = (heads_of(linear(state, key, x), kwargs["heads"]) for key in ("to_q", "to_k", "to_v"))
    a = heads_of(linear(state, "to_q", agents), kwargs["heads"])
    out = agent_attention(q, k, v, a, sharpness=kwargs["k_scale2"], shortcut=kwargs["k_shortcut"])
    case.check("y", linear(state, "to_out.0", joined(out)))


@pytest.mark.parametrize("name", cases("agentsd_block_"))
def test_agents_among_merged_tokens(name):
    """The authors' transformer block around the mixer."""
    case = load_case(name)
    state, kwargs = case.state_dict(), case.facts["kwargs"]
    x = case.input("x").flatten(2).mT
    context = case.input("context")

    def norm(i, y):
        return F.layer_norm(y, y.shape[-1:], state[f"norm{i}.weight"], state[f"norm{i}.bias"])

    def project(block, keys, *inputs):
        return (
            heads_of(linear(state, f"{block}.{key}", y), kwargs["heads"])
            for key, y in zip(keys, inputs, strict=True)
        )

    width = x.shape[2] // kwargs["heads"]
    mixer = mixers.create(
        "agent",
        dim=x.shape[2],
        heads=kwargs["heads"],
        head_dim=width,
        ratio=kwargs["ratio"],
        agent_ratio=kwargs["agent_ratio"],
        cell=[kwargs["sy"], kwargs["sx"]],
    )
    qkv = project("attn1", ("to_q", "to_k", "to_v"), *[norm(1, x)] * 3)
    out = linear(state, "attn1.to_out.0", joined(mixer(*qkv, grid=(kwargs["h"], kwargs["w"]), metric=x)))
    case.check("attn1", out)
    x = x + out
    q, k, v = project("attn2", ("to_q", "to_k", "to_v"), norm(2, x), context, context)
    x = x + linear(state, "attn2.to_out.0", joined(F.scaled_dot_product_attention(q, k, v)))
    value, gate = linear(state, "ff.net.0.proj", norm(3, x)).chunk(2, -1)
    case.check("y", x + linear(state, "ff.net.2", value * F.gelu(gate)))


@pytest.mark.parametrize("name", cases("sana_block_", "sana_tiny_"))
def test_sana(name):
    case = load_case(name)
    kwargs = case.facts["kwargs"]
    heads, width = kwargs["num_attention_heads"], kwargs["attention_head_dim"]
    block = "transformer_blocks.0." if name.startswith("sana_tiny_") else ""
    state = {
        k.removeprefix(f"{block}attn1."): v for k, v in case.state_dict().items() if f"{block}attn1." in k
    }
    x = case.input("h" if block else "hidden_states")
    mixer = mixers.create("linear", dim=heads * width, heads=heads, head_dim=width)
    q, k, v = (heads_of(linear(state, key, x), heads) for key in ("to_q", "to_k", "to_v"))
    out = linear(state, "to_out.0", joined(mixer(q, k, v, grid=(1, x.shape[1]))))
    case.check("attn1" if block else "attn", out)


def general(config: dict) -> mixers.Mixer:
    names = ("kernel_size", "stride", "dilation")
    options = {name: config[name] for name in names}
    return mixers.create("neighborhood", dim=16, heads=1, head_dim=16, causal=config["is_causal"], **options)


@pytest.mark.parametrize("name", cases("gna_1d", "gna_2d", "gna_3d"))
def test_neighborhoods(name):
    case = load_case(name)
    mixer = general(case.facts["kwargs"])
    grid = tuple(case.input("q").shape[1:-2])
    q, k, v = (case.input(key).flatten(1, -3).transpose(1, 2) for key in "qkv")
    case.check("mask", (attended(mixer, grid) > 0).float())
    out = mixer(q, k, v, grid=grid).transpose(1, 2)
    case.check("out", out.reshape(case.outputs["out"].shape))


@pytest.mark.parametrize("index", range(5))
def test_neighborhood_masks(index):
    case = load_case("gna_masks_a")
    config = case.facts["kwargs"]["configs"][index]
    case.check(f"mask{index}", (attended(general(config), tuple(config["shape"])) > 0).float())


@pytest.mark.parametrize("name", cases("freeswim_masks_"))
def test_freeswim(name):
    case = load_case(name)
    for i, config in enumerate(case.facts["kwargs"]["configs"]):
        size = [None, 2 * config["d_h"] + 1, 2 * config["d_w"] + 1]
        mixer = mixers.create("neighborhood", dim=8, heads=1, head_dim=8, kernel_size=size)
        grid = (config["frames"], config["height"], config["width"])
        case.check(f"mask{i}", (attended(mixer, grid) > 0).float())


@pytest.mark.parametrize("name", cases("lina_"))
def test_lina(name):
    """The layer around the mixer: encoder, or decoder with its convolution and gates for 64 tokens of text and 16x16 of image."""
    case = load_case(name)
    state, heads, x = case.state_dict(), case.facts["kwargs"]["num_heads"], case.input("x")
    own = {key: value for key, value in state.items() if not key.startswith(("qkv.", "proj."))}
    gates = own["key_scale"].shape[2] if "key_scale" in own else 0
    conv = next((value.shape[-1] for value in own.values() if value.ndim == 4 and value.shape[-1] > 1), 0)
    dim = x.shape[2]
    mixer = mixers.create("lina", dim=dim, heads=heads, head_dim=dim // heads, conv=conv, gates=gates)
    mixer.load_state_dict(own, strict=True)
    place = dict(grid=(16, 16), text_tokens=x.shape[1] - 256) if conv else dict(grid=(1, x.shape[1]))
    q, k, v = (heads_of(y, heads) for y in linear(state, "qkv", x).chunk(3, -1))
    out = joined(mixer(q, k, v, **place)) + mixer.beside(x, **place)
    (output,) = case.outputs
    case.check(output, linear(state, "proj", out))


def test_linas_gates_and_convolution():
    """Written out, as the published cases have no gates."""
    mixer = mixers.create("lina", dim=8, heads=2, head_dim=4, conv=3, gates=14)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter)
    q, k, v = torch.randn(3, 2, 2, 14, 4)
    p, r = (y.relu() + 1e-6 for y in (q, k))
    weights = p @ (r * mixer.key_scale).mT / 14
    want = weights @ (v * mixer.value_scale) / (weights.sum(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(mixer(q, k, v, grid=(3, 4), text_tokens=2), want, rtol=1e-4, atol=1e-4)
    x = torch.randn(2, 14, 8)
    beside = mixer.beside(x, grid=(3, 4), text_tokens=2)
    assert not beside[:, :2].any()
    maps = F.pad(x[:, 2:].mT.unflatten(2, (3, 4)), (1, 1, 1, 1))
    at = (maps[:, :, 1:4, 2:5] * mixer.dw_conv.weight[:, 0]).sum(
        (2, 3)
    ) + mixer.dw_conv.bias  # of row 1, column 2
    torch.testing.assert_close(beside[:, 2 + 4 + 2], at)


@pytest.mark.parametrize("name", cases("grafting_ops_"))
def test_grafted_operators(name):
    case = load_case(name)
    x, state = case.input("x"), case.state_dict()
    for operator in case.outputs:
        own = {k.removeprefix(f"{operator}."): v for k, v in state.items() if k.startswith(f"{operator}.")}
        if operator.startswith("mlp"):
            ratio = case.facts["kwargs"]["expansion_ratio"]
            network = HyenaFeedForward(x.shape[2], ratio, tokens=len(own["short_filter.weight"]))
            network.load_state_dict(own, strict=True)
            case.check(operator, network(x, (1, x.shape[1])))
            continue
        filters = {k: v for k, v in own.items() if "filter" in k}
        short, inner = (
            filters[f"{f}_filter.weight"].shape[2] if f"{f}_filter.weight" in filters else 0
            for f in ("short", "inner")
        )
        mixer = mixers.create("hyena", dim=x.shape[2], heads=1, head_dim=x.shape[2], short=short, inner=inner)
        mixer.load_state_dict(filters, strict=True)
        q, k, v = (heads_of(y, 1) for y in linear(own, "in_proj", x).chunk(3, -1))
        case.check(operator, linear(own, "out_proj", joined(mixer(q, k, v, grid=(1, x.shape[1])))))
