"""Mixers in real, tiny models with joint tokens, rotary embeddings or video grids: values, weights, saving."""

import copy
import logging

import pytest
import tiny_pipelines as tiny
import torch
from golden import list_cases, load_case
from safetensors.torch import save_file

import visionhybrid
from visionhybrid.hosts.diffusers import models

pytestmark = pytest.mark.filterwarnings(
    # diffusers' schedulers on numpy 2
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)
PIPELINES = ["flux", "sd3", "wan"]
MODELS = [*PIPELINES, "sana"]
DOUBLE, SINGLE = "transformer_blocks.0.attn", "single_transformer_blocks.0.attn"
# mixers of every sort (none, text, grid, hidden states), such that softmax attention is something else
MIXERS = {
    "clear": dict(radius=1.5, down=2),
    "sla": dict(topk=0.3, block_q=16, block_k=16),
    "linfusion": dict(zero_init=False),
    "linear": dict(feature_map="elu"),
    "neighborhood": dict(kernel_size=3),
}


def cases(prefix):
    return [name for name in list_cases() if name.startswith(prefix)]


def flux_inputs(grid=(8, 10), text=12, batch=1, **config):
    draw = torch.Generator().manual_seed(0)
    return dict(
        hidden_states=torch.randn(batch, grid[0] * grid[1], 16, generator=draw),
        encoder_hidden_states=torch.randn(batch, text, 32, generator=draw),
        pooled_projections=torch.randn(batch, 32, generator=draw),
        timestep=torch.full((batch,), 0.5),
        img_ids=places(*grid),
        txt_ids=torch.zeros(text, 3),
    )


def places(height, width, frame=0):
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.full_like(y, frame), y, x], -1).reshape(-1, 3).float()


def wan_inputs(grid=(3, 4, 5), batch=1):
    draw = torch.Generator().manual_seed(0)
    return dict(
        hidden_states=torch.randn(batch, 16, grid[0], 2 * grid[1], 2 * grid[2], generator=draw),
        encoder_hidden_states=torch.randn(batch, 7, 32, generator=draw),
        timestep=torch.full((batch,), 500),
    )


def sd3_inputs(grid=(6, 8), batch=1):
    draw = torch.Generator().manual_seed(0)
    return dict(
        hidden_states=torch.randn(batch, 4, 2 * grid[0], 2 * grid[1], generator=draw),
        encoder_hidden_states=torch.randn(batch, 7, 32, generator=draw),
        pooled_projections=torch.randn(batch, 64, generator=draw),
        timestep=torch.full((batch,), 500),
    )


def sana_inputs(grid=(6, 8), batch=1):
    draw = torch.Generator().manual_seed(0)
    return dict(
        hidden_states=torch.randn(batch, 4, *grid, generator=draw),
        encoder_hidden_states=torch.randn(batch, 7, 32, generator=draw),
        timestep=torch.full((batch,), 500),
    )


INPUTS = {"flux": flux_inputs, "sd3": sd3_inputs, "wan": wan_inputs, "sana": sana_inputs}
GRIDS = {"flux": (8, 10), "sd3": (6, 8), "wan": (3, 4, 5), "sana": (6, 8)}


def transformer(name):
    model = getattr(tiny, name)()
    return getattr(model, "transformer", model)


def output(model, **inputs):
    with torch.no_grad():
        return model(**inputs).sample


# ---- the published models --------------------------------------------------------------------------------------------


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
        (tmp_path / "nothing.safetensors", {}, "is no file"),
    ]:
        with pytest.raises(ValueError, match=message):
            visionhybrid.attach(model, "clear", weights=weights, **options)
    assert not visionhybrid.describe(model).mixed
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"fetch clear_local_16_down_4.safetensors from https://hugg"):
        visionhybrid.attach(model, "clear", weights="Huage001/CLEAR", radius=16, down=4)


