"""CLEAR's Flux and TurboDiffusion's Wan: the authors' numbers through `attach`, and their files."""

import pytest
import tiny_transformers as tiny
import torch
from golden import list_cases, load_case
from safetensors.torch import save_file
from tiny_transformers import DOUBLE, SINGLE, flux_inputs, output, places, transformer

import visionhybrid
from visionhybrid.hosts.diffusers import models


def cases(prefix):
    return [name for name in list_cases() if name.startswith(prefix)]


@pytest.mark.parametrize("name", cases("clear_flux_"))
def test_flux_with_clear(name):
    from diffusers import FluxTransformer2DModel

    case = load_case(name)
    kwargs, state = case.facts["kwargs"], case.state_dict()
    model = FluxTransformer2DModel(**kwargs["config"]).eval()
    model.load_state_dict({k: v for k, v in state.items() if "spatial_weight" not in k}, strict=True)
    model.pos_embed.theta *= kwargs["ntk_factor"]
    trained = dict(trained_tokens=4608) if kwargs["proportional_attention"] else {}
    visionhybrid.attach(model, "clear", radius=kwargs["r"], down=kwargs["down"], **trained)
    if kwargs["down"] > 1:
        for row in visionhybrid.describe(model).mixed:
            weight = state[f"{row.name}.processor.spatial_weight"].squeeze()
            model.get_submodule(row.name).mixer.spatial_weight.data.copy_(weight)
    inputs = {key: case.input(key) for key in case.facts["inputs"]}
    inputs["timestep"] = inputs["timestep"] / 1000
    if kwargs["config"]["guidance_embeds"]:
        inputs["guidance"] = torch.full((1,), 3.5)
    inputs |= dict(img_ids=places(kwargs["h"], kwargs["w"]), txt_ids=torch.zeros(kwargs["text"], 3))
    case.check("sample", output(model, **inputs))


@pytest.mark.parametrize("name", cases("clear_attn_"))
def test_flux_attention_with_clear(name):
    """The authors' processor in one attention of a double or single block."""
    case = load_case(name)
    kwargs, state = case.facts["kwargs"], case.state_dict()
    model = tiny.flux(attention_head_dim=kwargs["hd"], num_attention_heads=kwargs["heads"]).transformer
    where = DOUBLE if kwargs["kind"] == "double" else SINGLE
    attn = model.get_submodule(where)
    attn.load_state_dict({k: v for k, v in state.items() if "spatial" not in k}, strict=True)
    trained = dict(trained_tokens=4608) if kwargs["prop"] else {}
    visionhybrid.attach(model, "clear", layers=where, radius=kwargs["r"], down=kwargs["down"], **trained)
    if kwargs["down"] > 1:
        attn.mixer.spatial_weight.data.copy_(state["processor.spatial_weight"].squeeze())
    grid = kwargs["h"], kwargs["w"]
    rotary = model.pos_embed(torch.cat([torch.zeros(kwargs["text"], 3), places(*grid)]))
    inputs = {key: case.input(key) for key in case.facts["inputs"]}
    with torch.no_grad():
        out = attn(**inputs, image_rotary_emb=rotary, grid=grid, text_tokens=kwargs["text"])
    for key, value in zip(case.outputs, (out,) if where == SINGLE else out, strict=True):
        case.check(key, value)


