"""`Attention` over images: the UNets of Stable Diffusion (1.5, 2.1, XL), DiT and PixArt.

The grid. `Transformer2DModel`, `DiTTransformer2DModel` and `PixArtTransformer2DModel` take a (B, C, H, W) map and hand
`cross_attention_kwargs` down to every attention. A hook on them adds the map's sides to that dictionary; a hook on attention
without a mixer takes it out again, since diffusers warns of keywords that a processor does not name. So the grid is an argument:
exact for any H and W, the same when a checkpointed block runs again, and nothing remains on the model. A mixer that ranks tokens
by the block's input before its norm (`metric`) gets that in the same way, from a hook on the block.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from visionhybrid.hosts.diffusers.arguments import Call, added, argument
from visionhybrid.hosts.diffusers.family import Family, Sides, as_pair, does_more, halved, layers_of
from visionhybrid.hosts.diffusers.parallel import GATHER, TOKENS, Plan, group_of
from visionhybrid.hosts.layers import Layer
from visionhybrid.mixers.sharding import mix

__all__ = ["FAMILIES", "MixerProcessor"]

# Attention in modules of these names runs along time; it is called attn1 as well.
TEMPORAL = {"motion_modules", "temp_attentions", "temporal_transformer_blocks"}
# Processors that compute plain softmax attention, each in its own way; any other does something a mixer would undo.
PLAIN = frozenset(
    {
        "AttnProcessor",
        "AttnProcessor2_0",
        "AttnProcessorNPU",
        "FusedAttnProcessor2_0",
        "SlicedAttnProcessor",
        "XFormersAttnProcessor",
        "XLAFlashAttnProcessor2_0",
    }
)


class MixerProcessor:
    """Runs `attn.mixer` where diffusers' `AttnProcessor2_0` would run softmax attention."""

    mixes = True
    _parallel_config: Any = None  # diffusers writes it when ranks share the tokens

    def __call__(
        self,
        attn: Any,  # an `Attention`, its fields wider than diffusers declares them
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        grid: tuple[int, ...] | None = None,
        metric: Tensor | None = None,
    ) -> Tensor:
        """(B, N, C), or a map (B, C, H, W), to the same shape.

        Args:
            grid: (H, W) of the N tokens. metric: the block's input before its norm, (B, N, C), for mixers that take it.
        """
        mixer, name = attn.mixer, attn.mixer.about.name
        if attention_mask is not None:
            raise ValueError(f"{name}: cannot honour a bias on softmax logits, which attention_mask is here")
        if encoder_hidden_states is not None:
            raise ValueError(f"{name}: mixes an image with itself, got encoder_hidden_states")
        group = None if hidden_states.ndim == 4 else group_of(self)  # maps are whole on every rank
        residual = x = hidden_states
        if attn.spatial_norm is not None:
            x = attn.spatial_norm(x, temb)
        if hidden_states.ndim == 4:
            grid = tuple(hidden_states.shape[2:])
            x = x.flatten(2).transpose(1, 2)  # (B, N, C)
        if grid is None:
            if mixer.about.grids or group is not None:
                raise ValueError(
                    f"{name}: needs (H, W) of {x.shape[1]} tokens, which this model did not tell"
                )
            grid = (x.shape[1],)
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)

        q, k, v = _project(attn, x)
        extra = {} if metric is None else {"metric": metric}
        out = mix(mixer, q, k, v, grid=grid, group=group, **extra).transpose(1, 2).flatten(2)
        del q, k, v  # what follows is the larger for them
        if hasattr(mixer, "beside"):
            out = out + mixer.beside(x, grid=grid, group=group)

        for layer in attn.to_out:
            out = layer(out)
        if hidden_states.ndim == 4:
            out = out.transpose(1, 2).reshape(residual.shape)
        if attn.residual_connection:
            out = out + residual
        return out if attn.rescale_output_factor == 1 else out / attn.rescale_output_factor


