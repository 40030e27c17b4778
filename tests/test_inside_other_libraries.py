"""The classifiers inside the libraries people use them with: segmentation_models_pytorch, transformers, torchvision, ONNX Runtime."""

from collections import OrderedDict

import pytest
import timm
import torch
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from visionhybrid.models import registry

# One of each family, and depths that keep its kinds of blocks.
SHORT = {
    "vh_a2mamba_nano": (1, 1, 1, 1),
    "vh_mala_tiny": (1, 1, 1, 1),
    "vh_nextvit_small": (1, 1, 5, 1),
    "vh_ravlt_tiny": (1, 1, 1, 1),
}
NAMES = [name for name in SHORT if name in registry.SYSTEM_OF]
families = pytest.mark.parametrize("name", NAMES)


def with_gradient(model):
    return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


@families
def test_encoder_of_segmentation_models_pytorch(name):
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = smp.Unet(f"tu-{name}", encoder_weights=None, classes=3, in_channels=4, depths=SHORT[name])
    assert model.encoder.out_channels[2:] == [
        info["num_chs"] for info in timm.create_model(name, device="meta").feature_info
    ]
    x = torch.randn(2, 4, 64, 96)
    masks = model.train()(x)
    assert masks.shape == (2, 3, 64, 96)
    masks.backward(torch.randn_like(masks))
    encoder = {key for key, _ in model.encoder.named_parameters()}
    assert encoder - with_gradient(model.encoder) == set()


@families
def test_backbone_of_transformers(name):
    transformers = pytest.importorskip("transformers")
    config = transformers.TimmBackboneConfig(backbone=name, out_indices=(1, 3), use_pretrained_backbone=False)
    model = transformers.TimmBackbone(config).eval()
    state = {key.removeprefix("_backbone."): value for key, value in model.state_dict().items()}
    plain = timm.create_model(name, features_only=True).eval()
    plain.load_state_dict(state)
    x = torch.randn(1, 3, 65, 96)
    with torch.inference_mode():
        want, found = plain(x), model(x)
    torch.testing.assert_close(list(found.feature_maps), [want[1], want[3]], atol=0, rtol=0)
    assert list(model.channels) == [want[1].shape[1], want[3].shape[1]]


class Pyramid(nn.Module):
    """Our features through torchvision's pyramid: (B, 3, H, W) -> maps "0" to "3" and "pool"."""

    out_channels = 32

    def __init__(self, name):
        super().__init__()
        self.body = timm.create_model(name, features_only=True, depths=SHORT[name])
        channels = self.body.feature_info.channels()
        self.fpn = FeaturePyramidNetwork(channels, self.out_channels, extra_blocks=LastLevelMaxPool())

    def forward(self, x):
        return self.fpn(OrderedDict((str(i), tap) for i, tap in enumerate(self.body(x))))


@families
def test_detector_of_torchvision(name):
    anchors = AnchorGenerator(tuple((side,) for side in (8, 16, 32, 64, 128)), ((0.5, 1.0, 2.0),) * 5)
    model = FasterRCNN(
        Pyramid(name),
        num_classes=3,
        rpn_anchor_generator=anchors,
        min_size=70,
        max_size=110,
        box_detections_per_img=5,
    )
    images = [torch.rand(3, 64, 100), torch.rand(3, 90, 60)]
    target = dict(boxes=torch.tensor([[8.0, 8.0, 40.0, 48.0]]), labels=torch.tensor([1]))
    losses = model.train()(images, [target, target])
    assert len(losses) == 4
    sum(losses.values()).backward()
    body = {key for key, _ in model.backbone.body.named_parameters()}
    assert body - with_gradient(model.backbone.body) == set()
    with torch.inference_mode():
        for found in model.eval()(images):
            assert found["boxes"].shape[1] == 4
            assert found["scores"].isfinite().all()


@families
@pytest.mark.filterwarnings("ignore")  # torch's exporter has plenty
def test_onnx_runtime_at_any_size(name, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = timm.create_model(name, num_classes=5, depths=SHORT[name]).eval()
    free = torch.export.Dim.DYNAMIC
    program = torch.onnx.export(
        model,
        (torch.randn(2, 3, 64, 96),),
        dynamo=True,
        dynamic_shapes=({0: free, 2: free, 3: free},),
        verbose=False,
        optimize=False,  # a third of the time
    )
    assert {node.domain for node in program.model.graph} == {""}  # standard operators only
    program.save(tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for shape in ((2, 3, 64, 96), (1, 3, 97, 70)):
        x = torch.randn(shape)
        (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.inference_mode():
            torch.testing.assert_close(torch.from_numpy(got), model(x), atol=1e-4, rtol=1e-4)