def wan_model(kwargs):
    """diffusers' model of the shape that a golden case's kwargs give TurboDiffusion's."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    return WanTransformer3DModel(
        patch_size=kwargs["patch_size"],
        num_attention_heads=kwargs["num_heads"],
        attention_head_dim=kwargs["dim"] // kwargs["num_heads"],
        in_channels=kwargs["in_dim"],
        out_channels=kwargs["out_dim"],
        cross_attn_norm=kwargs["cross_attn_norm"],
        eps=kwargs["eps"],
        **{key: kwargs[key] for key in ("text_dim", "freq_dim", "ffn_dim", "num_layers")},
    ).eval()


def sla_options(kwargs):
    sla = kwargs["sla"]
    return dict(topk=sla["topk"], feature_map=sla["feature_map"], block_q=sla["BLKQ"], block_k=sla["BLKK"])


def wan_case_inputs(case):
    return dict(
        hidden_states=case.input("x"),
        timestep=torch.tensor([case.facts["timestep"]]),
        encoder_hidden_states=case.input("context"),
    )


@pytest.mark.parametrize("as_file", [False, ".pth", ".safetensors"])
@pytest.mark.parametrize("name", cases("sla_wan_"))
def test_wan_with_sla(name, as_file, tmp_path):
    """TurboDiffusion's checkpoint, whole, in diffusers' model; and that model given back."""
    case = load_case(name)
    model, weights = wan_model(case.facts["kwargs"]), case.state_dict()
    before = output(model, **wan_case_inputs(case))
    if as_file:
        state, weights = weights, tmp_path / f"weights{as_file}"
        torch.save(state, weights) if as_file == ".pth" else save_file(state, weights)
    report = visionhybrid.attach(model, "sla", weights=weights, **sla_options(case.facts["kwargs"]))
    assert {row.weights for row in report.mixed} == {str(weights) if as_file else "the weights given"}
    case.check("out", output(model, **wan_case_inputs(case)))
    first, *others = [row.name for row in report.mixed]
    visionhybrid.detach(model, layers=first)
    visionhybrid.detach(model, layers=others)
    assert torch.equal(output(model, **wan_case_inputs(case)), before)


def test_weights_of_sla_are_whole_or_refused():
    case = load_case("sla_wan_t5h12w16")
    model, state, options = wan_model(case.facts["kwargs"]), case.state_dict(), {}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    without = {key: value for key, value in state.items() if key != "blocks.1.ffn.2.bias"}
    plain = {key: value for key, value in state.items() if "proj_l" not in key}
    half = {
        key: value
        for key, value in state.items()
        if key != "blocks.0.self_attn.attn_op.local_attn.proj_l.bias"
    }
    for weights, message in [
        (without, r"lacks 1 tensors, blocks.1.ffn.net.2.bias first"),
        ({**state, "blocks.0.self_attn.q.scale": torch.ones(1)}, "no place for blocks.0.self_attn.q.scale"),
        (
            {**state, "head.head.bias": torch.ones(3)},
            r"proj_out.bias: expected \(16,\), the weights have \(3,\)",
        ),
        (plain, "these are not weights of SLA"),
        (half, r'Missing key\(s\) in state_dict: "proj_l.bias"'),
    ]:
        with pytest.raises(ValueError, match=message):
            visionhybrid.attach(model, "sla", weights=weights, **options)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_weights_are_one_transformers():
    """Wan 2.2 has two, with weights of their own."""
    pipe = tiny.wan()
    pipe.register_modules(transformer_2=transformer("wan"))
    assert len(visionhybrid.attach(pipe, "sla").mixed) == 4
    visionhybrid.detach(pipe)
    with pytest.raises(ValueError, match="attach to each of this pipeline's transformers by itself"):
        visionhybrid.attach(pipe, "sla", weights="weights.pth")


def test_tuned_weights_cannot_be_given_back_from_a_checkpoint(tmp_path):
    case = load_case("sla_wan_t5h12w16")
    model = wan_model(case.facts["kwargs"])
    visionhybrid.attach(model, "sla", weights=case.state_dict(), **sla_options(case.facts["kwargs"]))
    model.save_pretrained(tmp_path)
    loaded = models.WanTransformer3DModel.from_pretrained(tmp_path)
    case.check("out", output(loaded, **wan_case_inputs(case)))
    with pytest.raises(ValueError, match="its own ones are not in this checkpoint"):
        visionhybrid.detach(loaded)


def clear_weights(model, down=4):
    """What CLEAR's files hold, for a tiny Flux."""
    state = {
        f"{name}.{key}": value + 0.1
        for name in (DOUBLE, SINGLE, "single_transformer_blocks.1.attn")
        for key, value in model.get_submodule(name).state_dict().items()
        if key.startswith("to_") and "add" not in key
    }
    pooled = {
        f"{key}.processor.spatial_weight": torch.rand(1, 1, 1, down, 1, down, 1) for key in (DOUBLE, SINGLE)
    }
    pooled["single_transformer_blocks.1.attn.processor.spatial_weight"] = torch.rand(
        1, 1, 1, down, 1, down, 1
    )
    return {**state, **pooled} if down > 1 else state