def _project(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, N, C) -> q, k, v as (B, heads, N, D), normed."""
    x_q, x_k = attn.mixer.hidden(x)
    q = attn.to_q(x_q)
    del x_q
    projected = q, attn.to_k(x_k), attn.to_v(x)
    q, k, v = (y.unflatten(2, (attn.heads, -1)).transpose(1, 2) for y in projected)
    return q if attn.norm_q is None else attn.norm_q(q), k if attn.norm_k is None else attn.norm_k(k), v


def _find(model: nn.Module, grid_of: Callable[[str], tuple[int, ...] | None]) -> list[Layer]:
    """Every `Attention` of `model`; `grid_of(name)` gives the sides of its map."""

    def facts(name: str, module: Any) -> dict[str, Any]:
        owner = model.get_submodule(name.rpartition(".")[0])
        whole = module.is_cross_attention or "transformer_blocks" not in name  # the others take maps
        return dict(grid=grid_of(name), beside=True, whole=whole, reason=_reason(name, module, owner))

    return layers_of(model, Attention, facts)


def _reason(name: str, attn: Attention, owner: nn.Module) -> str | None:
    """Why a mixer cannot take the place of this attention; None if it can."""
    if TEMPORAL.intersection(name.split(".")):
        return "temporal attention: its tokens are one pixel in all frames, not an image"
    if attn.is_cross_attention:
        return "cross attention: its keys are the text's"
    if attn.added_kv_proj_dim is not None or attn.only_cross_attention:
        return "keys of the text are added to the image's (added_kv_proj_dim)"
    if isinstance(owner, BasicTransformerBlock) and owner.attn2 is attn:
        return "second attention of its block: its keys are the text's where there is one"
    if type(owner).__name__ == "GatedSelfAttentionDense":
        return "grounding tokens are among the image's (GLIGEN)"
    if attn.inner_kv_dim != attn.inner_dim:
        return "grouped keys: fewer heads for keys than for queries"
    if attn.is_causal:
        return "causal attention"
    if attn.scale != (attn.inner_dim // attn.heads) ** -0.5:
        return f"its logits are scaled by {attn.scale}"
    return does_more(attn, PLAIN)


def _unet_layers(model: nn.Module, size: Sides) -> list[Layer]:
    config: Any = model.config
    size = size or as_pair(config.sample_size)
    sizes = [size]
    for block in model.down_blocks:  # pyright: ignore[reportGeneralTypeIssues]
        shrinks = getattr(block, "downsamplers", None) is not None
        padded = config.get("downsample_padding", 1) != 0
        sizes.append(halved(sizes[-1], padded) if sizes[-1] and shrinks else sizes[-1])
    levels = len(sizes) - 1

    def grid_of(name: str) -> tuple[int, ...] | None:
        part, number = (name + ".0").split(".")[:2]
        if part == "mid_block":
            return sizes[-1]
        return sizes[int(number) if part == "down_blocks" else levels - 1 - int(number)]

    return _find(model, grid_of)


def _transformer_layers(model: nn.Module, size: Sides) -> list[Layer]:
    config: Any = model.config
    size = size or as_pair(config.sample_size)
    grid = None if size is None else tuple(n // config.patch_size for n in size)
    return _find(model, lambda name: grid)


def _hooks(model: nn.Module, names: set[str]) -> list[Any]:
    """Tell attention under `names` what the modules around it see; see the top of this file."""
    handles = []
    for name, module in model.named_modules():
        position = next((place for cls, place in _KWARGS_AT.items() if isinstance(module, cls)), None)
        hook = None
        if position is not None:
            hook = partial(_add_grid, patch=_patch(module), position=position)
        elif isinstance(module, BasicTransformerBlock) and f"{name}.attn1" in names:
            mixer = module.attn1.get_submodule("mixer")
            hook = _add_metric if "metric" in inspect.signature(mixer.forward).parameters else None
        elif isinstance(module, Attention) and name not in names:
            hook = _drop
        if hook is not None:
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    return handles


_KWARGS = "cross_attention_kwargs"
# class -> its place among the arguments of forward
_KWARGS_AT = {Transformer2DModel: 5, DiTTransformer2DModel: 3, PixArtTransformer2DModel: 4}
_KWARGS_OF_BLOCK = 5


def _patch(module: Any) -> int:
    """Side of the square of the map that becomes one token."""
    if isinstance(module, Transformer2DModel):
        return module.patch_size if module.is_input_patches else 1
    return module.config.patch_size


def _add_grid(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, patch: int, position: int
) -> Call:
    sample = argument(args, kwargs, 0, "hidden_states")
    if sample.ndim != 4:  # discrete latents come as (B, N)
        return args, kwargs
    grid = sample.shape[2] // patch, sample.shape[3] // patch
    return added(args, kwargs, position, _KWARGS, {"grid": grid})


def _add_metric(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    metric = argument(args, kwargs, 0, "hidden_states")
    return added(args, kwargs, _KWARGS_OF_BLOCK, _KWARGS, {"metric": metric})


def _drop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    return args, {key: value for key, value in kwargs.items() if key not in ("grid", "metric")}


def _unet_plan(model: nn.Module) -> Plan:
    """Ranks share the tokens of each stack of transformer blocks; convolutions see the whole map on every rank."""
    if type(model).__name__ == "UNetMotionModel":
        raise ValueError("enable_parallelism: motion modules mix frames, which ranks do not share")
    plan: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, Transformer2DModel):
            blocks, last = f"{name}.transformer_blocks", len(module.transformer_blocks) - 1
            plan[f"{blocks}.0"] = {"hidden_states": TOKENS}
            # A plan has one entry for a module: where the first block is the last one it needs a second name.
            plan[f"{blocks}.{last or '*'}"] = GATHER
    if not plan:
        raise ValueError("enable_parallelism: there are no transformer blocks whose tokens ranks could share")
    return plan


def _transformer_plan(model: nn.Module) -> Plan:
    head = "proj_out" if hasattr(model, "proj_out") else "proj_out_2"  # PixArt's, DiT's
    return {"transformer_blocks.0": {"hidden_states": TOKENS}, head: GATHER}


SAME = dict(processor=lambda module: MixerProcessor(), hooks=_hooks, plain=PLAIN)
FAMILIES = (
    Family(
        models=("UNet2DConditionModel", "UNet2DModel", "UNetMotionModel"),
        layers=_unet_layers,
        cp_plan=_unet_plan,
        **SAME,
    ),
    Family(
        models=("DiTTransformer2DModel", "PixArtTransformer2DModel"),
        layers=_transformer_layers,
        cp_plan=_transformer_plan,
        **SAME,
    ),
)
