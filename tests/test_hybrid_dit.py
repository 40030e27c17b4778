"""`HybridDiT` and its pipeline."""

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from golden import list_cases, load_case
from torch.testing import assert_close

import visionhybrid
from visionhybrid import hosts, mixers
from visionhybrid.diffusion import HybridDiT, HybridDiTPipeline
from visionhybrid.diffusion.dit_weights import read_dit
from visionhybrid.diffusion.hybrid_dit import MANY, _positions, modulated

TINY = dict(
    sample_size=8, in_channels=2, num_layers=2, num_attention_heads=2, attention_head_dim=8, num_classes=3
)


def tiny(**options):
    torch.manual_seed(0)
    model = HybridDiT(**{**TINY, **options})
    with torch.no_grad():  # as it starts, the output is zero
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def inputs(batch=2, height=8, width=8):
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(batch, 2, height, width, generator=generator)
    return image, torch.tensor([10.0, 700.5])[:batch], torch.tensor([0, 3])[:batch]


def options_of(name):
    """Options with which a mixer fits 16 tokens."""
    return {"sla": dict(block_q=8, block_k=4)}.get(name, {})


VARIANTS = {
    "shared": dict(shared_modulation=True),
    "mix_ffn": dict(feed_forward="mix_ffn", mlp_ratio=2.5),
    "qk_norm": dict(qk_norm=True),
    "mixed": dict(mixer=["softmax", "linfusion"]),
    "options by block": dict(mixer="hyena", mixer_options={"hyena": dict(inner=0), "1": dict(short=0)}),
    "hyena": dict(feed_forward=["mlp", "hyena"], mlp_ratio=[3.0, 2.0]),
}


def test_a_new_model_predicts_zero_and_every_parameter_can_learn():
    torch.manual_seed(0)
    image, time, label = inputs()
    assert not HybridDiT(**TINY)(image, time, label).sample.any()
    model = tiny()
    model(image, time, label).sample.square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("name", mixers.list_mixers())
def test_every_mixer_sees_the_whole_contract(name):
    model = tiny(mixer=name, mixer_options={name: options_of(name)} if options_of(name) else None)
    image, time, label = inputs(height=8, width=12)
    out = model(image, time, label).sample
    assert out.shape == image.shape
    assert out.isfinite().all()
    assert [b.attn.mixer.about.name for b in model.blocks] == [name, name]


@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_and_loaded_it_is_the_same(variant, tmp_path):
    model = tiny(**VARIANTS[variant])
    model.save_pretrained(tmp_path)
    again = HybridDiT.from_pretrained(tmp_path)
    assert torch.equal(model(*inputs()).sample, again(*inputs()).sample)


def test_checkpointing_changes_nothing_and_compiling_has_no_break():
    model = tiny().train()
    image, time, label = inputs()

    def gradients():
        model.zero_grad()
        model(image, time, label).sample.square().mean().backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients()
    model.enable_gradient_checkpointing()
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(), strict=True))
    model.disable_gradient_checkpointing()
    model.eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(
        compiled(image, time, label).sample, model(image, time, label).sample, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("tokens", [MANY - 1, MANY])
def test_the_modulated_norm_and_its_gradients(batch, tokens):
    torch.manual_seed(0)
    norm = torch.nn.LayerNorm(6, elementwise_affine=False, eps=1e-6)
    cotangent = torch.randn(batch, tokens, 6).double()
    shapes = ((batch, tokens, 6), (batch, 1, 6), (batch, 1, 6))
    given = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    x, shift, scale = given
    wanted = norm(x) * (1 + scale) + shift
    got = modulated(norm, *given)
    assert_close(got, wanted)
    for a, b in zip(*(torch.autograd.grad(y, given, cotangent) for y in (got, wanted)), strict=True):
        assert_close(a, b)


def test_positions_are_stretched_to_other_sizes():
    model = tiny()
    small, large = (model._positions((n, n), torch.zeros(1, n * n, 16)) for n in (4, 8))
    at = large.view(8, 8, 16)[::2, ::2]  # every second place of the larger grid is a place of the smaller one
    assert torch.allclose(at, small.view(4, 4, 16), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(sample_size=9), "multiple of patch_size"),
        (dict(mixer=["softmax"]), "mixer needs one value for each"),
        (dict(mixer="softmx"), "did you mean 'softmax'"),
        (dict(mixer_options={"sla": {}}), "no block has that mixer"),
        (dict(feed_forward="moe"), "mlp, mix_ffn, hyena"),
    ],
)
def test_options_that_make_no_model(options, message):
    with pytest.raises(ValueError, match=message):
        HybridDiT(**{**TINY, **options})


