"""Filling a store: images and captions are encoded once, by all processes of a run together, before it begins."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn

from visionhybrid.data.classification import LabelledImages
from visionhybrid.data.errors import CorruptSample
from visionhybrid.data.latents import Cut, Latents, image_key
from visionhybrid.data.store import Rows, Store, digest
from visionhybrid.diffusion.autoencoder import Autoencoder
from visionhybrid.infer.progress import bar
from visionhybrid.train.config import Cache

DTYPES = {"float32": torch.float32, "float16": torch.float16}

Row = dict[str, Tensor]


class Stores:
    """The stores of a run: each is opened, and its files read through, once, however many data sets it serves.

    Args:
        notes: gets a line for whatever is damaged, or cannot be encoded.
    """

    def __init__(self, cache: Cache, notes: list[str]) -> None:
        self.cache, self.notes = cache, notes
        self._open: dict[Path, Store] = {}

    def open(self, kind: str, **facts: Any) -> Store:
        store = Store(self.cache.folder, {"kind": kind, "precision": self.cache.precision, **facts})
        if store.folder not in self._open:
            self.notes += store.scan()
            self._open[store.folder] = store
        return self._open[store.folder]


def encode_images(
    images: LabelledImages, vae: Autoencoder, size: int, stores: Stores, *, flip: float, draw: str
) -> Latents:
    """The latents of `images` at `size` pixels; those that the cache lacks are encoded.

    Raises: StoreError: the cache cannot be written, or rows of another process are not there. ValueError: no image can be read.
    """
    found = _Images(images, vae, size, stores, views=2 if flip else 1)
    found.encode_all(stores.cache.batch)
    if problems := found.problems:
        first = problems[min(problems)]
        stores.notes.append(
            f"{len(problems)} of {len(images)} images cannot be read and are left out, first {first}"
        )
    if not found.keys:
        raise ValueError(f"data: none of {len(images)} images can be read")
    rows = found.store.rows([found.keys.get(index) for index in range(len(images))])
    labels = [found.labels.get(index, -1) for index in range(len(images))]
    stochastic = vae.stochastic
    return Latents(images.classes, rows, labels, vae.affine, stochastic=stochastic, draw=draw, flip=flip)


class _Images:
    """Images on their way into a store. `keys`, `labels` and `problems`: what is known of each by its number."""

    def __init__(
        self, images: LabelledImages, vae: Autoencoder, size: int, stores: Stores, views: int
    ) -> None:
        self.images, self.vae, self.cut, self.views = images, vae, Cut(size), views
        self.precision = stores.cache.precision
        self.store = stores.open(
            "latents",
            vae=vae.fingerprint,
            image=f"{images.mode}, shorter side {size} bicubic, central square",
            views=["plain", "mirrored"][:views],
        )
        self.keys: dict[int, str] = {}
        self.labels: dict[int, int] = {}
        self.problems: dict[int, CorruptSample] = {}

    def encode_all(self, batch: int) -> None:
        wanted = [index for index in range(len(self.images)) if not self.remembered(index)]
        with on_device(self.vae.net):
            fill(self.store, wanted, self.look, self.encode, batch=batch, what="encoding images")
        for index in wanted:
            known = index in self.keys or index in self.problems
            if not known and not self.remembered(index):
                self.look(index)  # another process encoded it, and its source has no stamps

    def remembered(self, index: int) -> bool:
        """Whether the store has this image, as far as can be said without reading it."""
        known = self.images.source.peek(index)
        key = self.store.stamps.get(known[0]) if known else None
        if known is None or key is None or key not in self.store or known[1] < 0:
            return False
        self.keys[index], self.labels[index] = key, known[1]
        return True

    def look(self, index: int) -> tuple[str, Any] | None:
        """Key and image."""
        try:
            image, self.labels[index] = self.images.read(index)
        except CorruptSample as error:
            self.problems[index] = error
            return None
        self.keys[index] = key = image_key(image)
        known = self.images.source.peek(index)
        self.store.note(known[0] if known else "", key)
        return key, image

    def encode(self, batch: list[Any]) -> list[Row]:
        pixels = torch.stack([self.cut(image) for image in batch]).to(self.vae.net.device)
        both = [pixels, pixels.flip(3)][: self.views]
        found = {
            "moments": torch.stack([self.vae.moments(view) for view in both], 1),  # (B, views, C, h, w)
            "size": torch.tensor([image.size[::-1] for image in batch]),
            "corner": torch.tensor([self.cut.corner(image) for image in batch]),
        }
        return _rows(found, self.precision)


class Texts:
    """Encoded captions by number; the number after the last is that of no caption."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __getitem__(self, number: int) -> Row:
        """Raises: StoreError: its row was damaged since."""
        row = self.rows[number]
        assert row is not None  # every caption has one
        return {name: value.float() if value.is_floating_point() else value for name, value in row.items()}


