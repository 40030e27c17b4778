"""Compiles Triton kernels ahead of time, for GPUs that are not here. Run as `python aot.py OPERATOR`: one JSON line a kernel.

A process of its own, because under TRITON_INTERPRET=1, as the other tests run, `triton.jit` gives nothing to compile.

Every kernel in every configuration goes through Triton's front end for every target (30 ms each). What the compilers behind it
make of that takes twenty times as long and is the same whenever its input is, so it is kept in aot.jsonl, under a digest of the
input and of Triton's version. `AOT_ALL=1` compiles all the same; `python aot.py --record` compiles what is new and writes the
file again. See `wanted` for what is compiled in every run.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ |= {"TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1", "VISIONHYBRID_CHECK": "0"}

import triton
from aot_builds import OPERATORS, Build
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend

RECORD = Path(__file__).with_name("aot.jsonl")

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


def chosen(builds: list[Build], target: str) -> list[Build]:
    """Of an operator's builds those that are `everywhere`, and of the others every third: each falls to one target, in turn.

    The kernels of one configuration fall to different targets, so that each target still sees every element type at every size.
    """
    turns: dict[Any, int] = {}
    taken = []
    for build in builds:
        # A kernel's first turn is its own place among the kernels.
        turn = turns.setdefault(build.kernel, len(turns))
        if build.everywhere or turn % len(TARGETS) == list(TARGETS).index(target):
            taken.append(build)
        turns[build.kernel] += not build.everywhere
    lost = {build.cell for build in builds} - {build.cell for build in taken}
    assert not lost, f"{target}: nothing is compiled for {lost}"
    return taken


def wanted(builds: list[Build], keys: list[str], target: str, record: dict[str, dict[str, Any]]) -> set[str]:
    """The keys of what is compiled: of each kernel the last build, and what the record lacks as far as it is `chosen`."""
    if os.environ.get("AOT_ALL") == "1":
        return set(keys)
    last = {build.kernel: key for build, key in zip(builds, keys, strict=True)}
    picked = {build.name for build in chosen(builds, target)}
    new = {key for build, key in zip(builds, keys, strict=True) if key not in record and build.name in picked}
    return new | set(last.values())


def front_end(build: Build, target: GPUTarget) -> str:
    """A digest of what the compilers are given."""
    backend, source = make_backend(target), build.source()
    options = backend.parse_options(dict(build.options))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions = backend.get_codegen_implementation(options)
    module = source.make_ir(target, options, functions, backend.get_module_map(), context)
    given = f"{triton.__version__} {target} {sorted(build.options.items())} {module.str_nodebug()}"
    return hashlib.sha256(given.encode()).hexdigest()[:20]


def compiled(build: Build, target: GPUTarget) -> dict[str, Any]:
    """Compiles; bytes of shared memory and of registers spilled (per thread)."""
    made = triton.compile(build.source(), target=target, options=build.options)
    return {"name": build.name, "shared": made.metadata.shared, "spilled": _spilled(made, target)}


def _spilled(made: Any, target: GPUTarget) -> int:
    if target.backend == "hip":
        return 4 * sum(int(n) for n in re.findall(r"\.vgpr_spill_count:\s*(\d+)", made.asm["amdgcn"]))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # Our kernels have no arrays: what lies on the stack or in local memory was spilled.
    return sum(int(n) for n in re.findall(r"\b(?:STACK|LOCAL):(\d+)", said))


def recorded() -> dict[str, dict[str, Any]]:
    """key -> what was said of it."""
    lines = RECORD.read_text().splitlines() if RECORD.is_file() else []
    return {one["key"]: one for one in map(json.loads, lines)}


def run(operator: str, record: dict[str, dict[str, Any]], all_new: bool = False) -> Iterator[dict[str, Any]]:
    """For each build and target: compiled now, known from the record, or neither."""
    for name, target in TARGETS.items():
        builds = list(OPERATORS[operator](target))
        doubled = [name for name, count in Counter(build.name for build in builds).items() if count > 1]
        assert not doubled, f"{operator}: names that stand twice: {doubled}"
        keys = [front_end(build, target) for build in builds]
        now = set(keys) - set(record) if all_new else wanted(builds, keys, name, record)
        for build, key in zip(builds, keys, strict=True):
            about = {"key": key, "target": name, "operator": operator, "name": build.name}
            if key in now:
                yield about | {"compiled": True} | compiled(build, target)
            else:
                known = {size: record[key][size] for size in ("shared", "spilled")} if key in record else {}
                yield about | {"compiled": False} | known


def rewrite() -> None:
    """Compile what is new; the record then holds what there is, and no more."""
    known, lines = recorded(), []
    for operator in OPERATORS:
        for one in run(operator, known, all_new=True):
            one.pop("compiled")
            lines.append(json.dumps(one) + "\n")
        sys.stderr.write(f"{operator}: {len(lines)} lines\n")
    aside = RECORD.with_suffix(".tmp")
    aside.write_text("".join(lines))
    aside.replace(RECORD)


if __name__ == "__main__":
    if sys.argv[1] == "--record":
        rewrite()
    else:
        for one in run(sys.argv[1], recorded()):
            sys.stdout.write(json.dumps(one) + "\n")
            sys.stdout.flush()
