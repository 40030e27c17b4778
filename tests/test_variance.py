"""A variance that is learned: the bound written out with distributions, and a run."""

from math import log, prod

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from visionhybrid.diffusion import HybridDiT
from visionhybrid.train import find, override, run
from visionhybrid.train.config import ConfigError, Diffusion
from visionhybrid.train.noising import noising

LEARNED = Diffusion(predict="epsilon", variance="learned")


def drawn(count=6):
    generator = torch.Generator().manual_seed(0)
    image, noise = (torch.randn(count, 2, 3, 3, generator=generator) for _ in range(2))
    return image.clamp(-1, 1), noise, torch.randn(count, 4, 3, 3, generator=generator)


def test_the_bound_is_the_divergence_of_two_steps():
    """The posterior as the product of what came before and the last step of the forward process."""
    process = noising(LEARNED)
    image, noise, output = drawn()
    times = torch.tensor([1.0, 5, 200, 500, 900, 999])
    noised = process.noised(image, noise, times)
    kept = process.ddim.alphas_cumprod.double()
    found = process.bound(output, image, noised, times)
    for i, t in enumerate(times.long().tolist()):
        alpha, beta = kept[t] / kept[t - 1], 1 - kept[t] / kept[t - 1]
        precision = alpha / beta + 1 / (1 - kept[t - 1])

        def mean(x, i=i, t=t, alpha=alpha, beta=beta, precision=precision):
            return (
                alpha.sqrt() * noised[i].double() / beta + kept[t - 1].sqrt() * x / (1 - kept[t - 1])
            ) / precision

        guess = (noised[i].double() - (1 - kept[t]).sqrt() * output[i, :2]) / kept[t].sqrt()
        place = (output[i, 2:].double() + 1) / 2
        log_variance = place * beta.log() + (1 - place) * -precision.log()
        ours = Normal(mean(guess), (log_variance / 2).exp())
        want = kl_divergence(Normal(mean(image[i].double()), precision.rsqrt()), ours).mean() / log(2)
        assert float(found[i]) == pytest.approx(float(want), rel=2e-3)


def test_the_last_step_is_measured_by_the_likelihood_of_8_bits():
    process = noising(LEARNED)
    values = torch.linspace(-1, 1, 256).view(256, 1, 1, 1)
    noised, output = torch.zeros_like(values), torch.zeros(256, 2, 1, 1)
    bits = process.bound(output, values, noised, torch.zeros(256))
    assert (-bits * log(2)).exp().sum() == pytest.approx(1, abs=1e-4)  # over all values: a distribution


def test_only_the_variance_learns_from_the_bound():
    process = noising(LEARNED)
    image, noise, output = drawn()
    output.requires_grad_()
    times = torch.tensor([0.0, 5, 200, 500, 900, 999])
    process.bound(output, image, process.noised(image, noise, times), times).sum().backward()
    assert not output.grad[:, :2].any()
    assert output.grad[:, 2:].any()


def test_a_run_learns_it(tmp_path):
    words = [
        "model.options.num_layers=1",
        "model.options.attention_head_dim=8",
        "loop.steps=2",
        "loop.batch_size=8",
    ]
    words += [
        "diffusion.predict=epsilon",
        "diffusion.times=uniform",
        "diffusion.variance=learned",
        "sampling.steps=1",
    ]
    words += ["sampling.each=1", "sampling.classes=1"]
    run(override(find("hybrid_dit_digits"), words), tmp_path, progress=False)
    model = HybridDiT.from_pretrained(tmp_path / "pipeline" / "transformer")
    assert model.head.out_features == prod((2, model.config.in_channels, model.config.patch_size**2))


@pytest.mark.parametrize("predict", ["flow", "v"])
def test_what_has_none_to_learn(predict):
    with pytest.raises(ConfigError, match=r"diffusion\.variance"):
        noising(Diffusion(predict=predict, variance="learned"))
