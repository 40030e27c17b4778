"""`accelerate launch -m visionhybrid.train RECIPE [field=value ...] [--out DIR] [--dry-run] [--fresh]`."""

from __future__ import annotations

import sys
from pathlib import Path

from visionhybrid.train.processes import leave

USAGE = """usage: python -m visionhybrid.train RECIPE [field=value ...] [--out DIR] [--dry-run] [--fresh]

RECIPE    a recipe's name, file.py:function, or the config.json of an earlier run; of a graft, all its phases
--out     run directory (default runs/RECIPE); a run found there is continued
--dry-run one step of every phase and a memory estimate, nothing kept
--fresh   refuse to continue a run"""


def _say(text: object) -> None:
    sys.stderr.write(f"{text}\n")


def main(words: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 failed, 2 cannot be meant, 130 stopped by a signal."""
    words = list(sys.argv[1:] if words is None else words)
    if not words or "--help" in words or "-h" in words:
        sys.stdout.write(USAGE + "\n")
        return 0 if words else 2
    out, flags, rest = None, set(), []
    while words:
        word = words.pop(0)
        if word == "--out" and words:
            out = words.pop(0)
        elif word.startswith("--out="):
            out = word.removeprefix("--out=")
        elif word in ("--dry-run", "--fresh"):
            flags.add(word)
        elif word.startswith("-"):
            _say(f"error: no option {word!r}; have --out DIR, --dry-run, --fresh")
            return 2
        else:
            rest.append(word)
    if not rest:
        _say(USAGE)
        return 2
    return train(rest[0], rest[1:], out, dry_run="--dry-run" in flags, fresh="--fresh" in flags)


def train(
    recipe: str, changes: list[str], out: str | None = None, *, dry_run: bool = False, fresh: bool = False
) -> int:
    """What the command does, errors as one line on standard error; shared with `visionhybrid train`."""
    from visionhybrid.train.config import ConfigError, Grafting, diff, override
    from visionhybrid.train.grafting import graft
    from visionhybrid.train.guard import DivergedError
    from visionhybrid.train.loop import Interrupted, MemoryLimitError
    from visionhybrid.train.recipes import find
    from visionhybrid.train.session import run
    from visionhybrid.train.state import CheckpointError

    try:
        base = find(recipe)
        config = override(base, changes)
        for line in diff(config, base):
            _say(f"  {line}")
        where = Path(out or Path("runs") / config.name)
        if isinstance(config, Grafting) and not dry_run:
            graft(config, where)
        else:
            run(config, where, dry_run=dry_run, resume=not fresh)
    except (ConfigError, ValueError, ImportError) as error:
        _say(f"error: {error}")
        return 2
    except (CheckpointError, DivergedError, MemoryLimitError) as error:
        _say(f"error: {error}")
        return 1
    except Interrupted as error:
        _say(error)
        return 130
    return 0


if __name__ == "__main__":
    leave(main())