def encode_captions(
    captions: Sequence[str],
    encode: Callable[[list[str]], Row],
    nothing: Callable[[], Row],
    stores: Stores,
    facts: dict[str, Any],
) -> Texts:
    """`captions` encoded, and after the last one what stands for none.

    Args:
        encode: texts -> tensors with a row for each. nothing: the same for no text. facts: what the rows depend on.
    """
    store, cache = stores.open("captions", **facts), stores.cache
    keys = [digest(b"caption", text.encode()) for text in captions] + [digest(b"nothing")]

    def work(batch: list[Any]) -> list[Row]:
        texts = [text for text in batch if text is not None]
        parts = [encode(texts)] if texts else []
        parts += [nothing()] if len(texts) < len(batch) else []
        return [row for part in parts for row in _rows(part, cache.precision)]

    first = dict(zip(reversed(keys), reversed(range(len(keys))), strict=True))
    wanted = [index for key, index in first.items() if key not in store]
    items: list[str | None] = [*captions, None]
    # no caption is last in every process's share, so that its row is last in its batch
    fill(
        store,
        sorted(wanted),
        lambda i: (keys[i], items[i]),
        work,
        batch=cache.batch,
        what="encoding captions",
    )
    return Texts(store.rows(keys))


def _rows(found: Row, precision: str) -> list[Row]:
    """Tensors with a row for each -> their rows, as they are stored."""
    dtype = DTYPES[precision]
    kept = {name: v.to(dtype) if v.is_floating_point() else v.long() for name, v in found.items()}
    if bad := [name for name, value in kept.items() if not value.isfinite().all()]:
        raise ValueError(f"cache.precision: {bad[0]} of an encoder is not finite in {precision}")
    return [dict(zip(kept, values, strict=True)) for values in zip(*kept.values(), strict=True)]


def fill(
    store: Store,
    wanted: Sequence[int],
    look: Callable[[int], tuple[str, Any] | None],
    encode: Callable[[list[Any]], list[Row]],
    *,
    batch: int,
    what: str,
) -> None:
    """Add what `store` lacks, each process its share of `wanted`; afterwards every process sees all.

    Args:
        look: number -> key and what is to be encoded; None: nothing. encode: so many of these -> their rows.
    """
    state = PartialState()
    # by number, not by place in the list: another run may fill the store too, so lists may differ
    mine = [index for index in wanted if index % state.num_processes == state.process_index]
    waiting: dict[str, Any] = {}

    def work() -> None:
        for key, row in zip(waiting, encode([*waiting.values()]), strict=True):
            store.add(key, row)
        waiting.clear()

    with bar(state.is_main_process, what) as update, torch.no_grad():
        for done, index in enumerate(mine):
            found = look(index)
            if found is not None and found[0] not in store:
                waiting[found[0]] = found[1]
            if len(waiting) == batch:
                work()
            update(done / len(mine))
        if waiting:
            work()
        store.flush()
    state.wait_for_everyone()
    store.scan()


@contextmanager
def on_device(*nets: nn.Module) -> Iterator[None]:
    """`nets` are on this process's device inside, on the CPU outside."""
    for net in nets:
        net.to(PartialState().device)
    try:
        yield
    finally:
        for net in nets:
            net.to("cpu")
