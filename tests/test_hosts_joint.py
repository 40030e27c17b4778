"""Mixers in real, tiny models with joint tokens, rotary embeddings or video grids: values, layers, saving, training, compiling."""

import copy
import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny_transformers as tiny
import torch
from tiny_pipelines import draw, image_projection, saved_and_loaded
from tiny_transformers import DOUBLE, GRIDS, INPUTS, flux_inputs, output, places, sana_inputs, transformer

import visionhybrid
from visionhybrid.hosts.diffusers import models

pytestmark = pytest.mark.filterwarnings(
    # diffusers' schedulers on numpy 2
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)
PIPELINES = ["flux", "sd3", "wan", "cogvideox"]
MODELS = [*PIPELINES, "sana", "hunyuan_video"]
# mixers of every sort (none, text, grid, hidden states), such that softmax attention is something else
MIXERS = {
    "clear": dict(radius=1.5, down=2),
    "sla": dict(topk=0.3, block_q=16, block_k=16),
    "linfusion": dict(zero_init=False),
    "linear": dict(feature_map="elu"),
    "neighborhood": dict(kernel_size=3),
}


def fits(name, mixer):
    return name != "hunyuan_video" or visionhybrid.mixers.about(mixer).masks


PAIRS = [(name, mixer) for name in MODELS for mixer in MIXERS if fits(name, mixer)]


# ---- attach, detach, describe ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_is_changed_and_given_back(name):
    pipe = getattr(tiny, name)()
    before = draw(pipe)
    report = visionhybrid.attach(pipe, "linfusion", zero_init=False)
    assert len(report.mixed) == len([row for row in report.rows if not row.reason]) > 1
    assert not torch.allclose(draw(pipe), before, atol=1e-4)
    report = visionhybrid.detach(pipe)
    assert not report.mixed
    assert type(pipe.transformer).__module__.startswith("diffusers.")
    assert torch.equal(draw(pipe), before)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "sana"])
def test_softmax_as_a_mixer_is_the_model_itself(name, fused):
    """All that the host does around the mixer (both streams, norms, rotary, order) is diffusers' own computation."""
    model, inputs = transformer(name), INPUTS[name](batch=2)
    before = output(model, **inputs)
    visionhybrid.attach(model, "softmax")
    if fused and hasattr(model, "fuse_qkv_projections"):
        model.fuse_qkv_projections()
    torch.testing.assert_close(output(model, **inputs), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "mixer"), PAIRS)
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
    # in SD3's first block there is an attention of the image alone
    text = {"sd3": {text, 0}, "wan": {0}, "sana": {0}}.get(name, {text})
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
    mixer = "neighborhood" if fits(name, "neighborhood") else "sla"
    report = visionhybrid.attach(model, mixer, layers=first, **MIXERS[mixer])
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


def test_threads_may_run_one_model_at_two_sizes():
    model = transformer("sana")
    visionhybrid.attach(model, "neighborhood", kernel_size=3)
    runs = [sana_inputs((6, 8)), sana_inputs((8, 6))]
    expected = [output(model, **inputs) for inputs in runs]
    barrier = threading.Barrier(2, timeout=20)

    def meet(*args):
        barrier.wait()

    for block in model.transformer_blocks:  # both are between a block and its attention
        block.attn1.register_forward_pre_hook(meet)
    with ThreadPoolExecutor(2) as pool:
        for got, want in zip(pool.map(lambda inputs: output(model, **inputs), runs), expected, strict=True):
            torch.testing.assert_close(got, want)


def test_mixers_that_cannot_honour_hunyuan_videos_mask_are_refused():
    with pytest.raises(ValueError, match="is called with a mask of padded text, which clear cannot honour"):
        visionhybrid.attach(transformer("hunyuan_video"), "clear")


@pytest.mark.parametrize("name", ["wan", "sana"])
def test_cross_attention_is_refused_by_name(name):
    model = transformer(name)
    with pytest.raises(ValueError, match=r"attn2: cross attention: its keys are the text's"):
        visionhybrid.attach(model, "softmax", layers="*.attn2")