# ---- attach, detach, describe ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_is_changed_and_given_back(name):
    pipe = getattr(tiny, name)()
    before = tiny.draw(pipe)
    report = visionhybrid.attach(pipe, "linfusion", zero_init=False)
    assert len(report.mixed) == len([row for row in report.rows if not row.reason]) > 1
    assert not torch.allclose(tiny.draw(pipe), before, atol=1e-4)
    report = visionhybrid.detach(pipe)
    assert not report.mixed
    assert type(pipe.transformer).__module__.startswith("diffusers.")
    assert torch.equal(tiny.draw(pipe), before)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", PIPELINES)
def test_softmax_as_a_mixer_is_the_model_itself(name, fused):
    """All that the host does around the mixer (both streams, norms, rotary, order) is diffusers' own computation."""
    model, inputs = transformer(name), INPUTS[name](batch=2)
    before = output(model, **inputs)
    visionhybrid.attach(model, "softmax")
    if fused:
        model.fuse_qkv_projections()
    torch.testing.assert_close(output(model, **inputs), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("name", MODELS)
def test_mixers_get_grid_and_text(name, mixer):
    model, inputs = transformer(name), INPUTS[name]()
    before = output(model, **inputs)
    visionhybrid.attach(model, mixer, **MIXERS[mixer])
    seen = []
    for row in visionhybrid.describe(model).mixed:
        module = model.get_submodule(row.name).mixer
        module.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True)
    changed = output(model, **inputs)
    assert (changed - before).abs().max() > 1e-3
    grid, needed = GRIDS[name], bool(module.about.grids)
    tokens = 1
    for side in grid:
        tokens *= side
    told = name != "flux" or needed  # Flux's places are only looked at if a mixer needs them
    assert {call["grid"] for call in seen} == {grid if told else (tokens,)}
    text = inputs["encoder_hidden_states"].shape[1]
    text = {"flux": {text}, "sd3": {text, 0}}.get(name, {0})  # in SD3's first block there is one without
    assert {call.get("text_tokens", 0) for call in seen} == text
    visionhybrid.detach(model)
    assert torch.equal(output(model, **inputs), before)


@pytest.mark.parametrize("name", MODELS)
def test_some_layers_only(name, caplog, monkeypatch):
    """Attention without a mixer gets neither grid nor text tokens, and diffusers has nothing to warn of."""
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    model, inputs = transformer(name), INPUTS[name]()
    before = output(model, **inputs)
    first = next(row.name for row in visionhybrid.describe(model).rows if not row.reason)
    report = visionhybrid.attach(model, "neighborhood", layers=first, kernel_size=3)
    assert [row.name for row in report.mixed] == [first]
    assert not torch.allclose(output(model, **inputs), before, atol=1e-4)
    assert not caplog.records


def test_linear_is_what_sana_computes():
    model, inputs = transformer("sana"), sana_inputs(batch=2)
    before = output(model, **inputs)
    report = visionhybrid.attach(model, "linear")
    assert [row.name for row in report.mixed] == ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"]
    torch.testing.assert_close(output(model, **inputs), before, rtol=1e-5, atol=1e-5)
    visionhybrid.detach(model)
    assert torch.equal(output(model, **inputs), before)


@pytest.mark.parametrize("name", ["wan", "sana"])
def test_cross_attention_is_refused_by_name(name):
    model = transformer(name)
    with pytest.raises(ValueError, match=r"attn2: cross attention: its keys are the text's"):
        visionhybrid.attach(model, "softmax", layers="*.attn2")


