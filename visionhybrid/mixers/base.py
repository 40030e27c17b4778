"""What every mixer shares: the module's contract, its cost, and how its class is described."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from visionhybrid.mixers.sharding import Shards

__all__ = [
    "About",
    "Cost",
    "Halo",
    "Mixer",
    "attention_cost",
    "crossover",
    "linear_cost",
    "local_cost",
    "per_axis",
    "text_rows",
]


@dataclass(frozen=True)
class Cost:
    """One forward pass over one sample. `bytes` counts what has to be read and written at least once."""

    macs: int
    bytes: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.macs + other.macs, self.bytes + other.bytes)

    def seconds(self, macs_per_second: float, bytes_per_second: float) -> float:
        """The roofline's bound: arithmetic or memory, whichever is slower."""
        return max(self.macs / macs_per_second, self.bytes / bytes_per_second)


@dataclass(frozen=True)
class Halo:
    """What image tokens of some rows need beside those rows. Rows are places on the grid's first axis."""

    rows: int  # before and after
    multiple: int = 1  # the first row taken is one of it, so that cuts between windows stay where they are

    def around(self, first: int, last: int, side: int) -> tuple[int, int]:
        """The rows `start <= y < stop` whose tokens give rows `first <= y < last` of `side` exactly."""
        start = max(0, first - self.rows) // self.multiple * self.multiple
        return start, min(side, last + self.rows)


@dataclass(frozen=True, kw_only=True)
class About:
    """A registered mixer: where it comes from, and what it needs of its host."""

    name: str
    mixer: type[Mixer]
    purpose: str  # one line
    paper: str
    source: str  # code whose numbers it gives, owner/repo@commit; empty where there is none
    license: str  # of that code
    grids: tuple[int, ...]  # numbers of axes a grid may have: (2,), (2, 3); empty if the grid does not matter
    text: bool  # joint sequences [text, image] are welcome
    masks: bool  # `forward` takes `key_mask`, (B, N) bool, True for real keys
    parameters: bool  # has parameters of its own (under its default options)
    training_free: bool  # meant to replace softmax in a trained model without training
    options: dict[str, Any]  # name -> default


class Mixer(nn.Module):
    """Mixes tokens: `forward(q, k, v, *, grid, text_tokens=0)`, `(B, heads, N, D)` -> `(B, heads, N, D)`.

    q and k come after rotary embedding and norms. The sequence is `[text, image]`: first `text_tokens` tokens without a place
    (text, class or register tokens), then `prod(grid)` image tokens in row-major order, `grid` being `(H, W)` or `(T, H, W)`.
    A mixer with `about.masks` also takes `key_mask`, (B, N) bool, True for keys that count.

    A mixer that changes the hidden states before the projections does that in `hidden`. One that adds something
    made of them to the output, before its projection, has `beside(x, grid=, text_tokens=)`, (B, N, dim) -> (B, N, dim).

    Args:
        dim: channels of the hidden states. heads, head_dim: of q, k, v.
        scale: of the logits, `head_dim ** -0.5` if None. Mixers without logits have no such option.
    """

    about: ClassVar[About]
    # For the sides of the grid though it needs none: set where another mixer is run on its inputs.
    asks = False
    # JSON-able; `create(name, dim=, heads=, head_dim=, **options)` builds the same module.
    options: dict[str, Any]

    def __init__(self, *, dim: int, heads: int, head_dim: int, scale: float | None = None) -> None:
        super().__init__()
        self.dim, self.heads, self.head_dim, self.scale = dim, heads, head_dim, scale

    def hidden(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, dim) -> what goes to the projections of q and of k; x itself where that is all."""
        return x, x

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, grid: Sequence[int], text_tokens: int = 0
    ) -> Tensor:
        raise NotImplementedError

    def sharded(self, q: Tensor, k: Tensor, v: Tensor, *, shards: Shards) -> Tensor:
        """`forward` where ranks share a sequence: what it gives for this rank's tokens, (B, heads, n, D); see `sharding.py`."""
        raise ValueError(f"{self.about.name}: knows one process, its sequence cannot be shared by ranks")

    def cost(self, *, grid: Sequence[int], text_tokens: int = 0, bytes_per: int = 2) -> Cost:
        """Of `forward` (and `hidden`) on one sample, as a function of length.

        Args:
            grid: sides of the image in tokens, or `(tokens,)` for a mixer that does not mind.
            bytes_per: size of an element.
        """
        raise NotImplementedError

    def halo(self, grid: Sequence[int]) -> Halo | None:
        """How far image tokens see along the grid's first axis; None where they need all of it.

        A rank that holds some rows asks its neighbours for no more: mixing the rows `halo.around(...)` and keeping its own gives
        what mixing the whole grid gives. (Text tokens still need everything.)
        """
        return None

    def check(self, q: Tensor, k: Tensor, v: Tensor, grid: Sequence[int], text_tokens: int) -> None:
        """ValueError unless the operands agree with each other, with the grid and with this mixer."""
        name, about = self.about.name, self.about
        shapes = [tuple(x.shape) for x in (q, k, v)]
        # Where the grid does not matter, keys may be others than the queries' own tokens.
        same = q.shape == k.shape if about.grids else q.shape[:2] == k.shape[:2] and q.shape[3] == k.shape[3]
        if q.ndim != 4 or k.ndim != 4 or not same or v.shape[:3] != k.shape[:3]:
            raise ValueError(f"{name}: q, k, v must be (B, heads, N, D) alike, got {shapes}")
        if q.shape[3] != self.head_dim:
            raise ValueError(f"{name}: built for head dim {self.head_dim}, got {q.shape[3]}")
        if about.grids and len(grid) not in about.grids:
            raise ValueError(
                f"{name}: grid must have {' or '.join(map(str, about.grids))} axes, got {tuple(grid)}"
            )
        if text_tokens < 0 or q.shape[2] != text_tokens + prod(grid):
            raise ValueError(
                f"{name}: {q.shape[2]} tokens are not {text_tokens} of text and a grid of {tuple(grid)}"
            )
        if text_tokens and not about.text:
            raise ValueError(f"{name}: cannot mix joint text tokens, got {text_tokens}")

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in getattr(self, "options", {}).items())


