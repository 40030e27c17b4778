"""The model card that a run writes at its end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from visionhybrid.train.config import Config, flat


def text(config: Config, result: dict[str, Any], environment: dict[str, Any]) -> str:
    """Markdown: what was trained on what, the numbers measured, and how to get them again."""

    def table(rows: dict[str, Any]) -> str:
        return "| | |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in rows.items())

    metrics = {name: f"{value:.4f}" for name, value in result["metrics"].items()}
    return "\n".join(
        [
            f"# {config.name}",
            "",
            f"{config.task} with `{config.model.name}`: {result['steps']} steps in {result['seconds']:.0f} s "
            f"on {result['train_samples']} training samples.",
            f"Load: {_how_to_load(Path(result['weights']))}. Run again: `visionhybrid train config.json`.",
            "",
            "## Measured on held-out data at the end",
            "",
            table(metrics),
            "## Config",
            "",
            table({f"`{name}`": f"`{value}`" for name, value in flat(config).items()}),
            "## Environment",
            "",
            table(environment),
        ]
    )


def _how_to_load(weights: Path) -> str:
    """A file of `visionhybrid.load`, or the folder of a generator's pipeline."""
    index = weights / "model_index.json"
    if not index.is_file():
        return f'`visionhybrid.load("{weights.name}")`'
    kind = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    ours = kind in ("HybridDiTPipeline", "UNetPipeline")
    return f'`{"visionhybrid.diffusion" if ours else "diffusers"}.{kind}.from_pretrained("{weights.name}")`'
