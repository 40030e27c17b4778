"""How far a set of generated images is from real ones, in the features of any backbone.

    ours = features(backbone, generated)
    real = features(backbone, photographs)
    print(compare(real, ours))  # Frechet distance, precision, recall

With Inception's published weights the Frechet distance is the FID (`Inception`); numbers of different backbones, or of different
numbers of images, cannot be compared with each other. CLIP score: `clip_score`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

from visionhybrid.infer.classification import AnyImage, pil_image, transform_of
from visionhybrid.infer.progress import bar

INCEPTION = "pt_inception-2015-12-05-6726825d.pth"


@dataclass(frozen=True)
class Comparison:
    """Between two sets of features. Precision: share of the generated that look real; recall: of the real that are covered."""

    frechet: float
    precision: float
    recall: float
    real: int  # images
    generated: int


class Features(Protocol):
    """Images to vectors."""

    def __call__(self, images: list[Image.Image]) -> Tensor:
        """(images, D)."""
        ...


class Backbone:
    """The pooled features, before the classifier, of a timm model; images are prepared as its `pretrained_cfg` says."""

    def __init__(self, model: nn.Module, device: str | torch.device | None = None) -> None:
        if not hasattr(model, "forward_head"):
            raise ValueError(f"features: {type(model).__name__} is no timm classifier")
        self.transform, self.mode = transform_of(model)
        self.model: Any = model.eval() if device is None else model.eval().to(device)

    def __call__(self, images: list[Image.Image]) -> Tensor:
        pixels = torch.stack([self.transform(image.convert(self.mode)) for image in images])
        maps = self.model.forward_features(pixels.to(next(self.model.parameters()).device))
        return self.model.forward_head(maps, pre_logits=True)


class Inception:
    """Inception with the weights that published FIDs are computed with, 2048 features. Extra `eval`.

    Raises:
        ValueError: no such file; the message says where it comes from.
    """

    def __init__(self, weights: str | Path, device: str | torch.device = "cpu") -> None:
        path = Path(weights)
        if not path.is_file():
            raise ValueError(
                f"no Inception weights at {path}: download {INCEPTION} from "
                "https://github.com/mseitzer/pytorch-fid/releases/tag/fid_weights and name that file"
            )
        try:
            from torchmetrics.image.fid import NoTrainInceptionV3
        except ImportError:
            raise ImportError(
                "Inception needs torchmetrics and torch-fidelity: pip install 'visionhybrid[eval]'"
            ) from None
        self.net = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(path)).to(device)
        self.device = device

    def __call__(self, images: list[Image.Image]) -> Tensor:
        # the network resizes by itself, and images may differ in size
        pixels = (pil_to_tensor(image.convert("RGB"))[None].to(self.device) for image in images)
        return torch.cat([self.net(x) for x in pixels])


@torch.no_grad()
def features(
    extractor: Features | nn.Module,
    images: Iterable[AnyImage],
    *,
    batch_size: int = 32,
    progress: bool = True,
) -> Tensor:
    """A vector for each image: float64 (images, D) on the CPU.

    Args:
        extractor: `Backbone`, `Inception`, or a timm classifier, which is put into eval mode.
        images: as for `classify`.
    Raises:
        ValueError: not a classifier, no images, or an image that cannot be read.
    """
    if isinstance(extractor, nn.Module):
        extractor = Backbone(extractor)
    items = list(images)
    if not items:
        raise ValueError("features: no images")
    found = []
    with bar(progress, "looking at images") as update:
        for first in range(0, len(items), batch_size):
            part = [pil_image(item) for item in items[first : first + batch_size]]
            found.append(extractor(part).double().cpu())
            update(min(1.0, (first + batch_size) / len(items)))
    return torch.cat(found)


def compare(real: Tensor, generated: Tensor, *, neighbours: int = 3) -> Comparison:
    """All numbers for two sets of features (N, D), (M, D).

    Raises:
        ValueError: different widths, or fewer than `neighbours` + 1 images in a set.
    """
    for name, values in (("real", real), ("generated", generated)):
        if values.ndim != 2 or len(values) <= neighbours:
            raise ValueError(
                f"compare: {name} must be (more than {neighbours} images, D), got {tuple(values.shape)}"
            )
    precision, recall = precision_recall(real, generated, neighbours=neighbours)
    return Comparison(frechet(real, generated), precision, recall, len(real), len(generated))


def frechet(real: Tensor, generated: Tensor) -> float:
    """Squared Wasserstein-2 distance of the normal distributions fitted to two sets of features (arXiv:1706.08500 eq. 6).

    torchmetrics computes it (extra `eval`).
    """
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError:
        raise ImportError(
            "the Frechet distance needs torchmetrics: pip install 'visionhybrid[eval]'"
        ) from None
    if real.shape[1] != generated.shape[1]:
        raise ValueError(
            f"frechet: features of one backbone needed, got {real.shape[1]} and {generated.shape[1]}"
        )
    taken = nn.Identity()
    taken.num_features = real.shape[1]  # pyright: ignore[reportArgumentType]
    metric = FrechetInceptionDistance(feature=taken, normalize=False).set_dtype(torch.float64)
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    return float(metric.compute())


def precision_recall(
    real: Tensor, generated: Tensor, *, neighbours: int = 3, chunk: int = 1024
) -> tuple[float, float]:
    """Shares of each set inside the other's manifold: the union of balls that reach to the k-th neighbour (arXiv:1904.06991)."""
    radius_real, radius_generated = (_radii(x, neighbours, chunk) for x in (real, generated))
    return _covered(generated, real, radius_real, chunk), _covered(real, generated, radius_generated, chunk)