# ---- as diffusers' own -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_with_mixers_is_saved_and_loaded(name, tmp_path):
    from diffusers import DiffusionPipeline

    pipe = getattr(tiny, name)()
    visionhybrid.attach(pipe, "linfusion", zero_init=False)
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert str(visionhybrid.describe(loaded)) == str(visionhybrid.describe(pipe))
    torch.testing.assert_close(tiny.draw(loaded), tiny.draw(pipe), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_with_mixers_is_saved_and_loaded(name, tmp_path):
    model, inputs = transformer(name), INPUTS[name]()
    plain = type(model)
    before = output(model, **inputs)
    visionhybrid.attach(model, "clear", radius=1.5, down=2)
    mixed = output(model, **inputs)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="visionhybrid: this folder has mixers"):
        plain.from_pretrained(tmp_path)
    loaded = getattr(models, plain.__name__).from_pretrained(tmp_path)
    state = model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    # weights of a mapped file lie elsewhere in memory, and sums are taken in another order
    torch.testing.assert_close(output(loaded, **inputs), mixed, rtol=1e-5, atol=1e-5)
    visionhybrid.detach(loaded)
    torch.testing.assert_close(output(loaded, **inputs), before, rtol=1e-5, atol=1e-5)
    other = copy.deepcopy(model)
    visionhybrid.detach(model)
    assert torch.equal(output(other, **inputs), mixed)


@pytest.mark.parametrize("name", MODELS)
def test_checkpointed_gradients_are_the_same(name):
    """Sizes change between forward and backward, as they do when batches of several sizes are accumulated."""
    model = transformer(name).train()
    visionhybrid.attach(model, "clear", radius=1.5, down=2)
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        loss = model(**INPUTS[name]()).sample.square().mean()
        turned = tuple(reversed(GRIDS[name]))
        output(model, **INPUTS[name](turned))
        loss.backward()
        found.append({key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})
    assert any("mixer" in key for key in found[0])
    assert found[0].keys() == found[1].keys()
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-5, atol=1e-7, msg=key)


@pytest.mark.parametrize("mixer", ["sla", "linear"])
@pytest.mark.parametrize("name", MODELS)
def test_compiles_in_one_graph(name, mixer):
    model, inputs = transformer(name), INPUTS[name]()
    visionhybrid.attach(model, mixer, **MIXERS[mixer])
    if name == "flux" and mixer == "linear":  # places are read from a tensor's values
        inputs["joint_attention_kwargs"] = {"grid": GRIDS["flux"]}
    expected = output(model, **inputs)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(output(compiled, **inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("name", MODELS)
def test_half_precision(name, mixer):
    model = transformer(name)
    visionhybrid.attach(model, mixer, **MIXERS[mixer])
    inputs = INPUTS[name]()
    expected = output(model, **inputs)
    model.to(torch.bfloat16)
    half = {key: value.bfloat16() if value.is_floating_point() else value for key, value in inputs.items()}
    got = output(model, **half)
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected).norm() < 0.1 * expected.norm()


def test_places_that_are_no_grid_are_refused():
    """Flux Kontext puts a second image beside the first."""
    model, inputs = transformer("flux"), flux_inputs()
    visionhybrid.attach(model, "neighborhood", layers=DOUBLE, kernel_size=3)
    both = torch.cat([places(4, 10), places(4, 10, frame=1)])
    columns = places(8, 10).reshape(8, 10, 3).transpose(0, 1).reshape(-1, 3)
    for ids in (both, columns, places(8, 10)[torch.arange(79, -1, -1)][:, [0, 2, 1]]):
        with pytest.raises(ValueError, match="img_ids are not one image row by row"):
            output(model, **{**inputs, "img_ids": ids})
    wide = flux_inputs((2, 400))
    expected = output(model, **wide)
    seen = []
    model.get_submodule(DOUBLE).mixer.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["grid"]), with_kwargs=True
    )
    # rounded above 256, as diffusers makes them in half precision
    output(model, **{**wide, "img_ids": wide["img_ids"].bfloat16().float()})
    assert seen == [(2, 400)]
    assert expected.isfinite().all()


def test_ip_adapters_of_flux_are_refused_where_a_mixer_is():
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    model = transformer("flux")
    processors = dict(model.attn_processors)
    visionhybrid.attach(model, "softmax", layers="transformer_blocks")
    processors[f"{DOUBLE}.processor"] = FluxIPAdapterAttnProcessor(32, 32)
    with pytest.raises(ValueError, match=f"{DOUBLE}.processor runs a mixer; detach that layer first"):
        model.set_attn_processor(processors)
