"""Compiled C++ beside an operator: kept and found again, whatever state its folder and the compiler are in."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from visionhybrid.kernels import compiler

pytestmark = pytest.mark.skipif(compiler.missing() is not None, reason=str(compiler.missing()))


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "an operator" / "native.cpp"
    path.parent.mkdir()
    path.write_text('extern "C" int answer() { return 42; }')
    return path


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a cache"))
    return tmp_path / "a cache" / "visionhybrid"


def answer(source):
    """Of a process that did not ask before."""
    return compiler.library.__wrapped__(source).answer()


@pytest.fixture
def runs(monkeypatch):
    """The commands that were run to compile, not those that asked for a version."""
    commands, run = [], compiler._run

    def counted(command, source):
        commands.extend([command] if "--version" not in command else [])
        return run(command, source)

    monkeypatch.setattr(compiler, "_run", counted)
    return commands


def test_processes_that_compile_at_the_same_time_do_not_meet(source, cache):
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(answer, [source] * 4)) == [42] * 4
    assert [path.suffix for path in cache.iterdir()] == [".so"]  # one result, nothing else


@pytest.mark.parametrize(
    "damage", [lambda x: x[: len(x) // 2], lambda x: b"", lambda x: x[:-9] + b"otherwise"]
)
def test_a_damaged_result_is_made_anew(damage, source, cache, runs):
    assert answer(source) == 42
    (path,) = cache.iterdir()
    content = path.read_bytes()
    path.unlink()  # not changed in place: it is mapped
    path.write_bytes(damage(content))
    assert answer(source) == 42
    assert (path.read_bytes(), len(runs)) == (content, 2)
    assert answer(source) == 42
    assert len(runs) == 2


def test_where_nothing_can_be_kept_each_process_compiles(source, cache, runs, monkeypatch):
    cache.parent.write_text("a file where the folder should be")
    assert [answer(source), answer(source), len(runs)] == [42, 42, 2]
    monkeypatch.delenv("XDG_CACHE_HOME")

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(compiler.Path, "home", homeless)
    assert [answer(source), len(runs)] == [42, 3]


def test_a_full_disk_keeps_nothing_and_leaves_nothing(source, cache, monkeypatch):
    def full(self, content):
        with open(self, "wb") as file:
            file.write(content[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compiler.Path, "write_bytes", full)
    assert answer(source) == 42
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("exit 3", "said: exit status 3"),
        ("echo one >&2; echo 'an error of mine' >&2; exit 1", "said: an error of mine"),
        ("printf 'caf\\351' >&2; exit 1", "said: caf\ufffd"),
        ("exit 0", "left no file"),
        (
            'while [ "$1" != -o ] && [ $# -gt 0 ]; do shift; done; [ $# = 0 ] || echo text > "$2"',
            "XDG_CACHE_HOME",
        ),
        ("kill -9 $$", "said: exit status -9"),
    ],
    ids=["fails", "says why", "Latin-1", "does nothing", "writes text", "killed"],
)
def test_a_compiler_that_does_not_do_its_work_is_one_line(
    script, reason, source, cache, tmp_path, monkeypatch
):
    broken = tmp_path / "broken c++"
    broken.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit 0\n{script}\n')
    broken.chmod(0o755)
    monkeypatch.setattr(compiler, "COMPILER", [str(broken)])
    with pytest.raises(RuntimeError, match=r"cannot compile .*native.cpp, use backend='eager'; ") as error:
        answer(source)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_a_compiler_that_goes_away_or_hangs_is_one_line(source, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(compiler, "COMPILER", [str(tmp_path / "gone")])
    with pytest.raises(RuntimeError, match=r"use backend='eager'; .*No such file"):
        answer(source)
    monkeypatch.setattr(compiler, "COMPILER", [sys.executable, "-c", "import time; time.sleep(60)"])
    monkeypatch.setattr(compiler, "SECONDS", 0.1)
    with pytest.raises(RuntimeError, match=r"use backend='eager'; .*timed out after 0.1 seconds"):
        answer(source)


@pytest.mark.parametrize("given", ["no-such-compiler -O2", "'", "''"])
def test_a_cxx_that_names_none_is_said_when_asked(given, monkeypatch):
    monkeypatch.setattr(compiler, "CXX", given)
    monkeypatch.setattr(compiler, "COMPILER", compiler._compiler())
    assert compiler.missing() == f"needs a C++ compiler: CXX={given!r} names none"
