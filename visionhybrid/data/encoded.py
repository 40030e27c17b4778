"""Samples that come encoded: a file of latents and text embeddings for each, as video models are trained on them.

    NAME.safetensors: `latent` (C, T, h, w) or (C, h, w), normalised as the model takes it, and the tensors of its caption,
    each without an axis for the batch (`text` (L, D) for Wan).

`visionhybrid.train.encoded.encode_clips` makes such files from folders of frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from visionhybrid.data.errors import CorruptSample
from visionhybrid.data.scan import split_folders, walk
from visionhybrid.models.checkpoint.finite import nonfinite


class Encoded:
    """Sample: image (the latent), label (its number), and the caption's tensors, all float32."""

    classes: Sequence[str] = ()

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = list(files)
        self.shapes = _shapes(self.files[0])

    def __len__(self) -> int:
        return len(self.files)

    def sample(self, index: int, seed: int) -> dict[str, Tensor]:
        """Raises: CorruptSample: the file cannot be read, is not like the first one, or has NaN."""
        path = self.files[index]
        try:
            row = load_file(path)
        except (OSError, SafetensorError) as error:
            raise CorruptSample(str(path), str(error)) from None
        found = {name: tuple(value.shape) for name, value in row.items()}
        if found != self.shapes:
            raise CorruptSample(str(path), f"has {found}, the first file {self.shapes}")
        if bad := nonfinite(row):
            raise CorruptSample(str(path), f"NaN or infinity in {', '.join(bad)}")
        values = {name: value.float() for name, value in row.items()}
        return {"image": values.pop("latent"), "label": torch.tensor(index), **values}


def open_encoded(root: str, train: str, held_out: str, hold_out: int) -> tuple[Encoded, Encoded]:
    """Samples to train on, and held-out ones.

    Args:
        root: folder of files, searched recursively, or of the folders `train` and `held_out`.
        hold_out: without a folder `held_out` every so many-th file is held out; 0: all serve for both.
    Raises: ValueError: no folder or file, or a first file that cannot be read.
    """
    first, second = split_folders(root, train, held_out)
    files = _files(first)
    if second is not None:
        return Encoded(files), Encoded(_files(second))
    rest = [file for i, file in enumerate(files) if not hold_out or i % hold_out]
    if not rest:
        raise ValueError(f"text.hold_out: every {hold_out}-th of {len(files)} files leaves none to train on")
    return Encoded(rest), Encoded(files[:: hold_out or 1])


def _files(folder: Path) -> list[Path]:
    found = [
        folder / inside / file
        for inside, files in walk(folder)
        for file in files
        if file.endswith(".safetensors")
    ]
    if not found:
        raise ValueError(f"data.root: no encoded samples (*.safetensors) in {folder}")
    return sorted(found)


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"data: cannot read {path}: {error}") from None
    if "latent" not in shapes:
        raise ValueError(f"data: {path} has no tensor 'latent'; it has {', '.join(shapes) or 'none'}")
    return shapes
