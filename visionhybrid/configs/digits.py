"""What small classifiers of scikit-learn's digits share: 1797 pictures of 8 x 8 pixels, enlarged to 32; no download."""

from __future__ import annotations

from visionhybrid.train.config import Augment, Images, Loop, Optim, Schedule

IMAGES = Images(dataset="digits", held_out="val", num_classes=10, image_size=32)
# No mirroring: a mirrored digit is another one or none.
AUGMENT = Augment(
    scale=(0.7, 1.0),
    ratio=(0.85, 1.18),
    flip=0.0,
    smoothing=0.1,
    crop=1.0,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)
OPTIM = Optim(name="adamw", lr=2e-3, weight_decay=0.05, clip_norm=5.0)
SCHEDULE = Schedule(name="cosine", warmup=60, warmup_lr=1e-5, min_lr=1e-5)
LOOP = Loop(batch_size=64, epochs=16, workers=0, log_every=20, validate_every=88, tensorboard=False)
