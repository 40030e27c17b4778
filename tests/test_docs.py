"""What README and docs/ say is true: generated tables are current, links lead somewhere, examples run."""

import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def test_readme_tables_are_current():
    result = subprocess.run(
        [sys.executable, ROOT / "tools/readme.py", "--check"], capture_output=True, text=True
    )
    assert result.returncode == 0, f"run `python tools/readme.py`\n{result.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_api_page_names_what_there_is():
    names = re.findall(r"^::: (\S+)$", (ROOT / "docs/api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(names) > 50
    for name in names:
        thing = pkgutil.resolve_name(name)
        assert thing.__doc__, f"{name} has no docstring"


def test_reference_code_is_listed_with_its_licence():
    from visionhybrid.mixers.registry import MIXERS
    from visionhybrid.models.registry import SYSTEMS

    page = (ROOT / "docs/licences.md").read_text(encoding="utf-8")
    for known in (*SYSTEMS.values(), *MIXERS.values()):
        rows = [row for row in page.splitlines() if known.source and known.source in row]
        licence = "none found" if known.license == "none stated" else known.license
        assert all(licence in row for row in rows), f"{known.name}: {licence}"
        assert rows or not known.source, f"{known.name}: {known.source}"


def test_every_page_is_in_the_navigation():
    shown = re.findall(
        r"^  - [^:]+: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert sorted(shown) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_examples_are_python(page):
    for block in python_blocks(page):
        compile(block, page.name, "exec")


def test_first_example_runs(capsys):
    exec(compile(python_blocks(ROOT / "README.md")[0], "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert printed.strip() == "[(1, 96, 56, 56), (1, 256, 28, 28), (1, 512, 14, 14), (1, 1024, 7, 7)]"


def test_second_example_runs(tmp_path, monkeypatch):
    import timm
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    options = dict(
        dim=16,
        depths=[1],
        num_heads=[2],
        window_size=8,
        key_window_size=12,
        conv_dim=4,
        gate_dim=2,
        mlp_dim=16,
    )
    model = timm.create_model("vh_hat_x4", **options)
    torch.save({"params_ema": model.state_dict()}, "HAT-S_SRx4.pth")
    Image.new("RGB", (20, 12), "teal").save("photo.png")
    exec(compile(python_blocks(ROOT / "README.md")[1], "README.md", "exec"), {})
    with Image.open("photo_x4.png") as restored:
        assert restored.size == (80, 48)


def test_recipes_of_the_docs_exist():
    from visionhybrid.train.config import override
    from visionhybrid.train.recipes import find

    for page in PAGES:
        for words in re.findall(
            r"(?:visionhybrid train|visionhybrid\.train) ([^\n#`]+)", page.read_text(encoding="utf-8")
        ):
            name, *changes = shlex.split(words)
            if re.fullmatch(r"[a-z0-9_]+", name):
                override(find(name), [word for word in changes if "=" in word])
