"""The tasks: what each adds to `common.Config`. A new task is a new subclass and the file it names."""

# `dict` as a factory.
# pyright: reportUnknownVariableType=false

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from visionhybrid.train.config.common import Config, Model


@dataclass(frozen=True, kw_only=True)
class Images:
    """A labelled image set."""

    dataset: str = ""  # what timm.data.create_dataset calls `name`: "" (folder or tar), "hfds/...", "wds/..."; or "digits"
    root: str = ""
    train: str = "train"  # splits
    held_out: str = "validation"
    class_map: str = ""
    num_classes: int = 1000
    image_size: int = 224
    repeat: int = 1  # passes that count as one epoch


@dataclass(frozen=True, kw_only=True)
class Augment:
    """timm's training transforms, mixing and label smoothing, and the evaluation transform."""

    scale: tuple[float, ...] = (0.08, 1.0)
    ratio: tuple[float, ...] = (3 / 4, 4 / 3)
    flip: float = 0.5
    color_jitter: float | None = None
    policy: str | None = None  # RandAugment and the like, in timm's words: "rand-m9-mstd0.5-inc1"
    erase: float = 0.0
    erase_mode: Literal["const", "rand", "pixel"] = "pixel"
    erase_count: int = 1
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_prob: float = 1.0
    mix_switch: float = 0.5
    mix_mode: Literal["batch", "pair", "elem"] = "batch"
    smoothing: float = 0.0
    interpolation: Literal["bicubic", "bilinear", "random"] = "bicubic"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    crop: float = 0.875  # of the shorter side, for evaluation: it is resized to int(image_size / crop), then the centre is cut


@dataclass(frozen=True, kw_only=True)
class Classification(Config):
    """A classifier of timm's registry, on labelled images."""

    data: Images = Images()
    augment: Augment = Augment()
    eval_batch: int = 64
    # MESA, arXiv:2205.14083: weight of the cross entropy towards what the averaged weights (loop.ema_decay) say; 0: without
    mesa: float = 0.0
    mesa_start: float = 0.0  # epochs before that
    sync_batch_norm: bool = False  # statistics over all processes, not over each one's share of the batch

    task: ClassVar[str] = "classification"
    entry: ClassVar[str] = "visionhybrid.train.classify:Classify"


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Low-quality pictures and their ground truth."""

    # "samples": the built-in photographs; "folder": good pictures, degraded on the fly; "pairs": two folders
    source: Literal["samples", "folder", "pairs"] = "folder"
    high: str = ""  # folder of good pictures
    low: str = ""  # pairs: folder of their low-quality partners
    names: str = ""  # file that lists the pictures of `high` to use, one a line
    degradation: Literal["bicubic", "noise", "jpeg", "second_order"] = "bicubic"
    # noise: sigma or its range, in 8-bit levels; jpeg: the qualities to choose from
    strength: tuple[float, ...] = ()
    # second_order: "sharp" trains towards unsharp-masked pictures, "both" gives them besides (an adversarial run sets it)
    truth: Literal["plain", "sharp", "both"] = "plain"
    held_out_high: str = ""  # empty: no validation (folder, pairs)
    held_out_low: str = ""  # empty: made from held_out_high
    held_out_crop: int | None = None  # validate on the central crop of so many low-quality pixels a side
    scale: int = 4
    channels: Literal[1, 3] = 3
    patch: int = 64  # side of the low-quality patch
    orient: Literal["all", "flip", "none"] = "all"
    enlarge: bool = False  # pictures smaller than the patch are enlarged instead of skipped
    repeat: int = 1  # patches taken from a picture in one epoch
    cache_mb: int = 0  # decoded pictures kept in memory, in each loading process


@dataclass(frozen=True, kw_only=True)
class Restoration(Config):
    """A restorer of timm's registry, on pairs of pictures, by a loss of their pixels."""

    data: Pictures = Pictures()
    loss: Literal["l1", "mse", "charbonnier", "frequency", "ssim"] = "l1"
    tile: int | None = None  # validation in tiles of this many input pixels; None: whole where memory allows
    space: Literal["y", "rgb"] = "y"  # of PSNR and SSIM

    task: ClassVar[str] = "restoration"
    entry: ClassVar[str] = "visionhybrid.train.restore:Restore"


