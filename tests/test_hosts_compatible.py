"""Models with mixers behave as diffusers' own: control, offloading, compiling, precision, processors, training."""

import pytest
import tiny_pipelines as tiny
import tiny_transformers as transformers
import torch
from torch._dynamo.testing import CompileCounter

import visionhybrid
from visionhybrid.bench import memory
from visionhybrid.hosts.diffusers import feed_forward

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)
DOWN = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
MID = "mid_block.attentions.0.transformer_blocks.0.attn1"


def mixed(pipeline=tiny.sd15, mixer="linfusion", **options):
    """A pipeline whose mixers do something from the start."""
    pipe = pipeline()
    if mixer == "linfusion":
        options = {"zero_init": False, **options}
    visionhybrid.attach(pipe, mixer, **options)
    return pipe


def output(unet, **changes):
    with torch.no_grad():
        return unet(**{**tiny.unet_inputs(), **changes}).sample


# ---- control and image prompts ---------------------------------------------------------------------------------------


def test_controlnet():
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    pipe = tiny.sd15()
    torch.manual_seed(2)
    control = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8, 16)).eval()
    for parameter in control.controlnet_down_blocks.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    parts = {**pipe.components, "controlnet": control}
    parts = {k: v for k, v in parts.items() if k != "image_encoder"}
    pipe = tiny._quiet(StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False))
    image = torch.rand(1, 3, 32, 32)
    visionhybrid.attach(pipe, "softmax")
    same = tiny.draw(pipe, image=image)
    visionhybrid.detach(pipe)
    torch.testing.assert_close(same, tiny.draw(pipe, image=image), rtol=0, atol=1e-6)
    visionhybrid.attach(pipe, "linfusion", zero_init=False)
    with_control = tiny.draw(pipe, image=image)
    assert not torch.allclose(
        with_control, tiny.draw(pipe, image=image, controlnet_conditioning_scale=0.0), atol=1e-3
    )
    # its own attention can be linear as well: a ControlNet is no denoiser, but a model
    with pytest.raises(ValueError, match="ControlNetModel is not supported"):
        visionhybrid.attach(control, "linfusion")
    # a copy is made from a plain UNet only, and that is said
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: .*mixer"):
        ControlNetModel.from_unet(pipe.unet)


def ip_adapter(unet):
    """Weights of an IP-Adapter for `unet`, made up; keys are numbered over all attention."""
    torch.manual_seed(3)
    weights, number = {}, 1
    for name, module in unet.named_modules():
        if name.endswith("attn2"):
            for key in ("to_k_ip", "to_v_ip"):
                weights[f"{number}.{key}.weight"] = torch.randn(module.inner_dim, 32)
            number += 2
    return {"image_proj": tiny.image_projection(), "ip_adapter": weights}


def test_ip_adapter_keeps_the_mixers():
    pipe = mixed()
    plain = output(pipe.unet)
    pipe.unet._load_ip_adapter_weights([ip_adapter(pipe.unet)])
    assert type(pipe.unet.get_submodule(DOWN.replace("attn1", "attn2")).processor).__name__.startswith(
        "IPAdapter"
    )
    image = {"image_embeds": [torch.randn(2, 1, 16)]}
    prompted = output(pipe.unet, added_cond_kwargs=image)
    assert not torch.allclose(prompted, plain, atol=1e-3)
    pipe.set_ip_adapter_scale(0.0)
    torch.testing.assert_close(output(pipe.unet, added_cond_kwargs=image), plain)
    assert len(visionhybrid.describe(pipe).mixed) == 4
    pipe.unload_ip_adapter()
    torch.testing.assert_close(output(pipe.unet), plain)


