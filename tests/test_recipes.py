"""Recipes of generators as published, run at tiny size: everything but the sizes is the recipe's."""

import json

import pytest
import tiny_pipelines
import tiny_transformers
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import save

import visionhybrid
from visionhybrid.data.encoded import open_encoded
from visionhybrid.data.errors import CorruptSample
from visionhybrid.diffusion import HybridDiTPipeline
from visionhybrid.train import find, override, run, task
from visionhybrid.train.encoded import encode_clips
from visionhybrid.train.grafting import graft

pytestmark = pytest.mark.filterwarnings(
    # diffusers' schedulers on numpy 2
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)
LOOP = [
    "loop.batch_size=2",
    "loop.micro_batch=none",
    "loop.precision=no",
    "loop.workers=0",
    "loop.log_every=1",
    "loop.tensorboard=false",
    "sampling.steps=1",
    "sampling.each=1",
    "sampling.classes=1",
    "eval_batch=2",
]
V_PREDICTION = dict(
    prediction_type="v_prediction", beta_schedule="scaled_linear", steps_offset=1, clip_sample=False
)
PIPELINES = {
    "sd15": tiny_pipelines.sd15,
    "sd21": lambda: tiny_pipelines.sd15(attention_head_dim=[4, 8], use_linear_projection=True),
    "sdxl": tiny_pipelines.sdxl,
    "flux": lambda: tiny_transformers.flux(guidance_embeds=True),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four captioned pictures."""
    root = tmp_path_factory.mktemp("pictures")
    for i in range(4):
        Image.radial_gradient("L").resize((40 + i, 36)).convert("RGB").save(root / f"{i}.png")
        (root / f"{i}.txt").write_text(f"{i} cats")
    return root


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """name -> folder of a saved tiny pipeline, made when it is asked for."""
    root = tmp_path_factory.mktemp("pipelines")

    def saved(name):
        if not (root / name).is_dir():
            pipe = PIPELINES[name]()
            if name == "sd21":
                pipe.scheduler = type(pipe.scheduler)(**V_PREDICTION)
            pipe.save_pretrained(root / name)
        return root / name

    return saved


@pytest.fixture(scope="module")
def latent(tmp_path_factory):
    """Words for training in the latent space of a tiny autoencoder, encoded once for all tests."""
    path = tmp_path_factory.mktemp("vae")
    tiny_pipelines.vae().save_pretrained(path / "vae")
    return [f"latent.vae={path / 'vae'}", f"cache.folder={path / 'cache'}", "cache.batch=128"]


def logged(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


@pytest.mark.parametrize(
    ("recipe", "pipeline", "words"),
    [
        ("linfusion_sd15", "sd15", []),
        ("linfusion_sd21", "sd21", []),
        ("linfusion_sdxl", "sdxl", ['by_layer={"dim == 64": {"mid_dim": 4}}']),
        ("clear_flux", "flux", ["features=single_transformer_blocks.1.attn", "mixer_options.radius=2"]),
        ("clear_flux_down4", "flux", ["features=single_transformer_blocks.1.attn"]),
    ],
)
def test_grafts_of_pipelines(recipe, pipeline, words, folder, pipelines, tmp_path):
    source = pipelines(pipeline)
    small = [f"model.pipeline={source}", f"data.root={folder}", "data.image_size=32", "text.hold_out=2"]
    small += [f"cache.folder={tmp_path / 'cache'}", "whole.steps=2", "text.max_length=0"]
    config = override(find(recipe), [*LOOP, *small, *words])
    report = graft(config, tmp_path / "out", progress=False)
    assert report.student.keys() == {"loss", "distance"}
    first = logged(tmp_path / "out" / "whole")[0]
    weights = config.task_weight, config.output_weight, config.feature_weight
    terms = [first[name] for name in ("task", "output", "feature")]
    assert all(value > 0 for value in terms)
    assert first["loss"] == pytest.approx(sum(w * t for w, t in zip(weights, terms, strict=True)), rel=1e-4)
    # the released pipeline has the mixers, the teacher's folder has not
    pipe, teacher = (DiffusionPipeline.from_pretrained(path) for path in (report.weights, source))
    assert [row.mixer for row in visionhybrid.describe(pipe).mixed] == [x.mixer for x in report.layers]
    assert {x.mixer for x in report.layers} == {config.mixer}
    assert not visionhybrid.describe(teacher).mixed


def test_a_distilled_guidance_is_told(folder, pipelines, tmp_path):
    words = [
        f"model.pipeline={pipelines('flux')}",
        f"data.root={folder}",
        "data.image_size=32",
        "text.max_length=0",
    ]
    words += [f"cache.folder={tmp_path}", "features=single_transformer_blocks.1.attn"]
    asked = task.build(override(find("clear_flux"), [*LOOP, *words])).inputs(torch.device("cpu"))
    assert asked[1]["guidance"].tolist() == [3.5]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Four clips of five frames, encoded; half of them folders of frames, half animated."""
    root = tmp_path_factory.mktemp("clips")
    for i in range(4):
        frames = [
            Image.radial_gradient("L").rotate(9 * i * t).resize((50, 34)).convert("RGB") for t in range(6)
        ]
        if i % 2:
            frames[0].save(root / f"{i}.gif", save_all=True, append_images=frames[1:])
        else:
            (root / str(i)).mkdir()
            for t, frame in enumerate(frames):
                frame.save(root / str(i) / f"{t}.png")
        (root / f"{i}.txt").write_text(f"{i} cats")
    pipeline, out = root / "wan", root / "encoded"
    tiny_transformers.wan().save_pretrained(pipeline)
    shape = dict(frames=5, height=32, width=48)
    files = encode_clips(str(pipeline), _only_clips(root), out, **shape, progress=False)
    before = [path.stat().st_mtime_ns for path in files]
    assert encode_clips(str(pipeline), root / "raw", out, **shape, progress=False) == files
    assert [path.stat().st_mtime_ns for path in files] == before
    (root / "raw" / "0.txt").unlink()
    files[0].unlink()
    with pytest.raises(ValueError, match="has no caption"):
        encode_clips(str(pipeline), root / "raw", out, **shape, progress=False)
    return pipeline, out


def _only_clips(root):
    (root / "raw").mkdir()
    for path in list(root.iterdir()):
        if path.name != "raw" and path.name != "wan":
            path.rename(root / "raw" / path.name)
    return root / "raw"


@pytest.mark.parametrize("recipe", ["sla_wan_1_3b", "sla_wan_1_3b_finetune"])
def test_grafts_of_a_video_model(recipe, clips, tmp_path):
    pipeline, encoded = clips
    words = [f"model.pipeline={pipeline}", f"data.root={encoded}", "text.hold_out=3", "loop.ema_decay=0.5"]
    phase = "tune" if "finetune" in recipe else "whole"
    blocks = ["mixer_options.block_q=8", "mixer_options.block_k=4", f"{phase}.steps=1"]
    config = override(find(recipe), [*LOOP, *words, *blocks])
    report = graft(config, tmp_path / "out", progress=False)
    assert [x.name for x in report.layers] == ["blocks.0.attn1", "blocks.1.attn1"]
    (first,) = logged(tmp_path / "out" / phase)
    if phase == "whole":
        assert first["loss"] == pytest.approx(first["output"], rel=1e-5)
        assert first["task"] > 0
    # without the parts that had nothing to do; the others are the teacher's
    whole = DiffusionPipeline.from_pretrained(pipeline)
    others = {name: getattr(whole, name) for name in ("vae", "text_encoder", "tokenizer")}
    pipe = DiffusionPipeline.from_pretrained(report.weights, **others)
    assert [row.mixer for row in visionhybrid.describe(pipe).mixed] == ["sla", "sla"]
    assert report.student["distance"] > 0


def test_encoded_data_that_do_not_fit(clips, tmp_path):
    pipeline, encoded = clips
    base = [*LOOP, f"model.pipeline={pipeline}", f"data.root={encoded}", "loop.ema_decay=none"]
    for word, message in (
        ("diffusion.drop_label=0.1", "cannot be dropped"),
        (f"data.root={tmp_path}", "no encoded samples"),
        ("data.num_classes=3", "captions are no classes"),
    ):
        with pytest.raises(ValueError, match=message):
            graft(override(find("sla_wan_1_3b"), [*base, word]), tmp_path / "out", progress=False)
    (tmp_path / "a.safetensors").write_bytes(save({"x": torch.zeros(1)}))
    with pytest.raises(ValueError, match="no tensor 'latent'; it has x"):
        open_encoded(str(tmp_path), "train", "val", 0)
    source, _ = open_encoded(str(encoded), "train", "val", 0)
    (tmp_path / "b.safetensors").write_bytes(save({"latent": torch.zeros(3, 1, 2, 2)}))
    source.files.append(tmp_path / "b.safetensors")
    with pytest.raises(CorruptSample, match="the first file"):
        source.sample(len(source) - 1, 0)
    values = {name: torch.zeros(shape) for name, shape in source.shapes.items()}
    values["latent"].view(-1)[-1] = torch.nan
    (tmp_path / "b.safetensors").write_bytes(save(values))
    with pytest.raises(CorruptSample, match="NaN or infinity in latent"):
        source.sample(len(source) - 1, 0)


TINY_DIT = ["model.options.num_layers=1", "model.options.attention_head_dim=8"]
DIGITS = ["data.dataset=digits", "data.num_classes=10", "data.image_size=16", "flip=0", "eval_batch=128"]


@pytest.mark.parametrize("recipe", ["dit_s2_in1k", "sit_b2_in1k", "lit_xl2_in1k"])
def test_transformers_from_scratch(recipe, latent, tmp_path):
    words = [
        *LOOP,
        *DIGITS,
        *TINY_DIT,
        *latent,
        "loop.steps=1",
    ]
    run(override(find(recipe), words), tmp_path / "run", progress=False)
    model = HybridDiTPipeline.from_pretrained(tmp_path / "run" / "pipeline").transformer
    assert (model.config.in_channels, model.out_channels) == (4, 4 if "sit" in recipe else 8)
    assert {block.attn.mixer.about.name for block in model.blocks} == {
        "linear" if "lit" in recipe else "softmax"
    }


def test_hyena_is_grafted_into_a_dit(latent, tmp_path):
    words = [*LOOP, *DIGITS, *latent]
    shape = ["model.options.num_layers=2", "model.options.attention_head_dim=2"]
    run(override(find("dit_xl2_in1k"), [*words, *shape, "loop.steps=1"]), tmp_path / "dit", progress=False)
    more = [f"teacher={tmp_path / 'dit'}", "layers=blocks.1", "alone.steps=2", "tune.steps=1"]
    config = override(find("grafting_dit_xl2_hyena_y"), [*words, *more])
    report = graft(config, tmp_path / "hyena", progress=False)
    student = HybridDiTPipeline.from_pretrained(report.weights).transformer
    assert student.config.mixer == ["softmax", "hyena"]
    first, _ = logged(tmp_path / "hyena" / "alone")
    grafts = task.build(config)
    net = grafts.parts()["model"]
    assert net.measure is torch.nn.functional.l1_loss
    assert first["loss"] == pytest.approx(first["error/blocks.1.attn"], rel=1e-5)


def test_lit_learns_from_a_dit(latent, tmp_path):
    words = [*LOOP, *DIGITS, *latent]
    shape = ["model.options.num_layers=1", "model.options.attention_head_dim=4"]  # six heads: 24 channels
    run(override(find("dit_s2_in1k"), [*words, *shape, "loop.steps=1"]), tmp_path / "dit", progress=False)
    more = [f"teacher={tmp_path / 'dit'}", "model.options.attention_head_dim=12", "whole.steps=1"]
    report = graft(override(find("lit_s2_distil_in1k"), [*words, *more]), tmp_path / "lit", progress=False)
    student, teacher = (
        HybridDiTPipeline.from_pretrained(path).transformer
        for path in (report.weights, tmp_path / "dit" / "pipeline")
    )
    assert (student.config.num_attention_heads, teacher.config.num_attention_heads) == (2, 6)
    assert student.blocks[0].attn.mixer.options["conv"] == 5
    (first,) = logged(tmp_path / "lit" / "whole")
    assert first["loss"] == pytest.approx(
        first["task"] + 0.5 * first["output"] + 0.05 * first["variance"], rel=1e-4
    )
