"""Autoencoders, images encoded by them, and generators trained in their latents."""

import math
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import tiny_pipelines
import torch
from PIL import Image
from test_denoisers import sana
from test_store import damage, files
from torch.testing import assert_close
from train_case import outcome

from visionhybrid.data import store as store_module
from visionhybrid.data.classification import LabelledImages, TimmSource
from visionhybrid.data.errors import CorruptSample
from visionhybrid.data.latents import Affine, Cut, Latents, image_key
from visionhybrid.data.store import Store, StoreError
from visionhybrid.diffusion import HybridDiTPipeline, UNetPipeline
from visionhybrid.diffusion.autoencoder import Autoencoder, affine_of, decode, fingerprint, open_autoencoder
from visionhybrid.train import encoding, override, run
from visionhybrid.train.config import (
    Cache,
    ConfigError,
    Generation,
    Generator,
    Images,
    Latent,
    Loop,
    Sampling,
)
from visionhybrid.train.encoding import Stores, encode_images

# ---- autoencoders


@pytest.mark.parametrize(
    "net",
    [
        tiny_pipelines.vae(shift_factor=0.1, scaling_factor=0.36),
        tiny_pipelines.vae(latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0]),
        sana().vae,
    ],
    ids=["shift", "mean-std", "dc"],
)
def test_an_autoencoder_is_found_and_normalised(net, tmp_path):
    net.save_pretrained(tmp_path / "vae")
    for path in (tmp_path, tmp_path / "vae"):  # in a pipeline, and by itself
        assert fingerprint(open_autoencoder(str(path))) == fingerprint(net)
    vae = Autoencoder(net)
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    moments = vae.moments(images)
    assert moments.shape == (2, 4 * (1 + vae.stochastic), 4, 4)
    assert (vae.factor, vae.channels, vae.colours) == (2, 4, 3)
    latents = moments[:, :4]
    affine = affine_of(net.config)
    normalised = (latents - affine.shift) * affine.scale
    assert_close(decode(net, normalised), net.decode(latents).sample, rtol=1e-4, atol=1e-5)
    # as diffusers' pipelines undo it
    config = net.config
    if config.get("latents_mean") is not None:
        mean, std = (torch.tensor(config[f"latents_{name}"]).view(1, -1, 1, 1) for name in ("mean", "std"))
        undone = normalised * std / config.scaling_factor + mean
    else:
        undone = normalised / config.scaling_factor + (config.get("shift_factor") or 0)
    assert_close(undone, latents)
    changed = dict(net.named_parameters())
    next(iter(changed.values())).data[0] += 1e-3
    assert fingerprint(net) != fingerprint(open_autoencoder(str(tmp_path)))


def test_what_is_no_autoencoder(tmp_path):
    with pytest.raises(ValueError, match="no autoencoder"):
        open_autoencoder(str(tmp_path))
    tiny_pipelines.unet().save_config(tmp_path)
    with pytest.raises(ValueError, match="UNet2DConditionModel is no autoencoder known here"):
        open_autoencoder(str(tmp_path))


# ---- encoding a folder


@pytest.fixture
def folder(tmp_path):
    """Two classes of three images, one of them twice, and one that cannot be read."""
    draw = torch.Generator().manual_seed(0)
    for number in range(6):
        pixels = torch.randint(256, (10 + number, 12, 3), generator=draw, dtype=torch.uint8).numpy()
        path = tmp_path / "data" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    shutil.copy(tmp_path / "data" / "a" / "0.png", tmp_path / "data" / "b" / "same.png")
    (tmp_path / "data" / "b" / "broken.png").write_bytes(b"\x89PNG no more")
    return tmp_path / "data"


class Counting(Autoencoder):
    """Counts what it encodes."""

    def __init__(self, net):
        super().__init__(net)
        self.seen = 0

    def moments(self, images):
        self.seen += len(images)
        return super().moments(images)


def encode(folder, vae, *, size=8, flip=0.0, draw="sample", notes=None, **cache):
    images = LabelledImages(TimmSource("", str(folder), "train"), None)
    given = Cache(folder=str(folder.parent / "cache"), batch=4, **cache)
    stores = Stores(given, [] if notes is None else notes)
    return encode_images(images, vae, size, stores, flip=flip, draw=draw)