# ---- what puts other processors into a model -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda pipe: pipe.enable_attention_slicing(),
        lambda pipe: (pipe.enable_attention_slicing(1), pipe.disable_attention_slicing()),
        lambda pipe: pipe.unet.fuse_qkv_projections(),
        lambda pipe: (pipe.unet.fuse_qkv_projections(), pipe.unet.unfuse_qkv_projections()),
        lambda pipe: pipe.unet.set_default_attn_processor(),
        lambda pipe: pipe.disable_xformers_memory_efficient_attention(),
        lambda pipe: pipe.unet.set_attn_processor(pipe.unet.attn_processors),
        lambda pipe: pipe.enable_freeu(1.0, 1.0, 1.0, 1.0),
    ],
)
def test_mixers_stay_when_diffusers_changes_processors(change):
    pipe = mixed()
    before = output(pipe.unet)
    change(pipe)
    torch.testing.assert_close(output(pipe.unet), before)
    assert len(visionhybrid.describe(pipe).mixed) == 4


def test_a_dict_of_processors_must_keep_the_mixers():
    from diffusers.models.attention_processor import AttnProcessor

    unet = mixed().unet
    with pytest.raises(ValueError, match=r"attn1.processor runs a mixer; detach that layer first"):
        unet.set_attn_processor({name: AttnProcessor() for name in unet.attn_processors})
    before = output(unet)
    unet.set_attn_processor(AttnProcessor())  # one for all the others
    torch.testing.assert_close(output(unet), before)


def test_a_processor_put_over_a_mixer_is_noticed(caplog):
    from diffusers.models.attention_processor import AttnProcessor2_0, PAGIdentitySelfAttnProcessor2_0

    unet = mixed().unet
    before = output(unet)
    unet.get_submodule(MID).processor = AttnProcessor2_0()
    assert torch.equal(output(unet), before)
    assert f"{MID} keeps its linfusion mixer, AttnProcessor2_0 is dropped" in caplog.text
    unet.get_submodule(MID).processor = PAGIdentitySelfAttnProcessor2_0()
    with pytest.raises(
        ValueError, match=f"{MID}: PAGIdentitySelfAttnProcessor2_0 was put in the place of its linf"
    ):
        output(unet)
    assert torch.equal(output(unet), before)


def test_perturbed_attention_guidance_is_refused():
    from diffusers import AutoPipelineForText2Image

    pipe = AutoPipelineForText2Image.from_pipe(tiny.sd15(), enable_pag=True, pag_applied_layers=["mid"])
    tiny._quiet(pipe)
    before = tiny.draw(pipe, pag_scale=3.0)
    visionhybrid.attach(pipe, "linfusion", layers="down_blocks")
    tiny.draw(pipe, pag_scale=3.0)  # on layers that keep softmax attention it works
    visionhybrid.attach(pipe, "linfusion", layers="mid_block")
    with pytest.raises(ValueError, match="perturbed attention, PAG, has no meaning for a mixer"):
        tiny.draw(pipe, pag_scale=3.0)
    tiny.draw(pipe, pag_scale=0.0)
    visionhybrid.detach(pipe)
    assert torch.equal(tiny.draw(pipe, pag_scale=3.0), before)


# ---- training --------------------------------------------------------------------------------------------------------


def gradients(model, checkpointing, runs):
    """Gradients of one loss over several calls of the model, whose backward passes all come at the end."""
    model.zero_grad()
    (model.enable_gradient_checkpointing if checkpointing else model.disable_gradient_checkpointing)()
    total = sum((model(**inputs).sample * weight).sum() for inputs, weight in runs)
    total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mixer", ["linfusion", "neighborhood", "agent"])
def test_checkpointing_changes_no_gradient(mixer):
    """Two sizes of equally many tokens before one backward pass: each recomputation has to get its own grid."""
    options = {"kernel_size": 3} if mixer == "neighborhood" else {}
    unet = mixed(mixer=mixer, layers="tokens > 64", **options).unet.train()
    draw = torch.Generator().manual_seed(0)
    runs = []
    for size in ((16, 8), (8, 16)):
        runs.append((tiny.unet_inputs(size=size), torch.randn(2, 4, *size, generator=draw)))
    plain, checkpointed = gradients(unet, False, runs), gradients(unet, True, runs)
    assert checkpointed.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)
    if mixer == "linfusion":
        assert all(name in plain for name, _ in unet.named_parameters() if ".mixer." in name)


