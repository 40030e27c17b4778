"""Mixers in real, tiny diffusers models and pipelines: values, layers, weights."""

import pytest
import tiny_pipelines as tiny
import torch
from golden import list_cases, load_case
from published import published
from safetensors.torch import load, save_file

import visionhybrid
from visionhybrid import hosts

pytestmark = pytest.mark.filterwarnings(
    # diffusers' schedulers on numpy 2
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)
PIPELINES = ["sd15", "sdxl", "dit", "pixart"]
DOWN = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
MID = "mid_block.attentions.0.transformer_blocks.0.attn1"


def output(unet, **inputs):
    with torch.no_grad():
        return unet(**(inputs or tiny.unet_inputs())).sample


def denoiser(pipe):
    return getattr(pipe, "unet", None) or pipe.transformer


def mixed_names(report):
    return [row.name for row in report.mixed]


# ---- the published model ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("revision", ["LinFusion", "StableMamba"])
@pytest.mark.parametrize("name", [name for name in list_cases() if name.startswith("linfusion_unet_")])
def test_published_unet(name, revision, tmp_path):
    case = load_case(name)
    unet = published(case, tmp_path, revision)
    inputs = {key: case.input(key) for key in case.facts["inputs"]}
    before = output(unet, **inputs)
    visionhybrid.attach(unet, "linfusion", weights=tmp_path)
    case.check("sample", output(unet, **inputs))
    visionhybrid.detach(unet)
    assert torch.equal(output(unet, **inputs), before)


def test_weights_of_another_model_are_refused_whole(tmp_path):
    case = load_case("linfusion_unet_sd21tiny_24x12")
    published(case, tmp_path)
    unet = tiny.unet()
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"does not fit this model: .*is 32 in 2 heads there, 32 in 4 heads here"
    ):
        visionhybrid.attach(unet, "linfusion", weights=tmp_path)
    assert unet.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in unet.state_dict().items())


