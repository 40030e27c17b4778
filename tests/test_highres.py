"""Coarse to fine generation on tiny real pipelines; the model's own size is 32 pixels there."""

import itertools

import pytest
import tiny_pipelines as tiny
import tiny_transformers
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    ControlNetModel,
    DiffusionPipeline,
    StableDiffusionControlNetPipeline,
)

import visionhybrid
from visionhybrid.diffusion import highres
from visionhybrid.diffusion.highres import HighResolution, ladder
from visionhybrid.diffusion.highres.frugal import frugal

pytestmark = pytest.mark.filterwarnings(
    # diffusers' Euler scheduler with numpy 2
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)
CALL = dict(height=128, width=64, num_inference_steps=4, strengths=(0.5, 0.25))


def generate(pipe, prompt="a cat", seed=0, **call):
    noise = torch.Generator().manual_seed(seed)
    return HighResolution(pipe)(prompt, generator=noise, **{**CALL, "output_type": "pt", **call}).images


def sizes(stages):
    return [(stage.height, stage.width) for stage in stages]


def test_ladder_is_the_authors():
    stages = ladder(16384, 8192, native=512)
    assert sizes(stages) == [(1024 * 2**i, 512 * 2**i) for i in range(5)]
    assert [stage.strength for stage in stages] == [1, 0.4, 0.3, 0.2, 0.1]
    assert [stage.steps for stage in stages] == [50, 20, 15, 10, 5]
    assert sizes(ladder(4096, 4096, native=1024)) == [(1024, 1024), (2048, 2048), (4096, 4096)]
    assert sizes(ladder(512, 512, native=512)) == [(512, 512)]


@pytest.mark.parametrize(("height", "width"), [(2040, 1000), (776, 3096), (4104, 4096), (8, 8), (1096, 1144)])
def test_ladder_ends_where_asked_and_doubles(height, width):
    stages = ladder(height, width, native=512, steps=100)
    assert sizes(stages)[-1] == (height, width)
    assert stages[0].height * stages[0].width < 2.1 * 512**2
    for small, large in itertools.pairwise(stages):
        assert abs(large.height - 2 * small.height) <= 8
        assert abs(large.width - 2 * small.width) <= 8
    assert all(side % 8 == 0 for stage in stages for side in (stage.height, stage.width))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(height=100), "multiples of 8, got 100x1024"),
        (dict(steps=2), "2 steps of strength 0.4 are none"),
        (dict(strengths=(0.4, 1.5)), "in \\(0, 1\\]"),
        (dict(stages=0), "one stage and one step at least, got 0 and 50"),
    ],
)
def test_ladder_says_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        ladder(**{**dict(height=2048, width=1024, native=512), **options})


@pytest.mark.parametrize("build", [tiny.sd15, tiny.sdxl, tiny_transformers.sd3, tiny_transformers.flux])
def test_pipelines_reach_the_size(build):
    call = dict(max_sequence_length=32) if build.__module__ == "tiny_transformers" else {}
    native = dict(stages=3)
    pipe = build()
    images = generate(pipe, **native, **call)
    assert images.shape == (1, 3, 128, 64)
    assert images.isfinite().all()
    assert torch.equal(images, generate(pipe, **native, **call))
    assert not torch.equal(images, generate(pipe, seed=1, **native, **call))


def test_last_stage_refines_the_one_before():
    seen = []
    images = generate(tiny.sd15(), preview=lambda stage, pictures: seen.append((stage, pictures)))
    assert [(stage.height, stage.width) for stage, _ in seen] == [(64, 32), (128, 64)]
    assert [pictures[0].size for _, pictures in seen] == [(32, 64), (64, 128)]
    noise, pipe = torch.Generator().manual_seed(0), tiny.sd15()
    common = dict(num_inference_steps=4, generator=noise, output_type="pt")
    first = pipe("a cat", height=64, width=32, **common).images
    picture = pipe.image_processor.postprocess(first, do_denormalize=[False])[0]
    assert seen[0][1][0].tobytes() == picture.tobytes()
    large = torch.nn.functional.interpolate(first, (128, 64), mode="bicubic").clamp(0, 1)
    refiner = AutoPipelineForImage2Image.from_pipe(pipe)
    refiner.set_progress_bar_config(disable=True)
    wanted = refiner("a cat", image=large, strength=0.5, **common).images
    torch.testing.assert_close(images, wanted, rtol=0, atol=1e-4)
    assert images.min() >= 0
    assert images.max() <= 1


@pytest.mark.parametrize("build", [tiny.sd15, tiny.sdxl])
def test_chunks_change_nothing(build):
    pipe, prompts = build(), ["a cat", "a dog"]
    visionhybrid.attach(pipe, "linfusion")
    whole = generate(pipe, prompts, chunk_guidance=False, chunk_tokens=None, num_images_per_prompt=2)
    chunked = generate(pipe, prompts, chunk_tokens=100, num_images_per_prompt=2)
    assert whole.shape == (4, 3, 128, 64)
    assert not torch.allclose(whole[0], whole[2], atol=1e-2)
    torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-4)


