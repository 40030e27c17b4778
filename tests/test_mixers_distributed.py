"""Linear mixers over ranks: each mixes its own tokens and the result is that of the whole sequence."""

import pytest
import torch

from visionhybrid import mixers

SIZES = [10, 25]  # tokens of each rank, of a grid of 5 x 7
LINEAR = [name for name in mixers.list_mixers() if hasattr(mixers.about(name).mixer, "group")]


def share(rank: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    generator = torch.Generator().manual_seed(0)
    q, k, v, cotangent = (
        torch.randn(2, 3, 35, 8, generator=generator, dtype=torch.float64) for _ in range(4)
    )
    for name in LINEAR:
        mixer = mixers.create(name, dim=24, heads=3, head_dim=8)
        whole = [x.clone().requires_grad_() for x in (q, k, v)]
        out = mixer(*whole, grid=(5, 7))
        grads = torch.autograd.grad(out, whole, cotangent)
        mixer.group = torch.distributed.group.WORLD
        mine = [x.split(SIZES, 2)[rank].clone().requires_grad_() for x in (q, k, v)]
        own = mixer(*mine, grid=(SIZES[rank] // 5, 5))
        torch.testing.assert_close(own, out.split(SIZES, 2)[rank])
        own_grads = torch.autograd.grad(own, mine, cotangent.split(SIZES, 2)[rank])
        for a, b in zip(own_grads, grads, strict=True):
            torch.testing.assert_close(a, b.split(SIZES, 2)[rank])
    torch.distributed.destroy_process_group()


def test_two_ranks_give_what_one_gives(tmp_path):
    assert {"linfusion", "linear"} <= set(LINEAR)
    torch.multiprocessing.spawn(share, (str(tmp_path),), nprocs=2)


def test_a_convolution_is_refused(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mixer = mixers.create("linear", dim=8, heads=1, head_dim=8, conv=3)
        mixer.group = torch.distributed.group.WORLD
        x = torch.randn(1, 1, 4, 8)
        with pytest.raises(ValueError, match="linear: with a convolution the sequence cannot be shared"):
            mixer(x, x, x, grid=(2, 2))
    finally:
        torch.distributed.destroy_process_group()
