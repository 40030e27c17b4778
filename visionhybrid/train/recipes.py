"""Recipes by name: `nextvit_small_in1k`, `my_file.py:my_recipe`, or the `config.json` of an earlier run."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import pkgutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from visionhybrid.train.config import Config, ConfigError, from_json

Recipe = Callable[[], Config]
# Where recipes are looked for, by name: they stand on `train.config`, so nothing here may import them outright.
PACKAGE = "visionhybrid.configs"


def names() -> dict[str, Recipe]:
    """Every recipe of the package: name -> function. Its docstring has command, expected time and published number."""
    found: dict[str, Recipe] = {}
    for info in pkgutil.iter_modules(importlib.import_module(PACKAGE).__path__, f"{PACKAGE}."):
        found.update(_recipes(importlib.import_module(info.name)))
    return dict(sorted(found.items()))


def find(name: str) -> Config:
    """The config that `name` stands for: a recipe of the package, `file.py:function`, or a saved JSON file or run directory.

    Raises: ConfigError: nothing of that name; suggests the nearest.
    """
    path, colon, function = name.rpartition(":")
    if colon and path.endswith(".py"):
        return _call(_from_file(Path(path), function), name)
    file = Path(name)
    if (file / "config.json").is_file():
        file = file / "config.json"
    if file.suffix == ".json":
        try:
            return from_json(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read config {name!r}: {error}") from None
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None
    recipes = names()
    if name not in recipes:
        near = difflib.get_close_matches(name, recipes, 1, 0.0)
        hint = f"; the nearest is {near[0]!r}" if near else ""
        raise ConfigError(f"no recipe {name!r}{hint}")
    return _call(recipes[name], name)


def _recipes(module: ModuleType) -> dict[str, Recipe]:
    return {
        name: value
        for name, value in vars(module).items()
        if inspect.isfunction(value) and not name.startswith("_") and value.__module__ == module.__name__
    }


def _from_file(path: Path, function: str) -> Recipe:
    if not path.is_file():
        raise ConfigError(f"no file {str(path)!r} to take recipe {function!r} from")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None  # noqa: PT018 - for the type checker, not a test
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    recipes = _recipes(module)
    if function not in recipes:
        raise ConfigError(f"{path} has no recipe {function!r}; it has {', '.join(recipes) or 'none'}")
    return recipes[function]


def _call(recipe: Recipe, name: str) -> Config:
    config = recipe()
    if not isinstance(config, Config):
        raise ConfigError(
            f"recipe {name!r} returned {type(config).__name__}, expected a visionhybrid.train.config.Config"
        )
    return config
