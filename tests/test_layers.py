"""The direction of imports (docs/architecture.md) and the lightness of `import visionhybrid`."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import visionhybrid

PACKAGE = Path(visionhybrid.__file__).parent
# Each package may import itself and what stands before it.
ORDER = [
    {"kernels"},
    {"mixers"},
    {"models", "hosts"},
    {"data"},
    {"diffusion"},
    {"infer"},
    {"train"},
    {"configs"},
    {"demo", "bench", "app", "cli"},
]
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
# Only these may import a heavy library at module level; everything else imports it where it is used.
HEAVY = {
    "diffusers": {"hosts", "diffusion"},
    "triton": {"kernels"},
    "accelerate": {"train"},
    "matplotlib": {"bench"},
    "gradio": {"app"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(tree: ast.AST, file: Path) -> list[tuple[str, int]]:
    """Every module that `file` imports by `visionhybrid....`, relative imports resolved, with its line."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = file.relative_to(PACKAGE.parent).parent.parts
            base = ".".join(package[: len(package) - node.level + 1]) + "." if node.level else ""
            module = base + (node.module or "")
            found += [(module, node.lineno)]
            if module == "visionhybrid":
                found += [(f"visionhybrid.{alias.name}", node.lineno) for alias in node.names]
    return found


def part(module: str) -> str:
    """`visionhybrid.train.loop` -> `train`; a file of the package itself -> its stem."""
    return module.split(".")[1] if module.count(".") else ""


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_flow_one_way(file):
    here = file.relative_to(PACKAGE).with_suffix("").parts[0]
    if here not in RANK:
        assert here in {"__init__", "__main__", "_version"}, f"{here} has no place in the order of packages"
        return
    for module, line in imported(ast.parse(file.read_text()), file):
        target = part(module) if module.startswith("visionhybrid") else ""
        if target in RANK:
            assert RANK[target] <= RANK[here], f"{file}:{line}: {here} must not import {target}"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_heavy_libraries_only_where_they_belong(file):
    here = file.relative_to(PACKAGE).with_suffix("").parts[0]
    tree = ast.parse(file.read_text())
    top = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
    for module, line in imported(top, file):
        owners = HEAVY.get(module.split(".")[0])
        assert owners is None or here in owners, (
            f"{file}:{line}: import {module} inside the function that needs it"
        )


def test_system_files_do_not_import_each_other():
    from visionhybrid.models.registry import SYSTEMS

    for name in SYSTEMS:
        for file in [*PACKAGE.glob(f"models/{name}.py"), *PACKAGE.glob(f"models/{name}/*.py")]:
            others = {f"visionhybrid.models.{other}" for other in SYSTEMS if other != name}
            for module, line in imported(ast.parse(file.read_text()), file):
                assert module not in others, f"{file}:{line}: no system file imports another"


def test_source_is_ascii():
    for file in FILES:
        assert file.read_bytes().isascii(), f"{file}: ASCII only in code"


def test_import_loads_nothing_heavy():
    """What one import costs is what it loads: beside timm's own modules, only ours."""
    code = (
        "import sys, timm; names = lambda: {m.split('.')[0] for m in sys.modules}; before = names();"
        "import visionhybrid; print(*sorted(names() - before))"
    )
    # The checks of shapes that the suite switches on (conftest.py) load their own libraries; a user's import does not.
    env = {name: value for name, value in os.environ.items() if name != "VISIONHYBRID_CHECK"}
    command = [sys.executable, "-c", code]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout.split()
    third_party = [m for m in loaded if m not in sys.stdlib_module_names and m != "visionhybrid"]
    assert not third_party, f"import visionhybrid loads {third_party} beyond what import timm loads"


def test_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        visionhybrid.lod  # noqa: B018


def test_every_name_of_the_package_resolves():
    for name in visionhybrid.__all__:
        assert getattr(visionhybrid, name) is not None
