"""Golden vectors: what the published reference implementation of a system computes.

No weights travel. Every tensor of a state dict is filled from its own key name, so the
reference and this project can each build the very same weights; a case then holds the
reference's list of keys and shapes, the input's seed, and the reference's outputs.

A case is two files: NAME.json (facts) and NAME.safetensors (outputs, float32).

    case = load_case("nextvit_small")
    state = case.state_dict()            # the reference's own keys -> filled tensors
    model.load_state_dict(convert(state), strict=True)
    case.check("logits", model.eval()(case.input("x")))
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent


def _normal(seed: str, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal float32 array that depends on nothing but `seed` and `shape`."""
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(seed.encode())))
    return rng.standard_normal(shape, dtype=np.float64).astype(np.float32)


def fill(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The golden value of the float tensor stored under `key` in a state dict."""
    x = _normal(key, shape)
    leaf = key.rsplit(".", 1)[-1]
    if leaf == "running_var":
        x = np.exp(0.1 * x)
    elif leaf == "running_mean":
        x = 0.1 * x
    elif leaf == "weight" and len(shape) == 1:  # a norm's scale
        x = 1 + 0.1 * x
    elif leaf == "weight" and len(shape) >= 2:  # fan-in scaling keeps activations near unit size
        x = x / np.sqrt(np.prod(shape[1:]))
    else:  # biases, tables, logs, gates
        x = 0.1 * x
    return torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))


def make_input(name: str, spec: dict) -> torch.Tensor:
    """An input tensor from its spec: {"shape": [...], "kind": "normal" | "image" | "int", "high": n}."""
    shape = tuple(spec["shape"])
    seed = spec.get("seed", name)
    if spec["kind"] == "normal":
        return torch.from_numpy(spec.get("scale", 1.0) * _normal(seed, shape))
    if spec["kind"] == "image":  # in [0, 1]
        rng = np.random.Generator(np.random.PCG64(zlib.crc32(seed.encode())))
        return torch.from_numpy(rng.random(shape, dtype=np.float64).astype(np.float32))
    if spec["kind"] == "int":
        rng = np.random.Generator(np.random.PCG64(zlib.crc32(seed.encode())))
        return torch.from_numpy(rng.integers(0, spec["high"], shape))
    raise ValueError(f"unknown input kind {spec['kind']!r}")


@dataclass
class Case:
    name: str
    facts: dict
    outputs: dict[str, torch.Tensor]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The reference's state dict, filled. Keys in "alias" share another key's value;
        those in "const" (index buffers and the like) are given whole in the outputs file."""
        state = {}
        for key, shape in self.facts["keys"].items():
            source = self.facts.get("alias", {}).get(key, key)
            stored = f"const:{source}"
            state[key] = self.outputs[stored] if stored in self.outputs else fill(source, tuple(shape))
        return state

    def input(self, name: str) -> torch.Tensor:
        return make_input(name, self.facts["inputs"][name])

    def check(self, name: str, got: torch.Tensor, rel: float | None = None) -> float:
        """Relative error ||got - want|| / ||want||; AssertionError above `rel` (default: the case's own)."""
        want = self.outputs[name]
        assert got.shape == want.shape, (
            f"{self.name}/{name}: shape {tuple(got.shape)}, wanted {tuple(want.shape)}"
        )
        got = got.detach().float().cpu()
        assert torch.isfinite(got).all(), f"{self.name}/{name}: not finite"
        err = ((got - want).norm() / want.norm()).item()
        limit = self.facts.get("rel", 1e-4) if rel is None else rel
        assert err <= limit, f"{self.name}/{name}: relative error {err:.2e} above {limit:.0e}"
        return err


def load_case(name: str, folder: Path = HERE) -> Case:
    facts = json.loads((folder / f"{name}.json").read_text())
    outputs = load_file(folder / f"{name}.safetensors")
    # Index tables travel as int16 here to keep the repository small; checkpoints hold int64.
    outputs = {k: v.long() if v.dtype == torch.int16 else v for k, v in outputs.items()}
    return Case(name, facts, outputs)


def list_cases(folder: Path = HERE) -> list[str]:
    return sorted(p.stem for p in folder.glob("*.json"))


# ---- for whoever makes a case: fill a reference module, record its keys and outputs -------------


def fill_module(module: torch.nn.Module) -> tuple[dict, dict, dict]:
    """Fill `module` in place; return (keys, alias, const) to record.

    Tied parameters (one tensor under several keys) are recorded as aliases of the last such key.
    Integer and boolean buffers keep their value and are recorded as constants."""
    state = module.state_dict(keep_vars=True)
    owner: dict[int, str] = {}
    for key, t in state.items():
        if t.numel():
            owner[t.data_ptr()] = key
    keys, alias, const = {}, {}, {}
    with torch.no_grad():
        for key, t in state.items():
            keys[key] = list(t.shape)
            source = owner.get(t.data_ptr(), key)
            if source != key:
                alias[key] = source
            elif t.is_floating_point():
                t.copy_(fill(key, tuple(t.shape)))
            else:
                const[f"const:{key}"] = t.detach().clone().contiguous()
    return keys, alias, const


def save_case(name: str, facts: dict, outputs: dict[str, torch.Tensor], folder: Path = HERE) -> None:
    """Write NAME.json and NAME.safetensors. `facts` needs: source, kwargs, keys, inputs; may have alias, rel, notes."""
    (folder / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n")
    save_file(
        {k: v.detach().cpu().contiguous().clone() for k, v in outputs.items()}, folder / f"{name}.safetensors"
    )