# ---- as diffusers' own -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_with_mixers_is_saved_and_loaded(name, tmp_path):
    pipe = getattr(tiny, name)()
    visionhybrid.attach(pipe, "linfusion", zero_init=False)
    loaded = saved_and_loaded(pipe, tmp_path)
    assert str(visionhybrid.describe(loaded)) == str(visionhybrid.describe(pipe))
    torch.testing.assert_close(draw(loaded), draw(pipe), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_with_mixers_is_saved_and_loaded(name, tmp_path):
    model, inputs = transformer(name), INPUTS[name]()
    plain = type(model)
    before = output(model, **inputs)
    mixer = "clear" if fits(name, "clear") else "linfusion"
    visionhybrid.attach(model, mixer, **MIXERS[mixer])
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
    mixer = "clear" if fits(name, "clear") else "linfusion"
    visionhybrid.attach(model, mixer, **MIXERS[mixer])
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


@pytest.mark.parametrize(("name", "mixer"), PAIRS)
def test_half_precision(name, mixer):
    model = transformer(name)
    visionhybrid.attach(model, mixer, **MIXERS[mixer])
    inputs = INPUTS[name]()
    expected = output(model, **inputs)
    model.to(torch.bfloat16)
    half = {  # rotary embeddings, a pair, stay in float32
        key: value.bfloat16() if torch.is_tensor(value) and value.is_floating_point() else value
        for key, value in inputs.items()
    }
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


def ip_adapter(model):
    """An adapter's file of one picture in four tokens, as the authors of IP-Adapter lay it out."""
    torch.manual_seed(1)
    projections = {
        f"0.{key}.{leaf}": torch.randn(shape)
        for key in ("to_k_ip", "to_v_ip")
        for leaf, shape in (("weight", (32, 32)), ("bias", (32,)))
    }
    return {"image_proj": image_projection(), "ip_adapter": projections}


@pytest.mark.parametrize("mixer", ["softmax", "clear"])
def test_ip_adapters_of_flux(mixer):
    from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxIPAdapterAttnProcessor

    inputs = flux_inputs()
    picture = {"ip_adapter_image_embeds": [torch.randn(1, 1, 16, generator=torch.Generator().manual_seed(2))]}

    def seen(model):
        return output(model, **inputs, joint_attention_kwargs=dict(picture))

    plain = transformer("flux")
    before = output(plain, **inputs)
    plain._load_ip_adapter_weights([ip_adapter(plain)])
    expected = seen(plain)
    assert not torch.allclose(expected, before, atol=1e-2)

    model = transformer("flux")
    visionhybrid.attach(model, mixer, **MIXERS.get(mixer, {}))
    mixed = output(model, **inputs)
    model._load_ip_adapter_weights([ip_adapter(model)])
    adapted = seen(model)
    if mixer == "softmax":
        torch.testing.assert_close(adapted, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(adapted, mixed, atol=1e-2)
    for processor in model.attn_processors.values():  # as pipelines set a scale
        if isinstance(processor, FluxIPAdapterAttnProcessor):
            processor.scale = [0.0]
    torch.testing.assert_close(seen(model), mixed, rtol=1e-5, atol=1e-5)
    for processor in model.attn_processors.values():
        if isinstance(processor, FluxIPAdapterAttnProcessor):
            processor.scale = [1.0]
    other = copy.deepcopy(model)
    visionhybrid.detach(other)  # the adapter stays
    assert torch.equal(seen(other), expected)
    model.set_attn_processor(  # as pipelines unload it
        {
            key: FluxAttnProcessor() if isinstance(value, FluxIPAdapterAttnProcessor) else type(value)()
            for key, value in model.attn_processors.items()
        }
    )
    assert torch.equal(output(model, **inputs), mixed)
    visionhybrid.detach(model)
    assert torch.equal(output(model, **inputs), before)


def test_other_processors_are_refused_where_a_mixer_is():
    from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

    model = transformer("flux")
    processors = dict(model.attn_processors)
    visionhybrid.attach(model, "softmax", layers="transformer_blocks")
    processors[f"{DOUBLE}.processor"] = FluxAttnProcessor()
    with pytest.raises(ValueError, match=f"{DOUBLE}.processor runs a mixer; detach that layer first"):
        model.set_attn_processor(processors)