# ---- memory, precision, compiling ------------------------------------------------------------------------------------


def test_sequential_offload():
    from accelerate import cpu_offload

    unet = mixed().unet
    before = output(unet)
    cpu_offload(unet, torch.device("cpu"), offload_buffers=True)
    assert unet.get_submodule(DOWN).mixer.to_q_[0].weight.is_meta
    torch.testing.assert_close(output(unet), before)
    plain = tiny.unet()
    cpu_offload(plain, torch.device("cpu"))
    with pytest.raises(ValueError, match="is offloaded; attach first, then enable offloading"):
        visionhybrid.attach(plain, "linfusion")


@pytest.mark.parametrize(
    "kind", [dict(offload_type="leaf_level"), dict(offload_type="block_level", num_blocks_per_group=1)]
)
def test_group_offload(kind):
    unet = mixed().unet
    before = output(unet)
    unet.enable_group_offload(onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), **kind)
    torch.testing.assert_close(output(unet), before)


@pytest.mark.parametrize("name", ["flux", "sd3", "wan", "cogvideox", "hunyuan_video"])
@pytest.mark.parametrize("way", ["sequential", "group"])
def test_offloaded_transformers(name, way):
    from accelerate import cpu_offload

    model, inputs = transformers.transformer(name), transformers.INPUTS[name]()
    visionhybrid.attach(model, "sla", topk=0.3, block_q=16, block_k=16)
    for row in visionhybrid.describe(model).mixed:
        torch.nn.init.normal_(model.get_submodule(row.name).mixer.proj_l.weight)
    before = transformers.output(model, **inputs)
    here = torch.device("cpu")
    if way == "sequential":
        cpu_offload(model, here, offload_buffers=True)
    else:
        model.enable_group_offload(onload_device=here, offload_device=here, offload_type="leaf_level")
    torch.testing.assert_close(transformers.output(model, **inputs), before)


def test_layerwise_casting():
    unet = mixed().unet
    before = output(unet)
    unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert unet.get_submodule(DOWN).mixer.to_q_[0].weight.dtype == torch.float8_e4m3fn
    after = output(unet)
    assert 1e-5 < (after - before).norm() / before.norm() < 0.2
    visionhybrid.detach(unet)
    report = visionhybrid.attach(unet, "linfusion", layers=DOWN)
    assert unet.get_submodule(DOWN).mixer.to_q_[0].weight.dtype == torch.float32
    assert output(unet).isfinite().all()
    assert len(report.mixed) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("first", ["cast", "attach"])
def test_half_precision(dtype, first):
    unet = tiny.unet()
    inputs = tiny.unet_inputs()
    if first == "cast":
        unet.to(dtype)
    visionhybrid.attach(unet, "linfusion")
    unet.to(dtype)
    mixer = unet.get_submodule(DOWN).mixer
    assert {p.dtype for p in mixer.parameters()} == {dtype}
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    half = output(unet, **inputs)
    assert half.dtype == dtype
    exact = output(unet.float())
    assert (half.float() - exact).norm() / exact.norm() < (0.01 if dtype == torch.float16 else 0.05)


@pytest.mark.parametrize("mixer", ["linfusion", "neighborhood"])
def test_compiled_whole_without_a_break(mixer):
    options = {"kernel_size": 3} if mixer == "neighborhood" else {}
    unet = mixed(mixer=mixer, layers="tokens > 64", **options).unet
    before = output(unet)
    compiled = torch.compile(unet, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**tiny.unet_inputs()).sample, before)
        other = tiny.unet_inputs(size=(12, 20))
        torch.testing.assert_close(compiled(**other).sample, output(unet, **other))


