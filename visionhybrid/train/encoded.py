"""Encoding clips for training on data that come encoded (`data.dataset=encoded`).

encode_clips("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "clips/", "encoded/", frames=81, height=480, width=832)
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageSequence
from safetensors.torch import save
from torch import Tensor

from visionhybrid.data.images import atomic
from visionhybrid.data.scan import find_pictures
from visionhybrid.diffusion.denoisers import family_of, open_any
from visionhybrid.infer.progress import bar


@torch.no_grad()
def encode_clips(
    pipeline: str,
    clips: str | Path,
    out: str | Path,
    *,
    frames: int,
    height: int,
    width: int,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> list[Path]:
    """Latents and captions of clips, a file for each; those that exist are kept, so the same call continues.

    Args:
        pipeline: of a video model: its autoencoder and text encoder are used.
        clips: folder of clips: folders of frames in the order of their names, or animated pictures (GIF, WebP, PNG); the caption
            of NAME is in NAME.txt beside it.
        frames: of a clip, the first ones; 4 n + 1 for Wan. height, width: of a frame; it is resized to cover them, then cut.
    Raises: ValueError: no clips, one without a caption or with too few frames.
    """
    found = sorted(
        p for p in Path(clips).iterdir() if p.is_dir() or p.suffix.lower() in (".gif", ".webp", ".png")
    )
    if not found:
        raise ValueError(f"encode_clips: no clips in {clips}")
    pipe = open_any(pipeline, transformer=None)
    family, config = family_of(pipe), pipe.vae.config
    mean, std = (torch.tensor(x).view(-1, 1, 1, 1) for x in (config.latents_mean, config.latents_std))
    pipe.to(device)
    done = []
    with bar(progress, "encoding clips") as update:
        for number, clip in enumerate(found):
            path = Path(out) / f"{clip.stem}.safetensors"
            if not path.is_file():
                pictures = _frames(clip, frames)
                video = pipe.video_processor.preprocess_video(
                    [_cover(picture, height, width) for picture in pictures], height=height, width=width
                )
                latent = pipe.vae.encode(video.to(device, pipe.vae.dtype)).latent_dist.mode()[0].float().cpu()
                latent = (latent - mean) / std
                rows = family.encode([_caption(clip)])
                row = {name: value[0].float().cpu() for name, value in rows.items()}
                _write(path, {"latent": latent, **row})
            done.append(path)
            update((number + 1) / len(found))
    return done


def _frames(clip: Path, count: int) -> list[Image.Image]:
    if clip.is_dir():
        names = find_pictures(clip)[:count]
        pictures = [Image.open(clip / name).convert("RGB") for name in names]
    else:
        with Image.open(clip) as image:
            pictures = [frame.convert("RGB") for frame in ImageSequence.Iterator(image)][:count]
    if len(pictures) < count:
        raise ValueError(f"encode_clips: {clip} has {len(pictures)} frames, {count} are needed")
    return pictures


def _cover(image: Image.Image, height: int, width: int) -> Image.Image:
    """Resized until it covers `height` x `width`, then its middle."""
    factor = max(height / image.height, width / image.width)
    wide, tall = max(width, round(image.width * factor)), max(height, round(image.height * factor))
    left, top = (wide - width) // 2, (tall - height) // 2
    resized = image.resize((wide, tall), Image.Resampling.BICUBIC)
    return resized.crop((left, top, left + width, top + height))


def _caption(clip: Path) -> str:
    path = clip.with_suffix(".txt")
    if not path.is_file():
        raise ValueError(f"encode_clips: {clip} has no caption, {path.name}")
    return path.read_text(encoding="utf-8").strip()


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as file:
        file.write(save({name: value.contiguous() for name, value in tensors.items()}))
