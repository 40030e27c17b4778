"""Distances between sets of images."""

import pytest
import tiny_pipelines as tiny
import torch
from PIL import Image

from visionhybrid.data.samples import digits
from visionhybrid.infer.evaluation import (
    Inception,
    clip_score,
    compare,
    features,
    frechet,
    pairs,
    precision_recall,
)


def sets(shift=0.0, scale=1.0, count=4000):
    generator = torch.Generator().manual_seed(0)
    real, generated = torch.randn(2, count, 3, generator=generator, dtype=torch.float64).unbind(0)
    return real, generated * scale + torch.tensor([shift, 0.0, 0.0])


def test_frechet_of_normal_distributions():
    """|m - m'|^2 + tr(S + S' - 2 sqrt(S S')), known for shifted and scaled unit ones."""
    real, generated = sets(shift=2.0, scale=3.0)
    assert frechet(real, real) == pytest.approx(0, abs=1e-6)
    assert frechet(real, generated) == pytest.approx(2**2 + 3 * (1 + 9 - 2 * 3), rel=0.05)


def test_precision_and_recall():
    real, generated = sets(count=400)
    same = precision_recall(real, generated)
    assert min(same) > 0.9
    narrow = precision_recall(real, generated * 0.1)
    assert narrow[0] == 1
    assert narrow[1] < 0.2  # real images are not covered
    assert precision_recall(real, generated + 100) == (0, 0)
    assert precision_recall(real, generated, chunk=7) == same


def test_by_hand():
    real = torch.tensor([[0.0], [1.0], [2.0], [-5.0]])
    generated = torch.tensor([[1.4], [3.5], [11.0], [30.0]])
    # balls to the first neighbour: [-1, 1], [0, 2], [1, 3], [-10, 0]; [-0.7, 3.5], [1.4, 5.6], [3.5, 18.5], [11, 49]
    assert precision_recall(real, generated, neighbours=1) == (1 / 4, 3 / 4)


@pytest.fixture(scope="module")
def backbone():
    import timm

    torch.manual_seed(0)
    return timm.create_model("vh_nextvit_small", depths=(1, 1, 5, 1), num_classes=10).eval()


def test_digits_are_nearer_to_digits_than_noise_is(backbone, tmp_path):
    images, _ = digits("val")
    first, second = (list(images[i::2][:24].expand(-1, 3, -1, -1)) for i in (0, 1))
    noise = list(torch.rand(24, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    real, ours, theirs = (features(backbone, x, progress=False, batch_size=7) for x in (first, second, noise))
    assert real.shape == (24, backbone.num_features)
    assert compare(real, ours).frechet < compare(real, theirs).frechet
    file = tmp_path / "a.png"
    Image.fromarray((first[0] * 255).round().byte().permute(1, 2, 0).numpy()).save(file)
    assert torch.allclose(features(backbone, [file], progress=False), real[:1], rtol=1e-3, atol=1e-4)


def test_what_cannot_be_compared(backbone, tmp_path):
    real, generated = sets(count=10)
    with pytest.raises(ValueError, match="more than 3 images"):
        compare(real, generated[:3])
    with pytest.raises(ValueError, match="one backbone"):
        frechet(real, generated[:, :2])
    with pytest.raises(ValueError, match="no images"):
        features(backbone, [], progress=False)
    with pytest.raises(ValueError, match=r"download pt_inception.*name that file"):
        Inception(tmp_path / "no.pth")
    with pytest.raises(ValueError, match="hf download"):
        clip_score([], [], tmp_path)
    with pytest.raises(ValueError, match="0 images and 1 prompts"):
        clip_score([], ["a"], tmp_path)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """The folder of a CLIP model of random weights."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    tokenizer = tiny.clip_tokenizer()
    layers = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    ends = dict(bos_token_id=len(tokenizer) - 2, eos_token_id=len(tokenizer) - 1)
    config = CLIPConfig(
        text_config=dict(layers, **ends, vocab_size=len(tokenizer)),
        vision_config=dict(layers, image_size=16, patch_size=8),
        projection_dim=8,
    )
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    sizes = dict(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(CLIPImageProcessor(**sizes), tokenizer).save_pretrained(folder)
    return folder


def test_clip_score_is_a_mean_over_images_whatever_the_batch(clip):
    images = list(torch.rand(5, 3, 16, 16))
    prompts = ["a cat", "a dog on a mat", "b", "the sea", "a cat"]
    alone = [clip_score([image], [prompt], clip) for image, prompt in zip(images, prompts, strict=True)]
    assert len(set(alone)) > 1
    for batch_size in (2, 32):
        found = clip_score(images, prompts, clip, batch_size=batch_size)
        assert found == pytest.approx(sum(alone) / 5, rel=1e-4)
    with pytest.raises(ValueError, match="no images"):
        clip_score([], [], clip)


def test_pairs_by_name():
    first = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]])
    second = torch.tensor([[0.0, 4.0], [6.0, 8.0]])
    found = pairs(["a", "b", "c"], ["c", "a"], first, second)
    assert found == {"pairs": 2, "pair_cosine": pytest.approx(1.0), "pair_distance": pytest.approx(1.0)}
    with pytest.raises(ValueError, match="such as 'a'"):
        pairs(["a"], ["b"], first, second)
