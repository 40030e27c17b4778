"""What a checkpoint holds, told without building a model that costs memory."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

from visionhybrid.models import registry
from visionhybrid.models.checkpoint import loading
from visionhybrid.models.checkpoint.finite import nonfinite


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found. Everything is JSON-able (`dataclasses.asdict`)."""

    path: str
    kind: str  # "torch", "torch (old format)", "safetensors", "memory"
    container: str  # "" if the state dict is bare
    alternatives: tuple[str, ...]  # other entries with weights: `load(path, key=...)`
    other: tuple[str, ...]  # entries without weights
    prefix: str  # common prefix that was removed from all keys
    system: str | None  # None: nothing we know
    task: str | None
    options: dict[str, Any]  # keywords of the system's constructor
    names: tuple[str, ...]  # registered names of that architecture
    scale: int | None  # of a restorer
    deployed: bool
    tensors: int
    values: int  # numbers in all tensors, buffers included
    parameters: int | None  # trainable ones, as the built model counts them
    dtypes: dict[str, int]  # "float32" -> tensors
    nonfinite: dict[str, int]  # tensors with NaN or infinity -> how many
    keys: tuple[str, ...]  # the first few
    metadata: dict[str, str]
    problem: str = ""  # why `load` would refuse the file


def inspect(source: loading.Source, *, key: str | None = None, prefix: str | None = None) -> Inspection:
    """What a checkpoint holds and what `load` would make of it; builds no model that costs memory.

    Weights of an unknown architecture are described too (`system` is None, `problem` says so).

    Raises:
        ValueError: the file cannot be read, or holds no weights.
    """
    found = loading.find(source, key=key, prefix=prefix)
    options: dict[str, Any] = {}
    model, problem = None, ""
    try:
        options = loading.keywords(found, found.recorded)
        assert found.system is not None  # else `keywords` raised
        model = loading.outline(found, options)
        loading.require_finite(found, loading.fit(found, model))
    except ValueError as error:
        problem = str(error).removeprefix(f"{found.where}: ")
    known = found.system
    opened, unwrapped = found.opened, found.unwrapped
    return Inspection(
        path=found.where,
        kind=opened.kind,
        container=unwrapped.container,
        alternatives=unwrapped.alternatives,
        other=unwrapped.other,
        prefix=found.prefix,
        system=known.name if known else None,
        task=known.task if known else None,
        options=json.loads(json.dumps({k: v for k, v in options.items() if k != "deployed"})),
        names=tuple(registry.names_of(known, options)) if known and options else (),
        scale=getattr(model, "scale", None) if known and known.task == "restoration" else None,
        deployed=bool(options.get("deployed", False)),
        tensors=len(found.state),
        values=sum(t.numel() for t in found.state.values()),
        parameters=sum(p.numel() for p in model.parameters()) if model is not None else None,
        dtypes=dict(Counter(str(t.dtype).removeprefix("torch.") for t in found.state.values())),
        nonfinite=nonfinite(found.state),
        keys=tuple(list(found.state)[:4]),
        metadata=dict(opened.metadata),
        problem=problem,
    )
