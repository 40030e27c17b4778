"""LoRA through peft on diffusers' models with mixers."""

import pytest
import tiny_pipelines as tiny
import tiny_transformers as transformers
import torch
from golden import load_case
from published import published
from test_hosts_compatible import DOWN, mixed, output

import visionhybrid

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)
LORA = ["to_q", "to_k", "to_v", "to_out.0"]
FILE = "pytorch_lora_weights.safetensors"  # named because diffusers before 0.40 does not look for it where it is offline


def lora(unet, name="style"):
    from peft import LoraConfig

    unet.add_adapter(
        LoraConfig(r=4, lora_alpha=4, target_modules=LORA, init_lora_weights="gaussian"), adapter_name=name
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for key, value in unet.named_parameters():
            if "lora_B" in key:
                value.normal_(std=0.5)


def test_lora_acts_on_the_projections_of_mixed_layers():
    pipe = mixed()
    plain = output(pipe.unet)
    lora(pipe.unet)
    assert hasattr(pipe.unet.get_submodule(DOWN).to_q, "lora_A")
    assert not any("mixer" in key for key in pipe.unet.state_dict() if "lora" in key)
    adapted = output(pipe.unet)
    assert not torch.allclose(adapted, plain, atol=1e-3)
    pipe.unet.disable_adapters()
    assert torch.equal(output(pipe.unet), plain)
    pipe.unet.enable_adapters()
    # a scale for the call
    half = output(pipe.unet, cross_attention_kwargs={"scale": 0.5})
    assert not torch.allclose(half, adapted, atol=1e-4)
    assert torch.equal(output(pipe.unet, cross_attention_kwargs={"scale": 1.0}), adapted)
    # by name, for a part of the UNet: diffusers finds the parts by the model's class name
    pipe.set_adapters("style", {"unet": {"down": 0.0, "mid": 0.0, "up": 0.0}})
    torch.testing.assert_close(output(pipe.unet), plain)
    pipe.set_adapters("style", 1.0)
    pipe.fuse_lora(components=["unet"])
    torch.testing.assert_close(output(pipe.unet), adapted, rtol=0, atol=1e-5)
    pipe.unfuse_lora(components=["unet"])
    pipe.unload_lora_weights()
    torch.testing.assert_close(output(pipe.unet), plain, rtol=0, atol=1e-5)
    assert len(visionhybrid.describe(pipe).mixed) == 4


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("flux", "joint_attention_kwargs"),
        ("sd3", "joint_attention_kwargs"),
        ("sana", "attention_kwargs"),
        ("wan", "attention_kwargs"),
        ("cogvideox", "attention_kwargs"),
        ("hunyuan_video", "attention_kwargs"),
    ],
)
def test_lora_in_transformers(name, kwargs):
    model, inputs = transformers.transformer(name), transformers.INPUTS[name]()
    visionhybrid.attach(model, "linfusion", zero_init=False)
    plain = transformers.output(model, **inputs)
    lora(model)
    adapted = transformers.output(model, **inputs)
    assert not torch.allclose(adapted, plain, atol=1e-3)
    half = transformers.output(model, **inputs, **{kwargs: {"scale": 0.5}})
    assert not torch.allclose(half, adapted, atol=1e-4)
    model.disable_adapters()
    assert torch.equal(transformers.output(model, **inputs), plain)
    model.enable_adapters()
    model.fuse_lora()
    torch.testing.assert_close(transformers.output(model, **inputs), adapted, rtol=1e-4, atol=1e-4)
    model.unfuse_lora()
    model.unload_lora()
    torch.testing.assert_close(transformers.output(model, **inputs), plain, rtol=1e-4, atol=1e-4)


def test_lora_files_are_those_of_the_plain_model(tmp_path):
    pipe = mixed()
    lora(pipe.unet)
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(pipe.unet, adapter_name="style")
    pipe.save_lora_weights(tmp_path, unet_lora_layers=state)
    adapted = output(pipe.unet)
    other = mixed()
    other.load_lora_weights(tmp_path, weight_name=FILE, adapter_name="style")
    torch.testing.assert_close(output(other.unet), adapted)
    plain = tiny.sd15()
    plain.load_lora_weights(tmp_path, weight_name=FILE, adapter_name="style")  # no key of it is unknown there


def test_detach_below_a_lora(tmp_path):
    unet = published(load_case("linfusion_unet_sd21tiny_24x12"), tmp_path)
    inputs = tiny.unet_inputs(width=40)
    before = output(unet, **inputs)
    projections = {f"{DOWN}.{key}": unet.get_submodule(f"{DOWN}.{key}").weight.clone() for key in LORA}
    visionhybrid.attach(unet, "linfusion", weights=tmp_path)
    lora(unet)
    unet.fuse_lora()
    with pytest.raises(ValueError, match="a LoRA is fused into this projection; unfuse it first"):
        visionhybrid.detach(unet)
    unet.unfuse_lora()
    visionhybrid.detach(unet)
    for name, own in projections.items():
        assert torch.equal(unet.get_submodule(name).base_layer.weight, own), name
    unet.disable_adapters()
    # peft adds and subtracts the product in the other layers
    torch.testing.assert_close(output(unet, **inputs), before, rtol=0, atol=1e-5)