def test_images_are_encoded_once(folder, monkeypatch):
    vae, notes = Counting(tiny_pipelines.vae()), []
    assert len(encode(folder, vae, notes=notes)) == 8
    assert vae.seen == 6  # of 8: one is there twice, one is broken
    assert len(notes) == 1
    assert "1 of 8 images cannot be read" in notes[0]
    encode(folder, vae)
    assert vae.seen == 6
    # unchanged files are known without being read
    (folder / "b" / "broken.png").rename(folder / "broken")
    with monkeypatch.context() as patch:
        patch.setattr(LabelledImages, "read", lambda *_: pytest.fail("read an image again"))
        assert len(encode(folder, vae)) == 7
    (folder / "a" / "2.png").touch()
    encode(folder, vae)
    assert vae.seen == 6
    Image.new("RGB", (12, 12), "red").save(folder / "a" / "2.png")
    encode(folder, vae)
    assert vae.seen == 7
    encode(folder, vae, size=16)
    assert vae.seen == 13
    encode(folder, vae, flip=0.5)
    assert vae.seen == 13 + 2 * 6
    other = Counting(tiny_pipelines.vae(scaling_factor=0.5))
    encode(folder, other)
    assert other.seen == 6


def test_what_is_damaged_is_encoded_again(folder):
    vae, notes = Counting(tiny_pipelines.vae()), []
    whole = [row if row is None else row["moments"] for row in encode(folder, vae).rows]
    (path,) = files(folder.parent / "cache")
    damage(path)
    vae.seen = 0
    again = encode(folder, vae, notes=notes)
    assert vae.seen == 1
    assert "1 of 6 rows" in notes[0]
    for before, row in zip(whole, again.rows, strict=True):
        assert (before is None) == (row is None)
        assert before is None or (before - row["moments"]).abs().max() < 1e-5


def test_a_killed_encoding_goes_on(folder, monkeypatch):
    monkeypatch.setattr(store_module, "FLUSH_SECONDS", -1.0)
    vae = Counting(tiny_pipelines.vae())
    whole = vae.moments

    def die(images):
        if vae.seen >= 4:
            raise KeyboardInterrupt
        return whole(images)

    with monkeypatch.context() as patch:
        patch.setattr(vae, "moments", die)
        with pytest.raises(KeyboardInterrupt):
            encode(folder, vae)
    vae.seen = 0
    encode(folder, vae)
    assert vae.seen == 2


def test_processes_share_the_work(folder, monkeypatch):
    """Two processes one after the other, none of which waits for the other: each does its half."""
    seen = []
    for rank in (0, 1, 0):
        state = SimpleNamespace(
            process_index=rank,
            num_processes=2,
            is_main_process=rank == 0,
            device="cpu",
            wait_for_everyone=lambda: None,
        )
        monkeypatch.setattr(encoding, "PartialState", lambda state=state: state)
        vae = Counting(tiny_pipelines.vae())
        alone = rank == 0 and not seen
        with pytest.raises(StoreError, match="other processes") if alone else nullcontext():
            encode(folder, vae)
        seen.append(vae.seen)
    assert seen[0] in (3, 4)
    assert (sum(seen), seen[2]) == (6, 0)


def test_a_latent_is_drawn_from_its_moments(tmp_path):
    store = Store(tmp_path, {"kind": "test"})
    mean, log_variance = torch.ones(1, 4, 4), torch.full((1, 4, 4), 2 * math.log(0.1))
    views = [torch.cat([sign * mean, log_variance]) for sign in (1, -1)]
    about = {"size": torch.tensor([5, 6]), "corner": torch.tensor([0, 1])}
    store.add("key", {"moments": torch.stack(views), **about})
    store.flush()
    affine = Affine(torch.full((1, 1, 1), 0.5), torch.full((1, 1, 1), 2.0))
    given = (("a", "b"), store.rows(["key", None]), [1, 0], affine)
    latents = Latents(*given, stochastic=True, flip=0.25)
    drawn = torch.stack([latents.sample(0, seed)["image"] for seed in range(400)]) / 2 + 0.5
    assert torch.equal(latents.sample(0, 7)["image"] / 2 + 0.5, drawn[7])
    signs = drawn.mean((1, 2, 3)).sign()
    assert 0.18 < (signs < 0).float().mean() < 0.32
    noise = (drawn * signs.view(-1, 1, 1, 1) - 1) / 0.1
    assert abs(float(noise.mean())) < 0.03
    assert abs(float(noise.std()) - 1) < 0.03
    found = latents.sample(0, 0)
    assert [found[name].tolist() for name in ("label", "size", "corner")] == [1, [5, 6], [0, 1]]
    assert torch.equal(Latents(*given, stochastic=True, draw="mean").sample(0, 3)["image"], mean)
    assert torch.equal(Latents(*given, stochastic=False).sample(0, 3)["image"], (views[0] - 0.5) * 2)
    with pytest.raises(CorruptSample, match="cannot be read"):
        latents.sample(1, 0)


def test_rows_hold_the_moments_of_both_views(folder):
    vae = Autoencoder(tiny_pipelines.vae())
    for precision in ("float32", "float16"):
        latents = encode(folder, vae, flip=0.5, precision=precision)
        for index, row in enumerate(latents.rows):
            if row is None:
                continue
            image, _ = LabelledImages(TimmSource("", str(folder), "train"), None).read(index)
            pixels = Cut(8)(image)
            assert pixels.shape == (3, 8, 8)
            wanted = vae.moments(torch.stack([pixels, pixels.flip(2)]))
            assert row["moments"].dtype == getattr(torch, precision)
            assert_close(row["moments"].float(), wanted, rtol=2e-3, atol=2e-3)
            assert row["size"].tolist() == [image.height, image.width]


