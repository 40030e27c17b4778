"""Real diffusers pipelines of a few thousand parameters, built from configs: no network, no files, seconds each.

Every builder takes keywords that override its denoiser's config. Weights are random but seeded, so two calls give equal models.
"""

import string

import torch


def _seeded(cls, **config):
    torch.manual_seed(0)
    return cls(**config).eval()


# ---- text ------------------------------------------------------------------------------------------------------------


def clip_tokenizer(length=77):
    """CLIP's byte-level tokenizer with an alphabet of the printable ASCII bytes and no merges."""
    from transformers import CLIPTokenizer

    letters = string.digits + string.ascii_letters + string.punctuation
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={p: i for i, p in enumerate(pieces)}, merges=[], model_max_length=length)


def clip_encoder(width=32, projection=None):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    size = len(clip_tokenizer())
    config = CLIPTextConfig(
        vocab_size=size,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=projection or width,
        bos_token_id=size - 2,
        eos_token_id=size - 1,
        pad_token_id=size - 1,
    )
    torch.manual_seed(0)
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def t5_tokenizer(length=32):
    from transformers import T5Tokenizer

    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *string.ascii_lowercase, *string.digits]
    return T5Tokenizer(
        vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0, model_max_length=length
    )


def t5_encoder(width=32, umt5=False):
    import transformers

    config = transformers.UMT5Config if umt5 else transformers.T5Config
    model = transformers.UMT5EncoderModel if umt5 else transformers.T5EncoderModel
    torch.manual_seed(0)
    return model(
        config(vocab_size=64, d_model=width, d_kv=8, d_ff=2 * width, num_layers=1, num_heads=4)
    ).eval()


# ---- pictures --------------------------------------------------------------------------------------------------------


def vae(latent=4, **config):
    """An autoencoder that halves each side."""
    from diffusers import AutoencoderKL

    return _seeded(
        AutoencoderKL,
        block_out_channels=[16, 16],
        norm_num_groups=8,
        latent_channels=latent,
        sample_size=32,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        **config,
    )


UNET = dict(
    sample_size=16,
    block_out_channels=[32, 64],
    layers_per_block=1,
    norm_num_groups=8,
    attention_head_dim=4,
    cross_attention_dim=32,
    down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
    up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
)


def unet(**config):
    """Four spatial self-attentions (down 1, up 2, mid 1), as many cross-attentions."""
    from diffusers import UNet2DConditionModel

    return _seeded(UNet2DConditionModel, **{**UNET, **config})


def unet_inputs(batch=2, size=(16, 16), width=32):
    draw = torch.Generator().manual_seed(0)
    return dict(
        sample=torch.randn(batch, 4, *size, generator=draw),
        timestep=torch.full((batch,), 10),
        encoder_hidden_states=torch.randn(batch, 7, width, generator=draw),
    )


def sd15(**config):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    return _quiet(
        StableDiffusionPipeline(
            vae=vae(),
            text_encoder=clip_encoder(),
            tokenizer=clip_tokenizer(),
            unet=unet(**config),
            scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


def sdxl(**config):
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    defaults = dict(
        cross_attention_dim=64,
        attention_head_dim=[2, 4],
        transformer_layers_per_block=[1, 2],
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
    )
    return _quiet(
        StableDiffusionXLPipeline(
            vae=vae(),
            text_encoder=clip_encoder(),
            text_encoder_2=clip_encoder(projection=32),
            tokenizer=clip_tokenizer(),
            tokenizer_2=clip_tokenizer(),
            unet=unet(**{**defaults, **config}),
            scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear"),
        )
    )


def dit(**config):
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    transformer = _seeded(
        DiTTransformer2DModel,
        **{
            **dict(
                sample_size=16,
                num_layers=2,
                patch_size=2,
                attention_head_dim=8,
                num_attention_heads=2,
                in_channels=4,
                out_channels=8,
                num_embeds_ada_norm=1000,
                norm_type="ada_norm_zero",
                norm_elementwise_affine=False,
            ),
            **config,
        },
    )
    return _quiet(
        DiTPipeline(
            transformer=transformer,
            vae=vae(),
            scheduler=DDIMScheduler(),
            id2label={i: f"class {i}" for i in range(1000)},
        )
    )


def pixart(**config):
    from diffusers import DDIMScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

    transformer = _seeded(
        PixArtTransformer2DModel,
        **{
            **dict(
                sample_size=16,
                num_layers=2,
                patch_size=2,
                attention_head_dim=8,
                num_attention_heads=3,
                caption_channels=32,
                in_channels=4,
                cross_attention_dim=24,
                out_channels=8,
                attention_bias=True,
                num_embeds_ada_norm=1000,
                norm_type="ada_norm_single",
                norm_elementwise_affine=False,
                use_additional_conditions=False,
            ),
            **config,
        },
    )
    return _quiet(
        PixArtAlphaPipeline(
            transformer=transformer,
            vae=vae(),
            scheduler=DDIMScheduler(),
            text_encoder=t5_encoder(),
            tokenizer=t5_tokenizer(),
        )
    )


def _quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, *, size=(32, 32), seed=0, **call):
    """One small picture as a tensor (B, H, W, 3), or video (B, T, H, W, 3), in [0, 1], two steps."""
    call.setdefault("num_inference_steps", 2)
    if type(pipeline).__name__ == "DiTPipeline":
        call.setdefault("class_labels", [1])
    else:
        call = {"prompt": "a cat", "height": size[0], "width": size[1], **call}
    if type(pipeline).__name__.startswith("PixArt"):
        call = {"use_resolution_binning": False, "clean_caption": False, **call}
    if type(pipeline).__name__ in (
        "FluxPipeline",
        "StableDiffusion3Pipeline",
        "WanPipeline",
        "CogVideoXPipeline",
    ):
        call = {"max_sequence_length": 32, **call}
    frames = {"WanPipeline": 5, "CogVideoXPipeline": 9}.get(type(pipeline).__name__)
    call = call if frames is None else {"num_frames": frames, **call}
    noise = torch.Generator().manual_seed(seed)
    output = pipeline(generator=noise, output_type="np", **call)
    return torch.from_numpy(output.images if hasattr(output, "images") else output.frames)


def saved_and_loaded(pipe, folder):
    from diffusers import DiffusionPipeline

    pipe.save_pretrained(folder)
    return _quiet(DiffusionPipeline.from_pretrained(folder))


def image_projection():
    """What an IP-Adapter's file holds of its image encoder: four tokens of width 32, made up."""
    return {
        "proj.weight": torch.randn(4 * 32, 16),
        "proj.bias": torch.randn(4 * 32),
        "norm.weight": torch.ones(32),
        "norm.bias": torch.zeros(32),
    }
