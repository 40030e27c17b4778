"""`HybridDiT`: a diffusion transformer for images of classes, whose blocks take any registered mixer.

The skeleton is DiT's (arXiv:2212.09748): patches, sine-cosine positions, adaLN-zero. What LiT (arXiv:2501.12976) and SANA
(arXiv:2410.10629) change about it are options: the `linear` mixer with few heads and a depthwise convolution on the values,
Mix-FFN instead of the MLP, one modulation shared by all blocks, RMS norm of queries and keys.

A diffusers model: `save_pretrained`, `from_pretrained`, gradient checkpointing, peft, offload and diffusers' schedulers apply.
Unlike diffusers' DiT the embedding of time and class is computed once and not in every block, and any image size that is a
multiple of the patch works: positions are stretched to the grid of `sample_size`, on which the model is trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps, get_2d_sincos_pos_embed
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from visionhybrid import mixers
from visionhybrid.diffusion.feed_forward import FEED_FORWARD, Grid
from visionhybrid.hosts.diffusers.parallel import GATHER, TOKENS, OnCPU, group_of
from visionhybrid.mixers.projection import Projection
from visionhybrid.mixers.sharding import mix


class MixedAttention(nn.Module):
    """Projections around a mixer: (B, N, C) of an image of `grid` patches -> (B, N, C)."""

    def __init__(self, dim: int, heads: int, mixer: str, options: Mapping[str, Any], qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (Projection(dim, dim) for _ in range(3))
        norm = nn.RMSNorm if qk_norm else nn.Identity
        self.norm_q, self.norm_k = (norm(dim, eps=1e-5) for _ in range(2))
        self.mixer = mixers.create(mixer, dim=dim, heads=heads, head_dim=dim // heads, **options)
        self.to_out = Projection(dim, dim)

    def forward(self, x: Tensor, grid: Grid, group: ProcessGroup | None = None) -> Tensor:
        x_q, x_k = self.mixer.hidden(x)
        q, k, v = self.norm_q(self.to_q(x_q)), self.norm_k(self.to_k(x_k)), self.to_v(x)
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))  # (B, heads, N, D)
        out = mix(self.mixer, q, k, v, grid=grid, group=group).transpose(1, 2).flatten(2)
        if hasattr(self.mixer, "beside"):
            out = out + self.mixer.beside(x, grid=grid, group=group)
        return self.to_out(out)


class Block(nn.Module):
    """x + gate attention(modulated norm(x)), then the same with the feed-forward network.

    `modulation` (B, 6, C), shift, scale and gate of the two, is added to a table of the block where all blocks share it,
    and computed from the condition (B, C) where each has its own layer.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        mixer: str,
        options: Mapping[str, Any],
        *,
        feed_forward: nn.Module,
        qk_norm: bool,
        shared: bool,
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6) for _ in range(2))
        self.attn = MixedAttention(dim, heads, mixer, options, qk_norm)
        self.mlp = feed_forward
        self.modulation = None if shared else Projection(dim, 6 * dim)
        self.table = nn.Parameter(torch.zeros(6, dim)) if shared else None

    def forward(self, x: Tensor, condition: Tensor, grid: Grid, group: ProcessGroup | None = None) -> Tensor:
        if self.modulation is not None:
            values = self.modulation(condition).unflatten(1, (6, -1))
        else:
            values = condition + self.table
        shift1, scale1, gate1, shift2, scale2, gate2 = values.to(x.dtype).unsqueeze(2).unbind(1)  # (B, 1, C)
        x = torch.addcmul(x, gate1, self.attn(modulated(self.norm1, x, shift1, scale1), grid, group))
        return torch.addcmul(x, gate2, self.mlp(modulated(self.norm2, x, shift2, scale2), grid, group))


# Tokens of an image from which on a layer norm for each image is cheaper than one for all and its modulation, on a CPU.
MANY = 128


