"""Context parallelism: diffusers' `enable_parallelism` on models with mixers, and on models that it has no plan for.

    attach(flux, "clear")
    flux.transformer.enable_parallelism(config=ContextParallelConfig(ring_degree=8))  # under torchrun

diffusers' hooks cut tokens into runs, one a rank, and put the output together again, as a plan for the model says: its own
(`_cp_plan`: Flux, Wan), or that of the model's family here. A mixer exchanges what it needs over all ranks of the mesh
(`mixers/sharding.py`), so rings and Ulysses are the same to it; attention that keeps softmax is diffusers' matter where diffusers
has a plan, and refused elsewhere, since it would see its own rank's tokens only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from diffusers import ContextParallelConfig, ParallelConfig
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import init_device_mesh

if TYPE_CHECKING:
    from visionhybrid.hosts.layers import Layer

__all__ = ["GATHER", "TOKENS", "OnCPU", "Plan", "check", "group_of", "rotary"]

Plan = Mapping[str, Any]

# What a plan says of tokens (B, N, C) that go into a module, and of those that come out.
TOKENS = ContextParallelInput(split_dim=1, expected_dims=3)
GATHER = ContextParallelOutput(gather_dim=1, expected_dims=3)


def rotary(split_output: bool = False) -> ContextParallelInput:
    """What it says of the cosine or sine (N, D) of rotary embedding."""
    return ContextParallelInput(split_dim=0, expected_dims=2, split_output=split_output)


def group_of(holder: Any) -> ProcessGroup | None:
    """The ranks that share the sequence, by the `_parallel_config` that diffusers left on a processor or model.

    None: one rank has all of it.
    """
    config = holder._parallel_config
    context = None if config is None else config.context_parallel_config
    return None if context is None else context._flattened_mesh.get_group()


class OnCPU:
    """Lets a diffusers model share tokens on CPUs as well, over gloo."""

    def _resolve_parallel_config(self, config: Any) -> Any:
        if torch.accelerator.is_available() or not isinstance(config, ContextParallelConfig | ParallelConfig):
            return cast(Any, super())._resolve_parallel_config(config)
        # diffusers counts accelerators, and divides by their number
        whole = (
            config if isinstance(config, ParallelConfig) else ParallelConfig(context_parallel_config=config)
        )
        context = cast(Any, whole.context_parallel_config)
        mesh = context.mesh or init_device_mesh(
            "cpu", context.mesh_shape, mesh_dim_names=context.mesh_dim_names
        )
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        whole.setup(rank, ranks, torch.device("cpu"), mesh=mesh)
        cast(Any, self)._parallel_config = whole
        return whole


def check(model: Any, layers: list[Layer]) -> None:
    """ValueError for attention that would mix the tokens of its rank only."""
    for layer in layers:
        attn: Any = layer.module
        shares = model._cp_plan is not None and hasattr(attn.processor, "_parallel_config")
        if not (layer.whole or shares or getattr(attn.processor, "mixes", False)):
            why = f" ({layer.reason})" if layer.reason else "; attach 'softmax' to it"
            raise ValueError(
                f"enable_parallelism: {layer.name} has {type(attn.processor).__name__}, which would see its rank's tokens "
                f"only{why}"
            )
