"""diffusers' model tests on models with mixers, built from a config as any model of diffusers'."""

import pytest
import tiny_pipelines as tiny
import tiny_transformers as transformers
import torch
from diffusers.models.attention_processor import AttnProcessor
from diffusers_tests.models import testing_utils as upstream

import visionhybrid

# diffusers' tests do not run under `-W error`.
pytestmark = pytest.mark.filterwarnings("ignore")


class Config(upstream.BaseModelTesterConfig):
    """A tiny model of tests/tiny_pipelines.py with mixers, as its class and config say."""

    mixer, options = "linfusion", {}
    output_shape = (4, 16, 16)
    model_split_percents = (0.5, 0.7)

    @staticmethod
    def plain():
        raise NotImplementedError

    def _mixed(self):
        with torch.random.fork_rng():  # upstream seeds before it asks for the class and its config
            model = self.plain()
            visionhybrid.attach(model, self.mixer, **self.options)
        return model

    @property
    def model_class(self):
        return type(self._mixed())

    def get_init_dict(self):
        return {key: value for key, value in self._mixed().config.items() if not key.startswith("_")}


class Attention(upstream.AttentionTesterMixin):
    def test_attention_processor_dict(self):
        """Upstream overwrites every processor; a mixer has to be detached for that, and this is said."""
        model = self.model_class(**self.get_init_dict())
        with pytest.raises(ValueError, match="runs a mixer; detach that layer first"):
            model.set_attn_processor({key: AttnProcessor() for key in model.attn_processors})


class UNet(Config):
    plain = staticmethod(tiny.unet)

    def get_dummy_inputs(self):
        return tiny.unet_inputs()


class TestUNet(UNet, upstream.ModelTesterMixin):
    pass


class TestUNetAttention(UNet, Attention):
    pass


class TestUNetLora(UNet, upstream.LoraTesterMixin):
    pass


class TestUNetTraining(UNet, upstream.TrainingTesterMixin):
    pass


class TestUNetMemory(UNet, upstream.MemoryTesterMixin):
    pass


class TestUNetCompile(UNet, upstream.TorchCompileTesterMixin):
    pass


class TestUNetOfNeighborhoods(UNet, upstream.ModelTesterMixin, upstream.TrainingTesterMixin):
    """A mixer that needs the grid and has no weights."""

    mixer, options = "neighborhood", {"kernel_size": 3}


class DiT(Config):
    output_shape = (8, 16, 16)

    @staticmethod
    def plain():
        return tiny.dit().transformer

    def get_dummy_inputs(self):
        draw = torch.Generator().manual_seed(0)
        return dict(
            hidden_states=torch.randn(2, 4, 16, 16, generator=draw),
            timestep=torch.tensor([1, 2]),
            class_labels=torch.tensor([3, 4]),
        )


class TestDiT(DiT, upstream.ModelTesterMixin):
    pass


class TestDiTTraining(DiT, upstream.TrainingTesterMixin):
    pass


class PixArt(Config):
    output_shape = (8, 16, 16)

    @staticmethod
    def plain():
        return tiny.pixart().transformer

    def get_dummy_inputs(self):
        draw = torch.Generator().manual_seed(0)
        return dict(
            hidden_states=torch.randn(2, 4, 16, 16, generator=draw),
            encoder_hidden_states=torch.randn(2, 7, 32, generator=draw),
            timestep=torch.tensor([1, 2]),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        )


class TestPixArt(PixArt, upstream.ModelTesterMixin):
    pass


class TestPixArtAttention(PixArt, Attention):
    pass


class TestPixArtTraining(PixArt, upstream.TrainingTesterMixin):
    pass


class Flux(Config):
    output_shape = (80, 16)
    mixer, options = "sla", {"topk": 0.3, "block_q": 16, "block_k": 16}

    @staticmethod
    def plain():
        return transformers.transformer("flux")

    def get_dummy_inputs(self):
        return transformers.flux_inputs()


class TestFlux(Flux, upstream.ModelTesterMixin):
    pass


class TestFluxAttention(Flux, Attention):
    pass


class TestFluxLora(Flux, upstream.LoraTesterMixin):
    pass


class TestFluxTraining(Flux, upstream.TrainingTesterMixin):
    pass


class TestFluxMemory(Flux, upstream.MemoryTesterMixin):
    pass


class TestFluxWithClear(Flux, upstream.ModelTesterMixin, upstream.TrainingTesterMixin):
    """A mixer that needs the grid, which is read from `img_ids`."""

    mixer, options = "clear", {"radius": 1.5, "down": 2}


class SD3(Config):
    output_shape = (4, 12, 16)

    @staticmethod
    def plain():
        return transformers.transformer("sd3")

    def get_dummy_inputs(self):
        return transformers.sd3_inputs(batch=2)


class TestSD3(SD3, upstream.ModelTesterMixin):
    pass


class TestSD3Attention(SD3, Attention):
    pass


class TestSD3Training(SD3, upstream.TrainingTesterMixin):
    pass


class Wan(Config):
    output_shape = (16, 3, 8, 10)
    mixer, options = "sla", {"topk": 0.3, "block_q": 16, "block_k": 16}

    @staticmethod
    def plain():
        return transformers.transformer("wan")

    def get_dummy_inputs(self):
        return transformers.wan_inputs()


class TestWan(Wan, upstream.ModelTesterMixin):
    pass


class TestWanAttention(Wan, Attention):
    pass


class TestWanLora(Wan, upstream.LoraTesterMixin):
    pass


class TestWanTraining(Wan, upstream.TrainingTesterMixin):
    pass


class TestWanMemory(Wan, upstream.MemoryTesterMixin):
    pass