@pytest.mark.parametrize("down", [1, 4])
def test_published_clear(down, tmp_path):
    model = transformer("flux")
    before = output(model, **flux_inputs())
    state = clear_weights(model, down)
    file = tmp_path / f"clear_local_8{'_down_4' if down > 1 else ''}.safetensors"
    save_file(state, file)
    report = visionhybrid.attach(model, "clear", weights=file)
    assert [(row.options["radius"], row.options["down"]) for row in report.mixed] == [(8, down)] * 3
    now = model.state_dict()
    for key, value in state.items():
        ours = now[key.replace("processor.", "mixer.")]
        assert torch.equal(ours, value.reshape(ours.shape))
    visionhybrid.detach(model)
    assert torch.equal(output(model, **flux_inputs()), before)


def test_weights_of_clear_are_whole_or_refused(tmp_path, monkeypatch):
    model = transformer("flux")
    state = clear_weights(model)
    named = tmp_path / "clear_local_8_down_4.safetensors"
    save_file(state, named)
    lost = {key: value for key, value in state.items() if key != f"{DOUBLE}.to_out.0.bias"}
    for weights, options, message in [
        (state, {}, "do not say their radius"),
        (state, dict(radius=8, down=2), "these weights have down 4, got 2"),
        (named, dict(radius=16), "these weights have radius 8, got 16"),
        (lost, dict(radius=8), f"{DOUBLE} lacks to_out.0.bias"),
        ({**state, "x_embedder.weight": torch.ones(1)}, dict(radius=8), "no place for x_embedder.weight"),
        (
            {**state, f"{DOUBLE}.to_q.bias": torch.tensor([torch.nan, torch.inf])},
            dict(radius=8),
            rf"^the weights given: 1 of \d+ tensors hold NaN or infinity: {DOUBLE}\.to_q\.bias \(2\)$",
        ),
        (tmp_path / "nothing.safetensors", {}, "is no file"),
        ("nowhere/nothing.safetensors", {}, "is no file"),
    ]:
        with pytest.raises(ValueError, match=message):
            visionhybrid.attach(model, "clear", weights=weights, **options)
    assert not visionhybrid.describe(model).mixed
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"fetch clear_local_16_down_4.safetensors from https://hugg"):
        visionhybrid.attach(model, "clear", weights="Huage001/CLEAR", radius=16, down=4)


@pytest.mark.parametrize("name", cases("sana_tiny_"))
def test_sana_with_linear(name):
    """SANA itself, whose attention the mixer computes now."""
    from diffusers import SanaTransformer2DModel

    case = load_case(name)
    model = SanaTransformer2DModel(**case.facts["kwargs"]).eval()
    model.load_state_dict(case.state_dict(), strict=True)
    visionhybrid.attach(model, "linear")
    mask = torch.ones(2, 7)
    mask[1, 4:] = 0
    sample = output(
        model,
        hidden_states=case.input("x"),
        encoder_hidden_states=case.input("e"),
        timestep=torch.tensor([13, 870]),
        encoder_attention_mask=mask,
    )
    case.check("y", sample)
    with torch.no_grad():
        model.transformer_blocks[0].attn1.mixer.sides = case.input("x").shape[2:]
        case.check("attn1", model.transformer_blocks[0].attn1(case.input("h")))
