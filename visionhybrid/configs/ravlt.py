"""RAVLT: the authors' ImageNet-1K recipes.

Source: arXiv:2411.07635; qhfan/RALA@a86314f classfication/ (run.sh, and main.py, whose defaults are DeiT's).
They give the batch of one process, 128, and not how many there were; 8 make the 1024 that their rule turns into a rate of 1e-3.
With fewer processes `loop.micro_batch=128` accumulates to the same.

Different here: their sampler takes a third of the pictures an epoch, three times each, augmented anew (repeated augmentation).
The published numbers are the paper's; nobody has trained these recipes with this package, and the authors give no times.
"""

from __future__ import annotations

from visionhybrid.configs import imagenet
from visionhybrid.train.config import Classification, Model


def ravlt_tiny_in1k() -> Classification:
    """RAVLT-T at 224, 300 epochs: 82.8 % top-1.

    accelerate launch --num_processes 8 -m visionhybrid.train ravlt_tiny_in1k data.root=/data/imagenet
    """
    return _in1k("tiny")


def ravlt_small_in1k() -> Classification:
    """RAVLT-S at 224, 300 epochs: 84.4 % top-1.

    accelerate launch --num_processes 8 -m visionhybrid.train ravlt_small_in1k data.root=/data/imagenet
    """
    return _in1k("small")


def ravlt_base_in1k() -> Classification:
    """RAVLT-B at 224, 300 epochs: 85.5 % top-1.

    accelerate launch --num_processes 8 -m visionhybrid.train ravlt_base_in1k data.root=/data/imagenet
    """
    return _in1k("base")


def ravlt_large_in1k() -> Classification:
    """RAVLT-L at 224, 300 epochs: 85.8 % top-1.

    accelerate launch --num_processes 8 -m visionhybrid.train ravlt_large_in1k data.root=/data/imagenet
    """
    return _in1k("large")


def _in1k(size: str) -> Classification:
    return Classification(
        name=f"ravlt_{size}_in1k",
        model=Model(name=f"vh_ravlt_{size}"),  # its drop path is the variant's, as in the official code
        optim=imagenet.OPTIM,
        schedule=imagenet.SCHEDULE,
        loop=imagenet.LOOP,
        data=imagenet.IMAGES,
        augment=imagenet.AUGMENT,
    )