def test_a_compiled_pipeline_takes_mixers():
    pipe = tiny.sd15()
    before = tiny.draw(pipe)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    torch.testing.assert_close(tiny.draw(pipe), before)
    visionhybrid.attach(pipe, "linfusion", zero_init=False)
    after = tiny.draw(pipe)
    assert not torch.allclose(after, before, atol=1e-3)
    visionhybrid.detach(pipe)
    torch.testing.assert_close(tiny.draw(pipe), before)


def test_another_task_shares_the_mixers(tmp_path):
    from diffusers import AutoPipelineForImage2Image

    pipe = mixed()
    other = tiny._quiet(AutoPipelineForImage2Image.from_pipe(pipe))
    assert other.unet is pipe.unet
    other.save_pretrained(tmp_path)
    loaded = type(other).from_pretrained(tmp_path)
    assert torch.equal(output(loaded.unet), output(pipe.unet))


# ---- feed-forward networks -------------------------------------------------------------------------------------------

FEED = f"{DOWN.removesuffix('attn1')}ff"


def tokens_of_pieces(unet, **changes):
    """How many tokens the hidden layer of one network gets at each of its calls, and the model's output."""
    seen = []
    layer = unet.get_submodule(FEED).net[0]
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    out = output(unet, **changes)
    handle.remove()
    return seen, out


def test_a_call_with_mixers_needs_less_memory_than_without(monkeypatch):
    """Linear attention keeps no scores, and feed-forward networks go in pieces."""
    monkeypatch.setattr(feed_forward, "SHORTEST", 256)
    inputs, unet = tiny.unet_inputs(batch=1, size=(32, 32)), tiny.unet()
    plain = memory.live(lambda: output(unet, **inputs))
    assert tokens_of_pieces(unet, **inputs)[0] == [1024]
    visionhybrid.attach(unet, "linfusion", layers="tokens > 64")
    assert memory.live(lambda: output(unet, **inputs)) < 0.75 * plain
    assert tokens_of_pieces(unet, **inputs)[0] == [256] * 4


def test_pieces_of_feed_forward_give_the_same_numbers(monkeypatch):
    unet = mixed().unet
    tokens, whole = tokens_of_pieces(unet)
    assert tokens == [256]
    monkeypatch.setattr(feed_forward, "SHORTEST", 8)
    assert tokens_of_pieces(unet, **tiny.unet_inputs(size=(6, 14)))[0] == [21] * 4
    tokens, pieces = tokens_of_pieces(unet)
    assert tokens == [64] * 4
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-6)
    block = unet.get_submodule(FEED.removesuffix(".ff"))
    block.set_chunk_feed_forward(16, dim=1)  # diffusers' own pieces come first
    assert tokens_of_pieces(unet)[0] == [16] * 16
    block.set_chunk_feed_forward(None)
    # a gradient needs every hidden layer, and offloaded weights would be fetched for every piece
    seen = []
    unet.get_submodule(FEED).net[0].register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[1]))
    unet(**tiny.unet_inputs())
    unet.get_submodule(FEED).net[2]._hf_hook = object()
    output(unet)
    assert seen == [256, 256]
    visionhybrid.detach(unet)
    assert type(unet.get_submodule(FEED)) is type(tiny.unet().get_submodule(FEED))
    assert "forward" not in vars(unet.get_submodule(FEED))


def test_pieces_of_feed_forward_compile(monkeypatch):
    """One graph without a break, for many numbers of tokens."""
    monkeypatch.setattr(feed_forward, "SHORTEST", 8)
    network = mixed().unet.get_submodule(FEED)
    graphs = CompileCounter()
    compiled = torch.compile(network, backend=graphs, fullgraph=True, dynamic=True)
    for tokens in (256, 240, 280):
        x = torch.randn(2, tokens, 32)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), network(x))
    assert graphs.frame_count == 1