@dataclass(frozen=True, kw_only=True)
class Adversarial(Restoration):
    """Restoration with a perceptual loss and a discriminator; `loss` is that of the pixels. `optim` serves both networks."""

    pixel_weight: float = 1.0
    perceptual_weight: float = 1.0  # 0: without, and without VGG's weights
    adversarial_weight: float = 0.1
    # losses that see unsharp-masked truth
    sharp: tuple[Literal["pixel", "perceptual", "adversarial"], ...] = ()
    vgg: str = ""  # file of torchvision's VGG19 weights; empty: the one in torch's hub cache
    width: int = 64  # of the discriminator

    task: ClassVar[str] = "adversarial"
    entry: ClassVar[str] = "visionhybrid.train.gan:RestoreAdversarially"


@dataclass(frozen=True, kw_only=True)
class Diffusion:
    """What a generative model predicts, and which times it is trained at."""

    # "pipeline": what the scheduler of `model.pipeline` says, with its betas or shift
    predict: Literal["flow", "epsilon", "v", "pipeline"] = "flow"
    times: Literal["uniform", "logit_normal"] = "uniform"  # flow
    logit_mean: float = 0.0
    logit_std: float = 1.0
    shift: float = 1.0  # flow: above 1 more noise, in training and when sampling
    betas: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"  # epsilon, v
    beta_range: tuple[float, ...] = (1e-4, 0.02)
    # epsilon: "learned": the model gives a variance besides, in as many channels again, and learns it by the bound (DiT)
    variance: Literal["fixed", "learned"] = "fixed"
    min_snr: float | None = None  # epsilon, v: gamma of min-SNR weighting; 5 in its paper
    drop_label: float = 0.1  # share of images trained without their class or caption, which guidance needs


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How samples are drawn for the validation and for a person to look at."""

    steps: int = 50
    guidance: float = 1.0  # 1: none
    each: int = 8  # pictures of a class or prompt on the sheet
    classes: int = 10  # classes on the sheet, the first ones
    # file or run directory of a classifier: which percentage of samples it takes for the class asked for
    judge: str = ""
    judged: int = 0  # samples of each class that are judged


@dataclass(frozen=True, kw_only=True)
class Generator(Model):
    """What is trained: a new model, or the denoiser of a pipeline that exists, on captions (`data.dataset=captions`)."""

    # "hybrid_dit", "dit" (diffusers' DiTTransformer2DModel), "unet" (UNet2DModel): new, `options` are the class's keywords
    name: str = "pipeline"
    pipeline: str = ""  # name "pipeline": its diffusers folder, or name on the hub
    lora: int = 0  # rank of updates (LoRA) of the pipeline's attention, trained instead of it; 0: none


@dataclass(frozen=True, kw_only=True)
class Latent:
    """Training in the latent space of an autoencoder. A pipeline brings its own."""

    # folder or hub name of diffusers' AutoencoderKL or AutoencoderDC, or of a pipeline; empty: pixels
    vae: str = ""
    draw: Literal["sample", "mean"] = "sample"  # each time anew from the encoder's distribution, or its mean


@dataclass(frozen=True, kw_only=True)
class Text:
    """Captions, with `data.dataset=captions`: `data.root` is a folder of images, or has one for each split.

    They stand in `metadata.jsonl` or `metadata.csv` (columns file_name and `column`), or in NAME.txt beside NAME.png.
    """

    column: str = "text"
    missing: Literal["error", "skip"] = "error"  # an image without a caption; skipped ones are counted
    # a folder without splits: every so many-th image is held out; 0: none, validated on all
    hold_out: int = 20
    max_length: int = 0  # tokens of a T5-like encoder; 0: what the pipeline takes by itself
    guidance: float = 1.0  # told to a model with a distilled guidance (FLUX.1-dev); 1 asks for nothing
    prompts: tuple[str, ...] = ()  # drawn at each validation; none: the first captions held out


@dataclass(frozen=True, kw_only=True)
class Cache:
    """Encoded images and captions, computed once and kept on disk. Shared by runs: each takes what fits."""

    folder: str = "runs/cache"
    batch: int = 8  # images or captions encoded at once
    precision: Literal["float32", "float16"] = "float32"  # as they are stored


@dataclass(frozen=True, kw_only=True)
class Generation(Config):
    """A diffusion or flow model, new or of a pipeline, on pixels or latents of images with classes or captions."""

    model: Generator = Generator()
    data: Images = Images()
    diffusion: Diffusion = Diffusion()
    sampling: Sampling = Sampling()
    latent: Latent = Latent()
    text: Text = Text()
    cache: Cache = Cache()
    flip: float = 0.5  # share of images mirrored in training
    channels: Literal[1, 3] = 3
    eval_batch: int = 64

    task: ClassVar[str] = "generation"
    entry: ClassVar[str] = "visionhybrid.train.generate:Generate"