def modulated(norm: nn.LayerNorm, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """norm(x) (1 + scale) + shift for x (B, N, C), shift and scale (B, 1, C).

    Of one image that is a layer norm with these as weights, which writes and keeps nothing else as long as the sequence: on a
    CPU a third of the time at 4096 tokens, forward and backward.
    """
    alone = x.device.type == "cpu" and x.shape[1] >= MANY and x.dtype == shift.dtype
    if not alone or torch.compiler.is_compiling():
        return torch.addcmul(shift, norm(x), 1 + scale)
    size, weight = norm.normalized_shape, 1 + scale
    if len(x) == 1:
        return F.layer_norm(x, size, weight[0, 0], shift[0, 0], norm.eps)
    images = zip(x.unbind(), weight[:, 0].unbind(), shift[:, 0].unbind(), strict=True)
    return torch.stack([F.layer_norm(image, size, a, b, norm.eps) for image, a, b in images])


class HybridDiT(OnCPU, ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Predicts noise, velocity or flow of an image, pixels or latents, given time and class.

    Args:
        sample_size: side of the images it is made for, in pixels of its input; other sizes work, see above.
        in_channels, out_channels: of its input and output; `out_channels` None: as many as come in (twice as many, as in DiT, to
            predict a variance too).
        patch_size: side of a patch.
        num_layers, num_attention_heads, attention_head_dim: of the transformer; its width is heads times head dim.
        num_classes: classes that can be asked for; one more, the number `num_classes`, means "any" and is what guidance
            compares with. 0: unconditional.
        mixer: name of a registered mixer for all blocks, or one name for each (`visionhybrid.mixers.list_mixers()`).
        mixer_options: mixer name -> keywords of its construction; or number of a block, "3", where that differs.
        feed_forward: "mlp" (DiT), "mix_ffn" (SANA) or "hyena" (grafting), for all blocks or one for each.
        mlp_ratio: hidden width over width (4, 2.5, 2 there), likewise.
        shared_modulation: one modulation layer for all blocks, and a table in each (SANA, PixArt).
        qk_norm: RMS norm of queries and keys over the whole width (SANA 1.5).
    Raises:
        ValueError: options that make no model, an unknown mixer.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["Block"]
    _repeated_blocks: ClassVar[list[str]] = ["Block"]
    _skip_layerwise_casting_patterns: ClassVar[list[str]] = ["patch", "norm", "embed", "modulation"]
    _cp_plan: ClassVar[dict[str, Any]] = {"blocks.0": {"x": TOKENS}, "head": GATHER}

    @register_to_config
    def __init__(
        self,
        *,
        sample_size: int = 32,
        in_channels: int = 4,
        out_channels: int | None = None,
        patch_size: int = 2,
        num_layers: int = 12,
        num_attention_heads: int = 6,
        attention_head_dim: int = 64,
        num_classes: int = 1000,
        mixer: str | Sequence[str] = "softmax",
        mixer_options: Mapping[str, Mapping[str, Any]] | None = None,
        feed_forward: str | Sequence[str] = "mlp",
        mlp_ratio: float | Sequence[float] = 4.0,
        shared_modulation: bool = False,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        names, networks, ratios = (
            _each(name, value, num_layers)
            for name, value in dict(mixer=mixer, feed_forward=feed_forward, mlp_ratio=mlp_ratio).items()
        )
        options = mixer_options or {}
        _check(sample_size, patch_size, names, options, networks)
        dim = num_attention_heads * attention_head_dim
        self.out_channels = out_channels or in_channels
        self.gradient_checkpointing = False
        self.patch = nn.Conv2d(in_channels, dim, patch_size, patch_size)
        self.time = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embed = TimestepEmbedding(256, dim)
        self.class_embed = nn.Embedding(num_classes + 1, dim) if num_classes else None
        self.shared = Projection(dim, 6 * dim) if shared_modulation else None
        side = sample_size // patch_size
        self.register_buffer("positions", _positions(dim, (side, side), side), persistent=False)
        self.blocks = nn.ModuleList(
            Block(
                dim,
                num_attention_heads,
                name,
                options.get(str(i), options.get(name, {})),
                feed_forward=FEED_FORWARD[networks[i]](dim, ratios[i], tokens=side * side),
                qk_norm=qk_norm,
                shared=shared_modulation,
            )
            for i, name in enumerate(names)
        )
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.modulation = Projection(dim, 2 * dim)
        self.head = Projection(dim, patch_size**2 * self.out_channels)
        self._initialise()

    def _initialise(self) -> None:
        """DiT's: every block starts as the identity, the output as zero. A mixer's own parameters keep their own start."""
        own = {id(m) for block in self.blocks for m in block.attn.mixer.modules()}
        for module in self.modules():
            if isinstance(module, nn.Linear) and id(module) not in own:
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch.weight.flatten(1))
        nn.init.zeros_(self.patch.bias)
        for embedding in (self.time_embed.linear_1, self.time_embed.linear_2, self.class_embed):
            if embedding is not None:
                nn.init.normal_(embedding.weight, std=0.02)
        zero = [self.modulation, self.head, self.shared, *(block.modulation for block in self.blocks)]
        for layer in zero:
            if layer is not None:
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """What the model predicts of noised images.

        Args:
            hidden_states: (B, in_channels, H, W), H and W multiples of the patch.
            timestep: (B,) or one for all, from 0 (clean) to 1000 (noise), whole or not.
            class_labels: (B,) int64; None only for an unconditional model.
        Returns: `.sample` (B, out_channels, H, W).
        Raises:
            ValueError: a size that is no multiple of the patch; labels missing or too many.
        """
        size = self.config.patch_size
        batch, _, height, width = hidden_states.shape
        if height % size or width % size:
            raise ValueError(f"HybridDiT: height and width must be multiples of {size}, got {height}x{width}")
        grid = height // size, width // size
        # (B, N, C), also in memory: every sum in the blocks has the strides of its first term
        x = self.patch(hidden_states).flatten(2).transpose(1, 2).contiguous()
        x = x + self._positions(grid, x)
        condition = F.silu(self._condition(timestep, class_labels, batch, x))
        given = condition if self.shared is None else self.shared(condition).unflatten(1, (6, -1))
        group = group_of(self)
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, x, given, grid, group)
            else:
                x = block(x, given, grid, group)
        shift, scale = self.modulation(condition).to(x.dtype).unsqueeze(1).chunk(2, dim=2)
        x = self.head(modulated(self.norm, x, shift, scale))  # (B, N, size * size * C_out)
        x = x.view(batch, *grid, size, size, self.out_channels).permute(0, 5, 1, 3, 2, 4)
        x = x.reshape(batch, self.out_channels, height, width)
        return Transformer2DModelOutput(sample=x) if return_dict else (x,)

    def grid_of(self, size: tuple[int, ...] | None = None) -> Grid:
        """Sides of the token grid for an input of `size`; of `sample_size` by default."""
        height, width = size or (self.config.sample_size,) * 2
        return height // self.config.patch_size, width // self.config.patch_size

    def note_mixers(self) -> None:
        """Make the config say which mixers the blocks have now, after `visionhybrid.attach`."""
        now = [block.attn.mixer for block in self.blocks]
        options: dict[str, Any] = {}
        for i, mixer in enumerate(now):
            if options.setdefault(mixer.about.name, mixer.options) != mixer.options:
                options[str(i)] = mixer.options
        self.register_to_config(mixer=[m.about.name for m in now], mixer_options=options)

    def _positions(self, grid: Grid, like: Tensor) -> Tensor:
        side = self.config.sample_size // self.config.patch_size
        if grid == (side, side):
            return self.positions.to(like.dtype)
        return _positions(like.shape[2], grid, side, like.device).to(like.dtype)

    def _condition(self, timestep: Tensor | float, labels: Tensor | None, batch: int, like: Tensor) -> Tensor:
        time = torch.as_tensor(timestep, device=like.device).reshape(-1).expand(batch)
        condition = self.time_embed(self.time(time).to(like.dtype))
        if (labels is None) != (self.class_embed is None):
            kind = "needs class_labels" if labels is None else "is unconditional and takes no class_labels"
            raise ValueError(f"HybridDiT: this model {kind}")
        return condition if self.class_embed is None else condition + self.class_embed(labels)


def _each(what: str, value: Any, count: int) -> list[Any]:
    """One value for each block."""
    values = [value] * count if isinstance(value, str | int | float) else list(value)
    if len(values) != count:
        raise ValueError(
            f"HybridDiT: {what} needs one value for each of the {count} blocks, got {len(values)}"
        )
    return values


def _check(
    sample_size: int,
    patch_size: int,
    names: Sequence[str],
    options: Mapping[str, Any],
    networks: Sequence[str],
) -> None:
    if sample_size % patch_size:
        raise ValueError(
            f"HybridDiT: sample_size {sample_size} must be a multiple of patch_size {patch_size}"
        )
    if unused := sorted(set(options) - set(names) - {str(i) for i in range(len(names))}):
        raise ValueError(f"HybridDiT: mixer_options for {unused[0]!r}, but no block has that mixer")
    for name in networks:
        if name not in FEED_FORWARD:
            raise ValueError(f"HybridDiT: feed_forward is one of {', '.join(FEED_FORWARD)}, got {name!r}")


def _positions(dim: int, grid: Grid, base: int, device: torch.device | None = None) -> Tensor:
    """Sine-cosine positions (1, N, dim) of `grid`, in units of a `base` x `base` one."""
    table = get_2d_sincos_pos_embed(dim, grid, base_size=base, device=device, output_type="pt")
    return table.float().unsqueeze(0)