def test_memory_of_a_call_is_bounded():
    pipe, batches, tokens = tiny.sd15(), set(), set()
    forward = pipe.unet.mid_block.forward
    feed = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].ff.net[0]
    handles = [
        pipe.unet.conv_in.register_forward_pre_hook(lambda m, args: batches.add(args[0].shape[0])),
        feed.register_forward_pre_hook(lambda m, args: tokens.add(args[0].shape[1])),
    ]
    with frugal(pipe, tile=None, one_by_one=True, chunk=100):
        pipe.unet(**tiny.unet_inputs(batch=3))
    assert batches == {1}
    assert tokens == {86, 84}  # of 16x16
    for handle in handles:
        handle.remove()
    assert pipe.unet.mid_block.forward == forward
    for module in pipe.unet.modules():
        assert "forward" not in vars(module)
        assert not hasattr(module, "_diffusers_hook")


def test_one_by_one_gives_the_models_own_output():
    pipe = tiny.sdxl()
    inputs = tiny.unet_inputs(batch=3, width=64)
    inputs["added_cond_kwargs"] = dict(text_embeds=torch.randn(3, 32), time_ids=torch.rand(3, 6))
    inputs["timestep"] = torch.tensor([1, 400, 900])
    with torch.no_grad():
        whole = pipe.unet(**inputs)
        with frugal(pipe, tile=None, one_by_one=True, chunk=None):
            output = pipe.unet(**inputs)
            (alone,) = pipe.unet(**inputs, return_dict=False)
    assert type(output) is type(whole)
    torch.testing.assert_close(output.sample, whole.sample, rtol=0, atol=1e-5)
    assert torch.equal(alone, output.sample)


def test_tiles_of_the_vae_and_its_settings_afterwards(monkeypatch):
    pipe, tiles = tiny.sd15(), []
    decode = pipe.vae.decoder.forward
    monkeypatch.setattr(pipe.vae.decoder, "forward", lambda z: tiles.append(z.shape[2:]) or decode(z))
    before = pipe.vae.use_tiling, pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size
    generate(pipe, tile=64)
    assert tiles[0] == (32, 16)
    assert len(tiles) > 2
    assert max(max(tile) for tile in tiles) == 32
    assert (pipe.vae.use_tiling, pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size) == before
    with pytest.raises(ValueError, match="tile is a multiple of 2"):
        generate(pipe, tile=63)


def test_controlnet_guides_every_stage():
    base = tiny.sd15()
    control = ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=(4, 8))
    # both are zero at first
    torch.nn.init.normal_(control.controlnet_mid_block.weight)
    torch.nn.init.normal_(control.controlnet_cond_embedding.conv_out.weight)
    pipe = StableDiffusionControlNetPipeline(
        **base.components, controlnet=control, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    picture, seen = torch.rand(1, 3, 128, 64), {}
    control.controlnet_cond_embedding.register_forward_pre_hook(
        lambda m, args: seen.update({args[0].shape[2:]: args[0]})
    )
    images = generate(pipe, image=picture)
    assert set(seen) == {(64, 32), (128, 64)}
    torch.testing.assert_close(seen[picture.shape[2:]][:1], picture)
    assert not torch.allclose(images, generate(pipe, image=1 - picture), atol=1e-3)


def test_one_bar_and_the_callers_callback(capfd):
    pipe, steps = tiny.sd15(), []
    pipe.set_progress_bar_config(disable=False)

    def own(pipe, step, time, tensors):
        steps.append(step)
        return tensors

    generate(pipe, callback_on_step_end=own)
    assert steps == [0, 1, 2, 3, 0, 1]
    shown = capfd.readouterr().err
    assert "6/6" in shown
    assert "4/4" not in shown
    tiny.draw(pipe)
    assert "2/2" in capfd.readouterr().err


def test_arguments_that_would_break_the_ladder_are_refused():
    with pytest.raises(TypeError, match="takes no guidance_scal, strength here"):
        generate(tiny.sd15(), guidance_scal=3, strength=0.5)
    with pytest.raises(ValueError, match="output_type is pil, np or pt, got 'latent'"):
        generate(tiny.sd15(), output_type="latent")


@pytest.mark.parametrize("build", [tiny.sd15, tiny.sdxl])
def test_as_custom_pipeline(build, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pipe = build()
    visionhybrid.attach(pipe, "linfusion")
    pipe.save_pretrained(tmp_path)
    wanted = generate(pipe)
    plugin = DiffusionPipeline.from_pretrained(
        tmp_path, custom_pipeline=highres.__path__[0], trust_remote_code=True
    )
    plugin.set_progress_bar_config(disable=True)
    images = plugin("a cat", generator=torch.Generator().manual_seed(0), output_type="pt", **CALL).images
    torch.testing.assert_close(images, wanted, rtol=0, atol=1e-5)
