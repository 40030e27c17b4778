"""What a generator is trained on: images of classes or captions, encoded where the model works on latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchvision import transforms

from visionhybrid.data.captions import open_captions
from visionhybrid.data.classification import LabelledImages, Source, open_splits
from visionhybrid.data.encoded import Encoded, open_encoded
from visionhybrid.data.latents import Cut, Latents
from visionhybrid.diffusion.autoencoder import Autoencoder
from visionhybrid.diffusion.denoisers import Family
from visionhybrid.train.config import ConfigError, Generation
from visionhybrid.train.encoding import Stores, Texts, encode_captions, encode_images, on_device

Images = LabelledImages | Latents | Encoded


@dataclass(frozen=True)
class Material:
    """Images to train on and held-out ones; with captions also these, encoded: labels are their numbers."""

    train: Images
    held_out: Images
    texts: Texts | None = None
    held_out_texts: Texts | None = None
    captions: tuple[str, ...] = ()  # held-out ones


def of_classes(config: Generation, vae: Autoencoder | None, notes: list[str]) -> Material:
    """Images of classes or of nothing, as pixels or as latents of `vae`. What a person should know is added to `notes`.

    Raises: ConfigError: another number of classes than the config says, or one that nothing shows.
    """
    data = config.data
    train, held_out = open_splits(data.dataset, data.root, data.train, data.held_out, data.class_map)
    _check_classes(config, train, notes)
    return Material(*_images(config, (train, held_out), vae, Stores(config.cache, notes)))


def of_captions(config: Generation, vae: Autoencoder, family: Family, notes: list[str]) -> Material:
    """Images with captions, encoded as `family` takes them."""
    data, text = config.data, config.text
    train, held_out, found = open_captions(
        data.root,
        data.train,
        data.held_out,
        column=text.column,
        skip=text.missing == "skip",
        hold_out=text.hold_out,
    )
    notes += found
    stores = Stores(config.cache, notes)
    images = _images(config, (train, held_out), vae, stores)
    facts = family.facts()
    with on_device(*family.text_encoders):
        texts = [
            encode_captions(source.captions, family.encode, family.nothing, stores, facts)
            for source in (train, held_out)
        ]
    return Material(*images, *texts, captions=tuple(held_out.captions))


def of_encoded(config: Generation, channels: int) -> Material:
    """Samples that come encoded. Raises: ConfigError: they are another model's."""
    data = config.data
    train, held_out = open_encoded(data.root, data.train, data.held_out, config.text.hold_out)
    for source in (train, held_out):
        found = source.shapes["latent"][0]
        if found != channels:
            raise ConfigError(f"data.root: latents have {found} channels, the denoiser takes {channels}")
    return Material(train, held_out)


def _images(
    config: Generation, sources: tuple[Source, Source], vae: Autoencoder | None, stores: Stores
) -> list[Images]:
    """Both splits; only that to train on is mirrored."""
    size, found = config.data.image_size, list[Images]()
    for source, flip in zip(sources, (config.flip, 0.0), strict=True):
        images = LabelledImages(source, _transform(size, flip), {1: "L", 3: "RGB"}[config.channels])
        if vae is None:
            found.append(images)
        else:
            found.append(encode_images(images, vae, size, stores, flip=flip, draw=config.latent.draw))
    return found


def _transform(size: int, flip: float) -> Any:
    """Of images trained in pixels."""
    return transforms.Compose([Cut(size), transforms.RandomHorizontalFlip(flip)])


def _check_classes(config: Generation, train: Source, notes: list[str]) -> None:
    data, names = config.data, train.classes
    empty = _empty(Path(data.root) / data.train, names) if data.root and names else []
    without = f"no image in {', '.join(empty[:5])}" if empty else ""
    if names and data.num_classes not in (0, len(names)):
        raise ConfigError(
            f"data.num_classes is {data.num_classes}, but there are {len(names)} classes "
            f"(0: train without them){without and '; ' + without}"
        )
    if without:
        notes.append(f"{len(empty)} folders of classes are left out: {without}")
    labels = train.labels()
    if labels is not None and (unseen := set(range(data.num_classes)) - set(labels)):
        first = min(unseen)
        raise ConfigError(
            f"data: {len(unseen)} of {data.num_classes} classes have no image to train on, first "
            f"{names[first] if names else first}"
        )


def _empty(folder: Path, known: Sequence[str]) -> list[str]:
    """Folders of classes in which there is nothing."""
    if not folder.is_dir():
        return []
    unknown = [p for p in folder.iterdir() if p.is_dir() and p.name not in known]
    return sorted(p.name for p in unknown if not any(file.is_file() for file in p.rglob("*")))