def test_the_corner_is_that_of_the_cut():
    image = Image.new("RGB", (20, 10))
    for x in range(20):
        for y in range(10):
            image.putpixel((x, y), (10 * x, 20 * y, 0))
    cut = Cut(10)
    top, left = cut.corner(image)
    assert (top, left) == (0, 5)
    assert torch.equal(((cut(image)[0] + 1) * 255 / 2).round()[0], torch.arange(left, left + 10) * 10.0)


def test_the_same_picture_has_the_same_key():
    a, b = Image.new("RGB", (2, 3)), Image.new("RGB", (3, 2))
    assert image_key(a) == image_key(Image.new("RGB", (2, 3)))
    assert (
        len({image_key(a), image_key(b), image_key(a.convert("L")), image_key(Image.new("RGB", (2, 3), 9))})
        == 4
    )


# ---- training in latents


@pytest.fixture(scope="module")
def vaes(tmp_path_factory):
    path = tmp_path_factory.mktemp("vaes")
    tiny_pipelines.vae().save_pretrained(path / "kl")
    sana().vae.save_pretrained(path / "dc")
    return path


def latent(tmp_path, vaes, *words, vae="kl", **changes):
    config = Generation(
        name="latent",
        model=Generator(
            name="hybrid_dit", options=dict(num_layers=1, num_attention_heads=2, attention_head_dim=8)
        ),
        data=Images(dataset="digits", num_classes=10, image_size=8),
        latent=Latent(vae=str(vaes / vae)),
        cache=Cache(folder=str(tmp_path / "cache"), batch=500),
        sampling=Sampling(steps=1, each=1, classes=2),
        loop=Loop(batch_size=64, steps=2, workers=0, log_every=1, tensorboard=False, checkpoint_every=1),
        eval_batch=200,
    )
    return override(config, words)


def test_a_generator_of_latents_is_trained_killed_and_continued(tmp_path, vaes):
    config = latent(tmp_path, vaes, "flip=0.5")
    whole = run(config, tmp_path / "whole", progress=False)
    run(config, tmp_path / "stopped", progress=False)
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "step_00000002")
    shutil.rmtree(tmp_path / "cache")  # what is encoded again is the same
    run(config, tmp_path / "stopped", progress=False)
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")
    pipe = HybridDiTPipeline.from_pretrained(whole["weights"])
    pipe.set_progress_bar_config(disable=True)
    (image,) = pipe([7], num_inference_steps=1).images
    assert image.size == (8, 8)
    assert pipe.transformer.config.sample_size == 4
    assert fingerprint(pipe.vae) == fingerprint(open_autoencoder(str(vaes / "kl")))


def test_a_unet_of_deterministic_latents(tmp_path, vaes):
    words = ["model.name=unet", 'model.options={"block_out_channels": [8], "norm_num_groups": 4}']
    words += ['model.options.down_block_types=["DownBlock2D"]', 'model.options.up_block_types=["UpBlock2D"]']
    words += ["diffusion.predict=v", "diffusion.min_snr=5", "loop.steps=1", "sampling.guidance=2"]
    config = latent(tmp_path, vaes, *words, vae="dc")
    done = run(config, tmp_path / "run", progress=False)
    pipe = UNetPipeline.from_pretrained(done["weights"])
    pipe.set_progress_bar_config(disable=True)
    assert pipe.num_classes == 10
    assert pipe(["3"], num_inference_steps=1, guidance_scale=3.0).images[0].size == (8, 8)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["latent.vae=/nowhere"], r"latent\.vae: /nowhere: no autoencoder"),
        (["data.image_size=9"], r"data\.image_size: the model takes multiples of 2, got 9"),
        (["channels=1"], "channels: the autoencoder takes images of 3, got 1"),
        (["model.options.in_channels=8"], "are those of the data, 4"),
        (["model.options.patch_size=3"], "model.options: HybridDiT: sample_size 4 must be a multiple"),
        (["model.name=pipeline"], "belong together"),
        (["model.pipeline=somewhere"], "belong together"),
        (["data.dataset=captions"], "is what model.pipeline is trained on"),
        (["model.name=unet", "model.options.depth=2"], "model.options"),
        (["model.lora=4"], r"model\.lora: is for model\.pipeline"),
        (["model.name=dit", "data.num_classes=0"], "'dit' needs classes"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_encoded(words, message, tmp_path, vaes):
    with pytest.raises(ConfigError, match=message):
        run(latent(tmp_path, vaes, *words), tmp_path / "run", progress=False)
    assert not (tmp_path / "cache").exists()