def test_weights_with_a_foreign_or_missing_tensor_are_refused(tmp_path):
    case = load_case("linfusion_unet_sd21tiny_24x12")
    unet = published(case, tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load(file.read_bytes())  # not load_file: its tensors would lie in the file that is written over
    save_file({**state, "9.to_q.weight": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match=r"1 tensors belong to no module, 9.to_q.weight first"):
        visionhybrid.attach(unet, "linfusion", weights=tmp_path)
    save_file({k: v for k, v in state.items() if k != "0.to_v.weight"}, file)
    with pytest.raises(ValueError, match=rf"{DOWN} lacks to_v.weight"):
        visionhybrid.attach(unet, "linfusion", weights=tmp_path)
    save_file({k: v for k, v in state.items() if k != "0.to_k_.3.weight"}, file)
    with pytest.raises(ValueError, match=r"Missing key.* \"to_k_.3.weight\""):
        visionhybrid.attach(unet, "linfusion", weights=tmp_path)
    save_file({**state, "0.to_q.weight": state["0.to_q.weight"] * torch.nan}, file)
    with pytest.raises(ValueError, match=r"1 of \d+ tensors hold NaN or infinity: 0.to_q.weight"):
        visionhybrid.attach(unet, "linfusion", weights=tmp_path)
    assert not visionhybrid.describe(unet).mixed


def test_a_repository_that_cannot_be_fetched_says_what_to_fetch():
    with pytest.raises(
        FileNotFoundError, match=r"fetch config.json and .* from https://huggingface.co/Yuanshi/LinFusion"
    ):
        visionhybrid.attach(tiny.unet(), "linfusion", weights="Yuanshi/LinFusion-1-5")


@pytest.mark.parametrize("name", [name for name in list_cases() if name.startswith("agentsd_block_")])
def test_agents_get_the_blocks_input(name):
    """The authors' block, as diffusers' own block inside a UNet: tokens are ranked by what comes before its norm."""
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    case = load_case(name)
    kwargs, x = case.facts["kwargs"], case.input("x")
    around = Transformer2DModel(
        kwargs["heads"],
        kwargs["dim"] // kwargs["heads"],
        kwargs["dim"],
        norm_num_groups=8,
        cross_attention_dim=kwargs["ctx"],
    ).eval()
    around.transformer_blocks[0].load_state_dict(case.state_dict(), strict=True)
    around.norm = around.proj_in = around.proj_out = torch.nn.Identity()
    unet = tiny.unet()
    unet.down_blocks[0].attentions[0] = around
    options = dict(
        ratio=kwargs["ratio"], agent_ratio=kwargs["agent_ratio"], cell=[kwargs["sy"], kwargs["sx"]]
    )
    visionhybrid.attach(unet, "agent", layers=DOWN, **options)
    seen = []
    unet.get_submodule(DOWN).register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        y = around(x, encoder_hidden_states=case.input("context"), return_dict=False)[0] - x
    case.check("attn1", seen[0])
    case.check("y", y.flatten(2).mT)


# ---- attach, detach, describe ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_is_changed_and_given_back(name):
    pipe = getattr(tiny, name)()
    before = tiny.draw(pipe)
    report = visionhybrid.attach(pipe, "linfusion")
    assert len(report.mixed) == len([row for row in report.rows if not row.reason]) > 0
    assert not torch.allclose(tiny.draw(pipe), before, atol=1e-4)
    report = visionhybrid.detach(pipe)
    assert not report.mixed
    assert type(denoiser(pipe)).__module__.startswith("diffusers.")
    assert "visionhybrid" not in denoiser(pipe).config
    assert torch.equal(tiny.draw(pipe), before)


@pytest.mark.parametrize("name", PIPELINES)
def test_softmax_as_a_mixer_is_the_model_itself(name):
    """All that the host does around the mixer (projections, heads, norms, grids) is diffusers' own computation."""
    pipe = getattr(tiny, name)()
    before = tiny.draw(pipe, size=(32, 48))
    visionhybrid.attach(pipe, "softmax")
    torch.testing.assert_close(tiny.draw(pipe, size=(32, 48)), before, rtol=0, atol=1e-6)


def test_softmax_on_maps_with_norms_and_residuals():
    """`Attention` that takes (B, C, H, W), with a group norm and a residual: UNet2DModel."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=12,
        block_out_channels=(32, 64),
        down_block_types=("AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_scale_factor=1.5,
    ).eval()
    attn = unet.down_blocks[0].attentions[0]
    attn.norm_q, attn.norm_k = (torch.nn.RMSNorm(attn.inner_dim // attn.heads) for _ in "qk")
    x = torch.randn(1, 3, 12, 10)
    before = output(unet, sample=x, timestep=3)
    report = visionhybrid.attach(unet, "softmax")
    assert [row.tokens for row in report.mixed][:2] == [144, 36]
    torch.testing.assert_close(output(unet, sample=x, timestep=3), before, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (None, 4),
        (DOWN, 1),
        ("mid_block", 1),
        ("up_blocks.1", 2),
        ("*.attentions.1.*", 1),
        ("tokens > 64", 3),
        ("tokens <= 64", 1),
        ("head_dim == 16", 1),
        (lambda layer: layer.dim == 32, 3),
        (["mid_block", "down_blocks"], 2),
        (["tokens > 64", "up_blocks.1"], 3),
    ],
)
def test_layers_are_chosen(layers, expected):
    unet = tiny.unet()
    assert len(visionhybrid.attach(unet, "linfusion", layers=layers).mixed) == expected


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("down_block.0", "no attention is called 'down_block.0'; did you mean 'down_blocks.0"),
        ("*.attn2", "names only what cannot be replaced: .*attn2: cross attention"),
        ("tokens > 100000", "selects none of 8 attention modules"),
        (lambda layer: False, "selects none"),
    ],
)
def test_layers_that_cannot_be_are_refused_by_name(layers, message):
    unet = tiny.unet()
    with pytest.raises(ValueError, match=message):
        visionhybrid.attach(unet, "linfusion", layers=layers)
    assert not visionhybrid.describe(unet).mixed


def test_rules_need_a_size():
    unet = tiny.unet(sample_size=None)
    with pytest.raises(ValueError, match="give sample_size="):
        visionhybrid.attach(unet, "linfusion", layers="tokens > 64")
    for size in (-3, (4, 16, 8), ()):
        with pytest.raises(
            ValueError, match=r"^sample_size of UNet2DConditionModel is \(height, width\), each positive, got"
        ):
            visionhybrid.attach(unet, "linfusion", sample_size=size)
    report = visionhybrid.attach(unet, "linfusion", layers="tokens > 64", sample_size=(16, 8))
    assert [row.tokens for row in report.mixed] == [128, 128, 128]


def test_tokens_are_those_that_come():
    """The levels' sizes are worked out from the config; here odd ones, beside what the mixers are then given."""
    unet = tiny.unet(sample_size=(13, 9))
    seen = []
    report = visionhybrid.attach(unet, "softmax")
    for row in report.mixed:
        mixer = unet.get_submodule(row.name).mixer
        mixer.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs["grid"]), with_kwargs=True)
    output(unet, **tiny.unet_inputs(size=(13, 9)))
    assert sorted(seen) == [(7, 5), (13, 9), (13, 9), (13, 9)]
    assert sorted(row.tokens for row in report.mixed) == [35, 117, 117, 117]


def test_several_mixers_in_one_model():
    unet = tiny.unet()
    table = {"mid_block": ("linfusion", {"mid_dim": 8}), "tokens > 64": "softmax"}
    report = visionhybrid.attach(unet, table, layers=["mid_block", "up_blocks"])
    assert [(row.mixer, row.name.split(".")[0]) for row in report.mixed] == [
        ("softmax", "up_blocks"),
        ("softmax", "up_blocks"),
        ("linfusion", "mid_block"),
    ]
    assert report.mixed[2].options["mid_dim"] == 8
    visionhybrid.attach(unet, "linfusion", layers=DOWN)
    with pytest.raises(ValueError, match=f"{DOWN}: it has a mixer, linfusion; detach it first"):
        visionhybrid.attach(unet, "softmax", layers=DOWN)
    report = visionhybrid.detach(unet, layers="up_blocks")
    assert mixed_names(report) == [DOWN, MID]