def text_rows(q: Tensor, k: Tensor, v: Tensor, text_tokens: int, scale: float | None) -> Tensor:
    """What the text queries of a joint sequence get in a local mixer: softmax over all tokens, (B, heads, text, D)."""
    return F.scaled_dot_product_attention(q[:, :, :text_tokens], k, v, scale=scale)


def per_axis(owner: str, name: str, value: Any, axes: int) -> list[Any]:
    """One value for each of `axes` axes, given one for all or a list. ValueError for a list of another length."""
    values = list(value) if isinstance(value, list | tuple) else [value] * axes
    if len(values) != axes:
        raise ValueError(f"{owner}: {name} needs one value, or one for each of the {axes} axes, got {value}")
    return values


def attention_cost(pairs: int, tokens: int, mixer: Mixer, bytes_per: int) -> Cost:
    """Softmax attention of `pairs` queries and keys: two products; q, k, v read and the output written once."""
    width = mixer.heads * mixer.head_dim
    return Cost(macs=2 * pairs * width, bytes=4 * tokens * width * bytes_per)


def local_cost(image: int, text: int, keys: int, mixer: Mixer, bytes_per: int) -> Cost:
    """`image` queries see `keys` image tokens (or all there are) and the text, text queries see everything."""
    tokens = image + text
    pairs = image * (min(keys, image) + text) + text * tokens
    return attention_cost(pairs, tokens, mixer, bytes_per)


def linear_cost(queries: int, keys: int, mixer: Mixer, bytes_per: int) -> Cost:
    """Linear attention: one D x D state and its normaliser a head, made from the keys and applied to the queries."""
    width, D = mixer.heads * mixer.head_dim, mixer.head_dim
    moved = 2 * (queries + keys) * width * bytes_per
    return Cost(macs=keys * width * D + queries * width * (D + 1), bytes=moved + 8 * width * (D + 1))


def crossover(mixer: Mixer, *, text_tokens: int = 0) -> int | None:
    """Image tokens of the smallest square grid on which `mixer` multiplies less than softmax attention; None up to 1024 x 1024.

    Networks of its own are counted. Time crosses later, since full attention runs at a machine's best speed.
    """

    def cheaper(side: int) -> bool:
        tokens = side * side + text_tokens
        full = attention_cost(tokens * tokens, tokens, mixer, 2)
        return mixer.cost(grid=(side, side), text_tokens=text_tokens).macs < full.macs

    sides = range(1, 1025)
    found = bisect_left(sides, True, key=cheaper)
    return sides[found] ** 2 if found < len(sides) else None
