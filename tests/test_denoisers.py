"""The denoisers of text-to-image pipelines are called in training as the pipelines themselves call them."""

import string

import pytest
import tiny_pipelines
import tiny_transformers
import torch
from torch.testing import assert_close

import visionhybrid
from visionhybrid.diffusion.denoisers import family_of
from visionhybrid.train.config import ConfigError, Diffusion
from visionhybrid.train.noising import noising

# some schedulers of diffusers 0.42 with the newest NumPy
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)


def sana():
    """A whole SANA pipeline; its autoencoder halves each side and has no distribution."""
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline
    from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "\u2581", "\n", *string.printable[:94]]
    tokenizer = GemmaTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[])
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    encoder = Gemma2Model(
        Gemma2Config(vocab_size=len(tokenizer), num_key_value_heads=1, head_dim=16, **sizes)
    ).eval()
    blocks = dict(block_out_channels=(8, 8), layers_per_block=(1, 1), qkv_multiscales=((), ()))
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        scaling_factor=0.4,
        **{f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in blocks.items()},
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
    ).eval()
    return tiny_pipelines._quiet(
        SanaPipeline(
            tokenizer=tokenizer,
            text_encoder=encoder,
            vae=vae,
            transformer=tiny_transformers.sana(),
            scheduler=DPMSolverMultistepScheduler(
                use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
            ),
        )
    )


BUILD = {
    "sd15": tiny_pipelines.sd15,
    "sdxl": tiny_pipelines.sdxl,
    "pixart": tiny_pipelines.pixart,
    "pixart told the size": lambda: tiny_pipelines.pixart(use_additional_conditions=True, sample_size=128),
    "sd3": tiny_transformers.sd3,
    "flux": tiny_transformers.flux,
    "flux with guidance": lambda: tiny_transformers.flux(guidance_embeds=True),
    "sana": sana,
}


@pytest.mark.parametrize("name", BUILD)
def test_a_denoiser_is_asked_what_its_pipeline_asks_it(name):
    pipe = BUILD[name]()
    family = family_of(pipe, 0 if name.startswith("sd1") or name == "sdxl" else 32)
    seen = {}

    def note(module, args, kwargs, out):
        seen["time"] = kwargs["timestep"] if "timestep" in kwargs else args[1]
        seen["out"] = out[0]

    handle = family.model.register_forward_hook(note, with_kwargs=True)
    height, width = (32, 64) if name == "sana" else (24, 32)
    noise = torch.randn(1, 4, height // 2, width // 2, generator=torch.Generator().manual_seed(1))
    size = {"height": height, "width": width}
    call = {**family.call, **family.length, "guidance_scale": 1.0, "num_inference_steps": 1}
    given = family.target(noise) if name.startswith("flux") else noise
    pipe("a small cat", latents=given.clone(), output_type="latent", **size, **call)
    handle.remove()
    time = seen["time"].reshape(-1).float() * (1000 if name.startswith("flux") else 1)
    x = noise * getattr(pipe.scheduler, "init_noise_sigma", 1.0)
    if (
        hasattr(pipe.scheduler, "scale_model_input") and name == "sdxl"
    ):  # the Euler scheduler counts in sigmas
        x = x / (pipe.scheduler.sigmas[0] ** 2 + 1) ** 0.5
    about = {"size": torch.tensor([[height, width]]), "corner": torch.tensor([[0, 0]])}
    with torch.no_grad():
        args, kwargs = family.inputs(x, time, {**family.encode(["a small cat"]), **about})
        out = family.model(*args, **kwargs)[0]
    assert out.abs().max() > 1e-3
    assert_close(out, seen["out"], rtol=1e-4, atol=1e-5)


def test_what_guidance_compares_with():
    for name in ("sd15", "sdxl", "sana"):
        pipe = BUILD[name]()
        family = family_of(pipe)
        if name == "sana":
            found = pipe.encode_prompt("a", True, complex_human_instruction=family._instruction)
            wanted = {"text": found[2], "mask": found[3]}
        elif name == "sdxl":
            _, text, _, pooled = pipe.encode_prompt("a", do_classifier_free_guidance=True)
            wanted = {"text": text, "pooled": pooled}
        else:
            wanted = {"text": pipe.encode_prompt("a", torch.device("cpu"), 1, True)[1]}
        for key, value in family.nothing().items():
            assert torch.equal(value, wanted[key]), (name, key)


def test_the_noise_is_that_of_the_scheduler():
    """What the pipeline's own scheduler adds, and the target it would have to be told, at some times."""
    from diffusers import DDPMScheduler, PNDMScheduler

    x, noise = torch.randn(2, 2, 4, 8, 8).unbind(0)
    config = Diffusion(predict="pipeline")
    for kind, target in (("epsilon", "noise"), ("v_prediction", "v")):
        betas = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=kind)
        process, times = noising(config, PNDMScheduler(**betas)), torch.tensor([10.0, 900.0])
        reference = DDPMScheduler(**betas)
        assert_close(process.noised(x, noise, times), reference.add_noise(x, noise, times.long()))
        wanted = noise if target == "noise" else reference.get_velocity(x, noise, times.long())
        assert_close(process.target(x, noise, times), wanted)
    flow = noising(config, sana().scheduler)
    assert_close(flow.target(x, noise, times), noise - x)
    drawn = flow.draw(4000, torch.Generator().manual_seed(0)) / 1000
    assert abs(float((drawn / (3 - 2 * drawn)).mean()) - 0.5) < 0.02  # a shift of 3, undone


@pytest.mark.parametrize(
    ("config", "scheduler", "message"),
    [
        (Diffusion(predict="pipeline"), None, "is for model.pipeline"),
        (Diffusion(), "DDIMScheduler", "is for model.pipeline"),
        (Diffusion(predict="pipeline", shift=2.0), "DDIMScheduler", r"diffusion\.shift"),
        (Diffusion(predict="pipeline", times="logit_normal"), "DDIMScheduler", "belong to predict=flow"),
        (
            Diffusion(predict="pipeline", min_snr=5.0),
            "FlowMatchEulerDiscreteScheduler",
            r"diffusion\.min_snr",
        ),
        (Diffusion(predict="pipeline"), "CMStochasticIterativeScheduler", "no scheduler of noise"),
    ],
)
def test_settings_that_contradict_the_scheduler(config, scheduler, message):
    import diffusers

    made = getattr(diffusers, scheduler)() if scheduler else None
    with pytest.raises(ConfigError, match=message):
        noising(config, made)


def test_pipelines_that_cannot_be_trained():
    with pytest.raises(ValueError, match="DiTPipeline cannot be trained on captions"):
        family_of(tiny_pipelines.dit())
    with pytest.raises(ValueError, match="texts of one length"):
        family_of(tiny_pipelines.sd15(), 64)
    with pytest.raises(ValueError, match="LCM"):
        family_of(tiny_pipelines.sd15(time_cond_proj_dim=8))


def test_a_family_serves_a_model_with_mixers():
    pipe = tiny_pipelines.sd15()
    visionhybrid.attach(pipe.unet, "linfusion")
    family = family_of(pipe)
    args, kwargs = family.inputs(
        torch.randn(2, 4, 8, 8), torch.tensor([1.0, 999.0]), family.encode(["a", "b"])
    )
    assert family.model(*args, **kwargs)[0].shape == (2, 4, 8, 8)