def test_mistakes_leave_the_model_alone():
    unet = tiny.unet()
    cases = [
        (dict(mixer="linfuse"), "did you mean 'linfusion'"),
        (dict(mixer="linfusion", mid=3), "no option 'mid'"),
        (dict(mixer={"mid_block": "softmax"}, mid_dim=3), "give options beside their names"),
        (dict(mixer="softmax", weights="."), "no published layout of weights is known for 'softmax'"),
        (dict(mixer="linfusion", weights="/nowhere/at/all"), "neither a folder nor a repository"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            visionhybrid.attach(unet, **call)
    with pytest.raises(ValueError, match="has no mixers"):
        visionhybrid.detach(unet)
    assert not hasattr(unet.get_submodule(DOWN), "mixer")
    assert type(unet).__module__.startswith("diffusers.")


def test_other_models_are_refused():
    from diffusers import AutoencoderKL

    with pytest.raises(ValueError, match=r"AutoencoderKL is not supported; have .*UNet2DConditionModel"):
        visionhybrid.attach(tiny.vae(), "linfusion")
    with pytest.raises(ValueError, match=r"no host knows torch.nn.modules.linear.Linear"):
        visionhybrid.attach(torch.nn.Linear(2, 2), "linfusion")
    assert isinstance(tiny.vae(), AutoencoderKL)


def test_temporal_attention_is_refused_by_name():
    """The motion modules of AnimateDiff have an attn1 as well."""
    from diffusers import MotionAdapter, UNetMotionModel

    torch.manual_seed(0)
    adapter = MotionAdapter(
        block_out_channels=(32, 64),
        motion_layers_per_block=1,
        motion_norm_num_groups=8,
        motion_num_attention_heads=4,
    )
    unet = UNetMotionModel.from_unet2d(tiny.unet(), adapter).eval()
    report = visionhybrid.attach(unet, "linfusion")
    assert len(report.mixed) == 4
    assert not any("motion_modules" in name for name in mixed_names(report))
    with pytest.raises(ValueError, match=r"motion_modules.*: temporal attention: its tokens are one pixel"):
        visionhybrid.attach(unet, "linfusion", layers="*.motion_modules.*")
    x, text = torch.randn(1, 4, 3, 16, 12), torch.randn(3, 7, 32)
    assert output(unet, sample=x, timestep=3, encoder_hidden_states=text).shape == x.shape


def test_special_processors_are_not_replaced():
    from diffusers.models.attention_processor import AttnProcessor2_0, PAGIdentitySelfAttnProcessor2_0

    unet = tiny.unet()
    unet.get_submodule(MID).set_processor(PAGIdentitySelfAttnProcessor2_0())
    with pytest.raises(ValueError, match="its processor PAGIdentitySelfAttnProcessor2_0 does more"):
        visionhybrid.attach(unet, "linfusion", layers=MID)
    unet.get_submodule(MID).set_processor(AttnProcessor2_0())
    visionhybrid.attach(unet, "linfusion", layers=MID)


def test_describe_tells(caplog):
    hosts._warn_once.cache_clear()
    unet = tiny.unet()
    assert not visionhybrid.describe(unet).mixed
    visionhybrid.attach(unet, "linfusion", layers="tokens > 64")
    assert not caplog.text
    visionhybrid.attach(unet, "linfusion", layers="mid_block")
    assert "do more work than softmax attention at this size" in caplog.text
    report = visionhybrid.describe(unet)
    assert len(report.rows) == 8
    assert len(report.refused) == 4
    assert {row.reason for row in report.refused} == {"cross attention: its keys are the text's"}
    assert mixed_names(report) == [row.name for row in report.rows if row.name.endswith("attn1")]
    # two networks of 32 x 32 with biases and a norm each
    assert report.mixed[0].parameters == 2 * (2 * 32 * 32 + 4 * 32)
    # at 64 tokens the gating networks cost more than softmax attention
    assert [row.name for row in report.slower] == [MID]
    assert "4 of 4 replaceable attention modules have a mixer" in str(report)
    assert "1 of 4 mixers do more work than softmax attention at this size; they multiply less from" in str(
        report
    )


def test_masks_are_refused_where_they_come():
    unet = tiny.unet()
    visionhybrid.attach(unet, "linfusion", layers=DOWN)
    with pytest.raises(ValueError, match="linfusion: cannot honour a bias on softmax logits"):
        output(unet, **tiny.unet_inputs(), attention_mask=torch.ones(2, 256))