def _radii(x: Tensor, neighbours: int, chunk: int) -> Tensor:
    # the nearest of all is the image itself
    return torch.cat([torch.cdist(part, x).kthvalue(neighbours + 1, dim=1).values for part in x.split(chunk)])


def _covered(x: Tensor, centres: Tensor, radii: Tensor, chunk: int) -> float:
    hits = sum(int((torch.cdist(part, centres) <= radii).any(1).sum()) for part in x.split(chunk))
    return hits / len(x)


def clip_score(
    images: Sequence[AnyImage], prompts: Sequence[str], model: str | Path, *, batch_size: int = 32
) -> float:
    """Mean of 100 max(cos, 0) between CLIP's embeddings of each image and its prompt (arXiv:2104.08718). Extra `eval`.

    Args:
        model: folder with a CLIP model of transformers and its processor.
        batch_size: images computed at once.
    Raises:
        ValueError: no such folder (the message says what to download), or not one prompt for each image.
    """
    if len(images) != len(prompts):
        raise ValueError(f"clip_score: {len(images)} images and {len(prompts)} prompts")
    if not (Path(model) / "config.json").is_file():
        raise ValueError(
            f"no CLIP model in {model}: `hf download openai/clip-vit-large-patch14 --local-dir {model}` puts one there"
        )
    if not prompts:
        raise ValueError("clip_score: no images")
    try:
        from transformers import CLIPModel, CLIPProcessor
    except ImportError:
        raise ImportError("the CLIP score needs transformers: pip install 'visionhybrid[eval]'") from None
    net, processor = CLIPModel.from_pretrained(model).eval(), CLIPProcessor.from_pretrained(model)
    cosines = []
    for first in range(0, len(images), batch_size):
        part = slice(first, first + batch_size)
        given = processor(
            text=list(prompts[part]),
            images=[pil_image(x).convert("RGB") for x in images[part]],
            return_tensors="pt",
            padding=True,
            truncation=True,
        )
        with torch.no_grad():
            out = net(**given)
        cosines.append(torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds))
    return float(100 * torch.cat(cosines).clamp_min(0).mean())


def pairs(
    names: Sequence[str], other_names: Sequence[str], first: Tensor, second: Tensor
) -> dict[str, float | int]:
    """Between images of the same name, as of a teacher and its student: cosine and relative distance of their features.

    Raises:
        ValueError: no name in both sets.
    """
    place = {name: i for i, name in enumerate(other_names)}
    both = [(i, place[name]) for i, name in enumerate(names) if name in place]
    if not both:
        raise ValueError(f"pairs: no file of one set has its name in the other, such as {names[0]!r}")
    left, right = torch.tensor(both).unbind(1)
    a, b = first[left], second[right]
    distance = (a - b).norm(dim=1) / a.norm(dim=1).clamp_min(1e-12)
    cosine = torch.nn.functional.cosine_similarity(a, b)
    return {
        "pairs": len(both),
        "pair_cosine": float(cosine.mean()),
        "pair_distance": float(distance.mean()),
    }
