"""`visionhybrid kernels`: it says what the operators themselves do, and bad words cost one line."""

import json

import pytest
import torch
from test_cli import error, run

from visionhybrid import kernels
from visionhybrid.cli.kernels import CALLS
from visionhybrid.kernels import linear_attention


def calls(*words):
    return json.loads(run("kernels", *words, "--json").stdout)["calls"]


def test_every_operator_has_a_typical_call_that_something_runs():
    assert set(CALLS) == set(kernels.OPERATORS)
    found = calls()
    assert [call["operator"] for call in found] == list(kernels.OPERATORS)
    for call in found:
        for backends in call["backends"].values():
            assert list(backends.values()).count("chosen") == 1


def test_what_it_says_would_run_does(monkeypatch):
    (call,) = calls("linear_attention", "--shape", "1,2,9,8", "--dtype", "float32")
    (chosen,) = (name for name, word in call["backends"]["float32"].items() if word == "chosen")
    ran = []
    module = linear_attention.BACKENDS[chosen]
    forward = module.forward
    monkeypatch.setattr(module, "forward", lambda *args: ran.append(chosen) or forward(*args))
    kernels.operator("linear_attention")(*(torch.zeros(call["shape"]) for _ in range(3)))
    assert ran == [chosen]


def test_the_table_gives_each_reason_once(monkeypatch):
    for module, reason in (("triton", lambda q, *_: f"no {q.dtype}"), ("eager", lambda *_: "not today")):
        monkeypatch.setattr(linear_attention.BACKENDS[module], "unsupported", reason)
    lines = run("kernels", "linear_attention").stdout.splitlines()
    assert lines[0].startswith("device ")
    assert lines[2] == "linear_attention  1 x 8 x 4096 x 40 (B,heads,N,D)"
    assert lines[3].split() == ["backend", "float32", "bfloat16", "why", "not"]
    assert lines[4].split(None, 3) == [
        *("triton", "no", "no"),
        "float32: no torch.float32; bfloat16: no torch.bfloat16",
    ]
    assert lines[5].split(None, 3) == ["eager", "no", "no", "not today"]
    assert lines[6].split() == ["reference", "on", "request", "on", "request"]


def test_shape_and_options_reach_the_operator():
    (call,) = calls("neighborhood_attention", "--shape", "1,1,9,8,4", "-o", "kernel_size=[3,5]")
    assert (call["shape"], call["options"]) == ([1, 1, 9, 8, 4], {"kernel_size": [3, 5]})
    # The operator's own error comes through as one line.
    assert "stride must not exceed kernel_size" in error(
        "kernels", "neighborhood_attention", "-o", "stride=9"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["attention"], "no operator 'attention'; have linear_attention,"),
        (["--shape", "1,2,3,4"], "--shape and --option belong to one operator"),
        (["-o", "topk=0.1"], "--shape and --option belong to one operator"),
        (["selective_scan", "--shape", "1,2"], "is B,channels,length, such as 1,96,3136; got '1,2'"),
        (["selective_scan", "--shape", "1,2,x"], "got '1,2,x'"),
        (["selective_scan", "--shape", "1,2,0"], "got '1,2,0'"),
        (["selective_scan", "--dtype", "int8"], "--dtype must be one of float16, bfloat16, float32, float64"),
        (["selective_scan", "-o", "D=1"], "no option 'D' for this command; have delta_softplus, reverse"),
        (["linear_attention", "-o", "group=1"], "no option 'group'"),
        (["linear_attention", "-o", "norm"], "--option takes NAME=VALUE, got 'norm'"),
    ],
)
def test_wrong_words(words, message):
    assert message in error("kernels", *words, status=2)
