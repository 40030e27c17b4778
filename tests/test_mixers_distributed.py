"""Mixers of a sequence that ranks share: each mixes its own tokens, and the result is that of the whole sequence."""

import os
import time

import pytest
import torch
from mixing import SAMPLES, Sample

from visionhybrid import mixers
from visionhybrid.kernels.linear_attention.ops import AllReduce
from visionhybrid.mixers import sharding

GRIDS = {2: (11, 4), 3: (7, 3, 2)}  # ranks: an image, a video, cut amid a row
TEXT = 5
HEADS, WIDTH = 3, 8


def shared(group, mixer, whole, cotangent, grid, text, **extra):
    """Outputs and gradients of this rank's tokens against those of the whole sequence."""
    shards = sharding.Shards(group, grid, text)
    want = mixer(*whole, grid=grid, text_tokens=text, **extra)
    parameters = list(mixer.parameters())
    grads = torch.autograd.grad(want, [*whole, *parameters], cotangent, allow_unused=True)
    mine = [shards.own(x, 2).detach().requires_grad_() for x in whole]
    got = sharding.mix(mixer, *mine, grid=grid, text_tokens=text, group=group, **extra)
    own = torch.autograd.grad(got, [*mine, *parameters], shards.own(cotangent, 2), allow_unused=True)
    torch.testing.assert_close(got, shards.own(want, 2))
    for a, b in zip(own[:3], grads, strict=False):
        torch.testing.assert_close(a, shards.own(b, 2))
    for a, b in zip(own[3:], grads[3:], strict=True):  # of a parameter every rank knows a summand
        if b is not None:
            torch.distributed.all_reduce(a, group=group)
            torch.testing.assert_close(a, b)


def work(rank, world, folder):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    group = torch.distributed.group.WORLD
    draw, grid = torch.Generator().manual_seed(0), GRIDS[world]
    sent = []
    run, total = sharding._Exchange.run, AllReduce.total
    # what goes to this rank itself does not count
    sharding._Exchange.run = staticmethod(
        lambda x, counts, *args: sent.append(sum(counts) - counts[rank]) or run(x, counts, *args)
    )
    AllReduce.total = staticmethod(lambda x, group: sent.append(x.numel()) or total(x, group))
    gates = torch.Size(grid).numel()
    for name, sample in {
        **SAMPLES,
        "gates": Sample(name="lina", definition=None, options=dict(conv=0, gates=gates)),
    }.items():
        torch.manual_seed(0)
        mixer = mixers.create(sample.name, dim=HEADS * WIDTH, heads=HEADS, head_dim=WIDTH, **sample.options)
        mixer = mixer.double()
        for parameter in mixer.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        about = mixer.about
        if type(mixer).sharded is mixers.Mixer.sharded or (about.grids and len(grid) not in about.grids):
            continue
        for text in (0,) if name == "gates" else (0, TEXT):  # those are of so many tokens
            tokens = text + torch.Size(grid).numel()
            *whole, cotangent = (
                torch.randn(2, HEADS, tokens, WIDTH, dtype=torch.float64, generator=draw) for _ in range(4)
            )
            whole = [x.requires_grad_() for x in whole]
            try:
                shared(group, mixer, whole, cotangent, grid, text)
                if about.masks:
                    keep = torch.rand(2, tokens, generator=draw) < 0.8
                    shared(group, mixer, whole, cotangent, grid, text, key_mask=keep)
                if name == "agent":
                    metric = torch.randn(2, tokens - text, 6, dtype=torch.float64, generator=draw)
                    shared(group, mixer, whole, cotangent, grid, text, metric=metric)
            except Exception as error:
                raise AssertionError(f"{name} {grid} {text}") from error
    beside(group, grid, draw)
    traffic(group, sent, draw)
    # See test_sparse_linear_distributed.py: wait, then leave without gloo's own ending.
    torch.distributed.barrier()
    time.sleep(0.5)
    os._exit(0)


def beside(group, grid, draw):
    """What LINA adds of the hidden states."""
    mixer = mixers.create("lina", dim=6, heads=2, head_dim=3, conv=3).double()
    torch.distributed.broadcast(mixer.dw_conv.weight.data, 0)
    torch.distributed.broadcast(mixer.dw_conv.bias.data, 0)
    x = torch.randn(2, TEXT + torch.Size(grid).numel(), 6, dtype=torch.float64, generator=draw)
    want = mixer.beside(x, grid=grid, text_tokens=TEXT)
    shards = sharding.Shards(group, grid, TEXT)
    got = mixer.beside(shards.own(x), grid=grid, text_tokens=TEXT, group=group)
    torch.testing.assert_close(got, shards.own(want))
    assert want[:, TEXT:].abs().min() > 0


def traffic(group, sent, draw):
    """A longer image costs no more: states and halos do not grow with it."""
    for name, options in {
        "linfusion": {},
        "linear": dict(conv=3),
        "clear": dict(radius=2.5, trained_tokens=100),
        "neighborhood": dict(kernel_size=3),
        "window": dict(window_size=4, shift=2),
    }.items():
        mixer = mixers.create(name, dim=16, heads=2, head_dim=8, **options)
        counts = []
        for rows in (48, 96):
            sent.clear()
            grid = (rows, 5)
            shards = sharding.Shards(group, grid, TEXT)
            x = shards.own(torch.randn(1, 2, TEXT + rows * 5, 8, generator=draw), 2)
            with torch.no_grad():
                sharding.mix(mixer, x, x, x, grid=grid, text_tokens=TEXT, group=group)
            counts.append(sum(sent))
        assert 0 < counts[0] == counts[1], f"{name}: {counts}"


@pytest.mark.parametrize("world", GRIDS)
def test_ranks_give_what_one_process_gives(world, tmp_path):
    torch.multiprocessing.spawn(work, (world, str(tmp_path)), nprocs=world)


def test_what_cannot_be_shared_is_said(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        group = torch.distributed.group.WORLD
        x = torch.randn(1, 1, 4, 8)
        with pytest.raises(ValueError, match="hyena: knows one process, its sequence cannot be shared"):
            sharding.mix(
                mixers.create("hyena", dim=8, heads=1, head_dim=8), x, x, x, grid=(2, 2), group=group
            )
        with pytest.raises(ValueError, match=r"softmax: rank 0 of 1 holds 4 tokens, .* would be 0 and 6"):
            sharding.mix(
                mixers.create("softmax", dim=8, heads=1, head_dim=8), x, x, x, grid=(2, 3), group=group
            )
    finally:
        torch.distributed.destroy_process_group()
