"""Sparse-linear attention of a sequence sharded over processes against one process that holds it whole."""

import os
import time

import pytest
import torch

from visionhybrid.kernels.linear_attention.ops import AllReduce
from visionhybrid.kernels.sparse_linear_attention import block_scores, classify, sparse_linear_attention

BLOCK = 8
VARIANTS = ("main", "v1", "paper")


def parts(x, sizes, dim=2):
    return x.split(sizes, dim)


def diagonal(q, k, keep, sizes, options):
    """What the ranks' own choices are to one process: their maps on the diagonal, marginal blocks elsewhere."""
    maps = []
    for q_part, k_part, keep_part in zip(
        parts(q, sizes), parts(k, sizes), parts(keep, sizes, 1), strict=True
    ):
        scores = block_scores(q_part, k_part, BLOCK, BLOCK, keep_part)
        maps.append(classify(scores, options["topk"], options["negligible"]))
    whole = torch.zeros(*q.shape[:2], *(sum(m.shape[i] for m in maps) for i in (2, 3)), dtype=torch.int8)
    row = column = 0
    for m in maps:
        whole[:, :, row : row + m.shape[2], column : column + m.shape[3]] = m
        row, column = row + m.shape[2], column + m.shape[3]
    return whole


def sharded(rank, world, sizes, folder):
    """One rank: its shard of a problem that every rank draws whole; outputs and gradients against the whole."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    sent, total = [], AllReduce.total
    AllReduce.total = staticmethod(lambda x, group: sent.append(x.numel()) or total(x, group))
    generator = torch.Generator().manual_seed(0)
    B, heads, D, E = 2, 3, 4, 5
    q, k, v, *cotangents = (
        torch.randn(B, heads, sum(sizes), dim, dtype=torch.float64, generator=generator)
        for dim in (D, D, E, E, E)
    )
    keep = torch.rand(B, sum(sizes), generator=generator) < 0.8
    for variant in VARIANTS:
        options = dict(variant=variant, topk=0.4, negligible=0.4 if variant == "paper" else 0.0)
        options |= dict(block_q=BLOCK, block_k=BLOCK, feature_map="elu")
        whole = [x.clone().requires_grad_() for x in (q, k, v)]
        block_map = diagonal(q, k, keep, sizes, options)
        want = sparse_linear_attention(
            *whole, key_mask=keep, block_map=block_map, backend="reference", **options
        )
        grads = torch.autograd.grad(want[:2], whole, cotangents)
        mine = [parts(x, sizes)[rank].clone().requires_grad_() for x in (q, k, v)]
        group = torch.distributed.group.WORLD
        got = sparse_linear_attention(*mine, key_mask=parts(keep, sizes, 1)[rank], group=group, **options)
        for a, b in zip(got[:2], want[:2], strict=True):
            torch.testing.assert_close(a, parts(b, sizes)[rank])
        own = torch.autograd.grad(got[:2], mine, [parts(c, sizes)[rank] for c in cotangents])
        for a, b in zip(own, grads, strict=True):
            torch.testing.assert_close(a, parts(b, sizes)[rank])
        # One all-reduce each way, of the state; forward "main" also counts the keys.
        assert len(sent) == 2, f"{variant}: {sent}"
        assert max(sent) <= B * heads * D * (E + 1) + B
        sent.clear()
    # A rank that leaves while another still reads from it can abort that one, and torch 2.15 now and then aborts while it
    # takes gloo's threads down ("terminate called without an active exception"): so wait, then leave without that.
    torch.distributed.barrier()
    time.sleep(0.5)
    os._exit(0)


# Multiples of the block but for the last rank: so blocks are the same on one process.
@pytest.mark.parametrize("sizes", [[16, 24], [8, 24, 13]], ids=["two ranks", "three ranks"])
def test_a_sequence_over_several_processes_equals_one(sizes, tmp_path):
    torch.multiprocessing.spawn(sharded, (len(sizes), sizes, str(tmp_path)), nprocs=len(sizes))


def test_where_a_group_means_nothing(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        x, group = torch.randn(1, 1, 4, 4), torch.distributed.group.WORLD
        with pytest.raises(ValueError, match="knows one process"):
            sparse_linear_attention(x, x, x, group=group, backend="reference")
        with pytest.raises(ValueError, match="variant 'sparse' has none"):
            sparse_linear_attention(x, x, x, group=group, variant="sparse")
    finally:
        torch.distributed.destroy_process_group()
