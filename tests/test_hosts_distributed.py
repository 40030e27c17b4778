"""Two processes share the tokens of a model, by diffusers' context parallelism, and give the image of one process."""

import os
import time

import pytest
import tiny_pipelines
import tiny_transformers
import torch
from diffusers import ContextParallelConfig
from test_hybrid_dit import TINY

import visionhybrid
from visionhybrid.diffusion import HybridDiT
from visionhybrid.diffusion.highres import HighResolution

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)
OPTIONS = {
    "linfusion": dict(zero_init=False),
    "clear": dict(radius=2, trained_tokens=64),
    "sla": dict(topk=0.4, block_q=8, block_k=8),
    "neighborhood": dict(kernel_size=3),
    "window": dict(window_size=2, shift=1),
    "linear": dict(feature_map="elu", conv=3),
    "agent": dict(cell=2),
}
# 7 tokens of text are no two equal runs
RING, UNEVEN = dict(ring_degree=2), dict(ring_degree=2, ring_anything=True)
MODELS = {
    "flux": (["linfusion", "clear", "sla"], RING),
    "wan": (["linfusion", "neighborhood", "sla"], RING),
    "sd3": (["clear", "linear"], UNEVEN),
    "cogvideox": (["window", "softmax"], UNEVEN),
    "hunyuan_video": (["linfusion", "sla"], UNEVEN),
    "unet": (["linfusion", "lina", "agent"], RING),
    "dit": (["window"], RING),
    "pixart": (["clear"], RING),
    "sana": (["linear", "sla"], RING),
    "mlp": (["linear", "lina", "clear"], RING),
    "mix_ffn": (["linear"], RING),
}
PIPELINES = {"flux": tiny_transformers.flux, "wan": tiny_transformers.wan, "sd15": tiny_pipelines.sd15}


def example(name):
    """A model, and the arguments of a call."""
    draw = torch.Generator().manual_seed(0)
    if name == "unet":
        return tiny_pipelines.unet(), tiny_pipelines.unet_inputs(size=(12, 16))
    if name in ("mlp", "mix_ffn"):
        torch.manual_seed(0)
        model = HybridDiT(**TINY, feed_forward=name).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        return model, dict(
            hidden_states=torch.randn(1, TINY["in_channels"], 6, 8, generator=draw),  # 3 x 4 patches
            timestep=500,
            class_labels=torch.tensor([1]),
        )
    if name in ("dit", "pixart"):
        model = getattr(tiny_pipelines, name)().transformer
        width = 16 if name == "dit" else 12
        inputs = dict(
            hidden_states=torch.randn(2, 4, 16, width, generator=draw), timestep=torch.tensor([5, 5])
        )
        if name == "dit":
            return model, inputs | dict(class_labels=torch.tensor([1, 2]))
        return model, inputs | dict(
            encoder_hidden_states=torch.randn(2, 6, 32, generator=draw),
            added_cond_kwargs=dict(resolution=None, aspect_ratio=None),
        )
    return tiny_transformers.transformer(name), tiny_transformers.INPUTS[name]()


def output(model, inputs):
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


def gradients(model, inputs):
    model.zero_grad()
    out = model(**inputs, return_dict=False)[0]
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def enlarged(pipe):
    call = dict(height=64, width=32, stages=2, num_inference_steps=3, max_sequence_length=32)
    prompts = ["a cat", "a dog"]
    return HighResolution(pipe)(
        prompts, generator=torch.Generator().manual_seed(0), output_type="pt", **call
    ).images


def share(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "cpu:gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    for name, (mixers, config) in MODELS.items():
        for mixer in mixers:
            model, inputs = example(name)
            visionhybrid.attach(model, mixer, **OPTIONS.get(mixer, {}))
            expected = output(model, inputs)
            model.enable_parallelism(config=ContextParallelConfig(**config))
            got = output(model, inputs)
            assert (got - expected).abs().max() <= 1e-5 * expected.abs().max(), f"{name} {mixer}"
    for name, make in PIPELINES.items():
        pipe = make()
        visionhybrid.attach(pipe, "linfusion", zero_init=False)
        expected = tiny_pipelines.draw(pipe)
        denoiser = pipe.unet if name == "sd15" else pipe.transformer
        denoiser.enable_parallelism(config=ContextParallelConfig(ring_degree=2))
        torch.testing.assert_close(tiny_pipelines.draw(pipe), expected, rtol=0, atol=1e-5)
    pipe = tiny_transformers.flux()
    visionhybrid.attach(pipe, "clear", radius=3)
    expected = enlarged(pipe)
    pipe.transformer.enable_parallelism(config=ContextParallelConfig(ring_degree=2))
    torch.testing.assert_close(enlarged(pipe), expected, rtol=0, atol=1e-5)
    others(rank)
    torch.distributed.barrier()
    time.sleep(0.5)
    os._exit(0)  # see test_sparse_linear_distributed.py


def others(rank):
    """Training; beside softmax attention of diffusers' own, in its Ulysses; what is refused."""
    model, inputs = example("wan")
    visionhybrid.attach(model, "sla", **OPTIONS["sla"])
    expected = gradients(model, inputs)
    model.enable_parallelism(config=ContextParallelConfig(ring_degree=2))
    model.enable_gradient_checkpointing()
    model.train()
    for key, part in gradients(model, inputs).items():
        torch.distributed.all_reduce(part)
        scale = expected[key].abs().max().clamp(min=1e-3)
        assert (part - expected[key]).abs().max() <= 1e-4 * scale, key

    model, inputs = example("flux")
    visionhybrid.attach(model, "clear", layers=tiny_transformers.DOUBLE, **OPTIONS["clear"])
    expected = output(model, inputs)
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    torch.testing.assert_close(output(model, inputs), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="attach and detach before enable_parallelism"):
        visionhybrid.attach(model, "sla")
    with pytest.raises(ValueError, match="attach and detach before enable_parallelism"):
        visionhybrid.detach(model)

    model, inputs = example("sd3")
    visionhybrid.attach(model, "linfusion", layers="transformer_blocks.0")
    with pytest.raises(ValueError, match="JointAttnProcessor2_0, which would see its rank's tokens only"):
        model.enable_parallelism(config=ContextParallelConfig(ring_degree=2))
    assert model._parallel_config is None
    model, _ = example("sana")
    visionhybrid.attach(model, "linear")
    model.enable_parallelism(config=ContextParallelConfig(ring_degree=2))
    with pytest.raises(ValueError, match="2 ranks share whole rows of the image, which has 7"):
        output(model, tiny_transformers.sana_inputs((7, 8)))


def test_two_processes_give_the_image_of_one(tmp_path):
    torch.multiprocessing.spawn(share, (str(tmp_path),), nprocs=2)