@pytest.mark.parametrize("name", [name for name in list_cases() if name.startswith("grafting_dit_")])
def test_grafted_dits_of_the_authors(name):
    case = load_case(name)
    state, kwargs = case.state_dict(), case.facts["kwargs"]
    grid = (kwargs["input_size"] // kwargs["patch_size"],) * 2
    drawn = state["pos_embed"]
    with pytest.raises(ValueError, match="not DiT's sine-cosine table"):
        read_dit(state, num_attention_heads=kwargs["num_heads"])
    with pytest.raises(ValueError, match="give num_attention_heads="):
        read_dit(state)
    state["pos_embed"] = _positions(kwargs["hidden_size"], grid, grid[0])
    damaged = {
        **state,
        "blocks.0.adaLN_modulation.1.bias": torch.full((6 * kwargs["hidden_size"],), torch.nan),
    }
    with pytest.raises(ValueError, match=r"hold NaN or infinity: blocks\.0\.adaLN_modulation\.1\.bias \("):
        read_dit(damaged, num_attention_heads=kwargs["num_heads"])
    model = read_dit(state, num_attention_heads=kwargs["num_heads"])
    model.positions.copy_(drawn)
    with torch.no_grad():
        case.check("y", model(case.input("x"), 999 * case.input("t"), case.input("c")).sample)


def test_other_weights_are_no_dit(tmp_path):
    from safetensors.torch import save_file

    save_file({"stem.weight": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"not a checkpoint of DiT: no rule renames 'stem\.weight'"):
        read_dit(tmp_path / "x.safetensors")


def test_inputs_that_do_not_fit():
    model = tiny()
    image, time, label = inputs()
    with pytest.raises(ValueError, match="needs class_labels"):
        model(image, time)
    with pytest.raises(ValueError, match="multiples of 2, got 7x8"):
        model(image[:, :, :7], time, label)
    with pytest.raises(ValueError, match="unconditional"):
        tiny(num_classes=0)(image, time, label)


def pipeline(scheduler=None, **options):
    pipe = HybridDiTPipeline(
        tiny(**options), scheduler or FlowMatchEulerDiscreteScheduler(), labels=["a", "b", "c"]
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler(), DDIMScheduler()])
def test_the_pipeline_saves_and_loads_and_repeats_itself(scheduler, tmp_path):
    pipe = pipeline(scheduler)

    def images(pipe, labels=("a", 2)):
        generator = torch.Generator().manual_seed(0)
        return pipe(
            labels, num_inference_steps=3, guidance_scale=2.0, generator=generator, output_type="latent"
        )

    first = images(pipe).images
    assert first.shape == (2, 2, 8, 8)
    pipe.save_pretrained(tmp_path)
    again = HybridDiTPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(images(again).images, first)
    assert not torch.equal(images(again, ("b", "c")).images, first)


def test_guidance_is_the_line_through_both_predictions():
    pipe = pipeline()
    image, time, label = inputs()
    with torch.no_grad():
        with_class, without = (
            pipe.transformer(image, time[0], y).sample for y in (label, torch.tensor([3, 3]))
        )
        assert torch.allclose(
            pipe._predict(image, time[0], label, 3.0), without + 3 * (with_class - without), atol=1e-5
        )


def test_labels_by_name_and_number():
    pipe = pipeline()
    assert pipe.label_ids(["c", 0]) == [2, 0]
    with pytest.raises(ValueError, match="nearest is 'a'"):
        pipe.label_ids(["aa"])
    with pytest.raises(ValueError, match="this model has 3"):
        pipe.label_ids([3])
    with pytest.raises(ValueError, match="needs one for each image"):
        pipe()


def test_mixers_come_and_go(tmp_path, caplog):
    hosts._warn_once.cache_clear()
    model = tiny()
    before = model(*inputs()).sample
    with pytest.raises(
        ValueError, match=r"sample_size of HybridDiT is \(height, width\), each positive, got \(1, 8, 8\)"
    ):
        visionhybrid.attach(model, "linfusion", sample_size=(1, 8, 8))
    report = visionhybrid.attach(model, "linfusion", layers="blocks.1", mid_dim=4)
    assert "1 of 2 mixers do more work than softmax attention at this size" in caplog.text
    assert [(row.name, row.mixer) for row in report.rows] == [
        ("blocks.0.attn", "softmax"),
        ("blocks.1.attn", "linfusion"),
    ]
    changed = model(*inputs()).sample
    assert not torch.allclose(changed, before)
    model.save_pretrained(tmp_path)
    assert torch.equal(HybridDiT.from_pretrained(tmp_path)(*inputs()).sample, changed)
    visionhybrid.detach(model)
    assert torch.equal(model(*inputs()).sample, before)
    assert model.config.mixer == ["softmax", "softmax"]
    with pytest.raises(ValueError, match="no mixers but those"):
        visionhybrid.detach(model)
    with pytest.raises(ValueError, match="no attention is called"):
        visionhybrid.attach(model, "linfusion", layers="down_blocks")
