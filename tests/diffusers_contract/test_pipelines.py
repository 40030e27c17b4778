"""diffusers' pipeline tests on Stable Diffusion, 1.5 and XL, whose UNet has mixers."""

import pytest
import tiny_pipelines as tiny
from diffusers_tests.pipelines import testing_utils as upstream
from diffusers_tests.pipelines.pipeline_params import TEXT_TO_IMAGE_BATCH_PARAMS, TEXT_TO_IMAGE_PARAMS

import visionhybrid

# diffusers' tests do not run under `-W error`.
pytestmark = pytest.mark.filterwarnings("ignore")


class Config(upstream.BasePipelineTesterConfig):
    required_input_params_in_call_signature = TEXT_TO_IMAGE_PARAMS
    batch_input_params = TEXT_TO_IMAGE_BATCH_PARAMS
    output_shape = (3, 32, 32)

    @property
    def pipeline_class(self):
        return type(self.whole())

    def get_dummy_components(self):
        pipe = self.whole()
        visionhybrid.attach(pipe, "linfusion", zero_init=False)
        return pipe.components

    def get_dummy_inputs(self):
        return dict(
            prompt="a cat",
            generator=self.get_generator(0),
            num_inference_steps=2,
            guidance_scale=6.0,
            height=32,
            width=32,
            output_type="pt",
        )


class SD15(Config):
    whole = staticmethod(tiny.sd15)


class TestSD15(SD15, upstream.PipelineTesterMixin):
    def test_encode_prompt_works_in_isolation(self):
        # what this pipeline's encode_prompt needs beside the arguments of its call
        super().test_encode_prompt_works_in_isolation(dict(device="cpu", do_classifier_free_guidance=True))


class TestSD15Memory(SD15, upstream.MemoryTesterMixin):
    pass


class SDXL(Config):
    whole = staticmethod(tiny.sdxl)
    callback_cfg_params = frozenset(["prompt_embeds", "add_text_embeds", "add_time_ids"])


class TestSDXL(SDXL, upstream.PipelineTesterMixin):
    # It takes each optional component away, and a prompt cannot be read without the tokenizers.
    test_save_load_optional_components = None
