"""Real diffusers transformers with joint tokens or video grids, as small as those of `tiny_pipelines`, and inputs for them."""

from math import prod

import torch
from tiny_pipelines import _quiet, _seeded, clip_encoder, clip_tokenizer, t5_encoder, t5_tokenizer, vae

# of Flux
DOUBLE, SINGLE = "transformer_blocks.0.attn", "single_transformer_blocks.0.attn"


def flux(**config):
    """One block with two streams, two with one."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    defaults = dict(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=False,
    )
    return _quiet(
        FluxPipeline(
            transformer=_seeded(FluxTransformer2DModel, **{**defaults, **config}),
            vae=vae(shift_factor=0.1, scaling_factor=0.36),
            scheduler=FlowMatchEulerDiscreteScheduler(),
            text_encoder=clip_encoder(),
            tokenizer=clip_tokenizer(),
            text_encoder_2=t5_encoder(),
            tokenizer_2=t5_tokenizer(),
        )
    )


def sd3(**config):
    """Three blocks: one with an attention of the image's own (as 3.5 medium has), one plain, one that gives no text back."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    defaults = dict(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        pos_embed_max_size=32,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return _quiet(
        StableDiffusion3Pipeline(
            transformer=_seeded(SD3Transformer2DModel, **{**defaults, **config}),
            vae=vae(shift_factor=0.1, scaling_factor=0.36),
            scheduler=FlowMatchEulerDiscreteScheduler(),
            text_encoder=clip_encoder(width=16, projection=32),
            tokenizer=clip_tokenizer(),
            text_encoder_2=clip_encoder(width=16, projection=32),
            tokenizer_2=clip_tokenizer(),
            text_encoder_3=t5_encoder(),
            tokenizer_3=t5_tokenizer(),
        )
    )


def sana(**config):
    """SANA's transformer (its text encoder is Gemma): two blocks, norms of q and k over all heads as in SANA 1.5."""
    from diffusers import SanaTransformer2DModel

    defaults = dict(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=4,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=32,
        sample_size=16,
        qk_norm="rms_norm_across_heads",
    )
    return _seeded(SanaTransformer2DModel, **{**defaults, **config})


def hunyuan_video(**config):
    """HunyuanVideo's transformer: one block with two streams, two with one."""
    from diffusers import HunyuanVideoTransformer3DModel

    defaults = dict(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=False,
        text_embed_dim=32,
        pooled_projection_dim=32,
        rope_axes_dim=(4, 6, 6),
    )
    return _seeded(HunyuanVideoTransformer3DModel, **{**defaults, **config})


def cogvideox(**config):
    """Two blocks; rotary on the video, as in the larger models."""
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )

    defaults = dict(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=32,
        num_layers=2,
        sample_width=16,
        sample_height=16,
        sample_frames=9,
        patch_size=2,
        max_text_seq_length=32,
        use_rotary_positional_embeddings=True,
    )
    autoencoder = _seeded(
        AutoencoderKLCogVideoX,
        down_block_types=["CogVideoXDownBlock3D"] * 4,
        up_block_types=["CogVideoXUpBlock3D"] * 4,
        block_out_channels=[8] * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    )
    return _quiet(
        CogVideoXPipeline(
            transformer=_seeded(CogVideoXTransformer3DModel, **{**defaults, **config}),
            vae=autoencoder,
            scheduler=CogVideoXDDIMScheduler(),
            text_encoder=t5_encoder(),
            tokenizer=t5_tokenizer(),
        )
    )


def wan(**config):
    """Two blocks on a grid of frames, each with self attention and cross attention."""
    from diffusers import (
        AutoencoderKLWan,
        FlowMatchEulerDiscreteScheduler,
        WanPipeline,
        WanTransformer3DModel,
    )

    defaults = dict(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    autoencoder = _seeded(
        AutoencoderKLWan,
        base_dim=4,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )
    return _quiet(
        WanPipeline(
            transformer=_seeded(WanTransformer3DModel, **{**defaults, **config}),
            vae=autoencoder,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
            text_encoder=t5_encoder(umt5=True),
            tokenizer=t5_tokenizer(),
        )
    )


# ---- inputs --------------------------------------------------------------------------------------------------------


def _inputs(batch, *shape, text=7, **extra):
    """Hidden states of `shape`, text of width 32, a time; `extra` as it is, or drawn where it is a shape."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*sides):
        return torch.randn(batch, *sides, generator=generator)

    given = dict(
        hidden_states=drawn(*shape),
        encoder_hidden_states=drawn(text, 32),
        timestep=torch.full((batch,), 500),
    )
    return given | {key: drawn(*value) if isinstance(value, tuple) else value for key, value in extra.items()}


def flux_inputs(grid=(8, 10), text=12, batch=1):
    return _inputs(
        batch,
        grid[0] * grid[1],
        16,
        text=text,
        pooled_projections=(32,),
        timestep=torch.full((batch,), 0.5),
        img_ids=places(*grid),
        txt_ids=torch.zeros(text, 3),
    )


def places(height, width, frame=0):
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.full_like(y, frame), y, x], -1).reshape(-1, 3).float()


def wan_inputs(grid=(3, 4, 5), batch=1):
    return _inputs(batch, 16, grid[0], 2 * grid[1], 2 * grid[2])


def sd3_inputs(grid=(6, 8), batch=1):
    return _inputs(batch, 4, 2 * grid[0], 2 * grid[1], pooled_projections=(64,))


def sana_inputs(grid=(6, 8), batch=1):
    return _inputs(batch, 4, *grid)


def cogvideox_inputs(grid=(3, 4, 5), batch=1):
    angle = torch.randn(prod(grid), 8, generator=torch.Generator().manual_seed(1)).repeat_interleave(2, 1)
    rotary = [angle.cos(), angle.sin()]
    return _inputs(batch, grid[0], 4, 2 * grid[1], 2 * grid[2], image_rotary_emb=rotary)


def hunyuan_video_inputs(grid=(3, 4, 5), batch=1):
    """Padded text, of another length in every sample."""
    seen = (torch.arange(7) < torch.tensor([[4], [6]]))[:batch].long()
    sides = grid[0], 2 * grid[1], 2 * grid[2]
    return _inputs(batch, 4, *sides, encoder_attention_mask=seen, pooled_projections=(32,))


INPUTS = {
    "flux": flux_inputs,
    "sd3": sd3_inputs,
    "sana": sana_inputs,
    "wan": wan_inputs,
    "cogvideox": cogvideox_inputs,
    "hunyuan_video": hunyuan_video_inputs,
}
GRIDS = {"flux": (8, 10), "sd3": (6, 8), "sana": (6, 8)} | dict.fromkeys(
    ("wan", "cogvideox", "hunyuan_video"), (3, 4, 5)
)


def transformer(name):
    model = globals()[name]()
    return getattr(model, "transformer", model)


def output(model, **inputs):
    with torch.no_grad():
        return model(**inputs).sample
