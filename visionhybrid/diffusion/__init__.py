"""Generators that diffusers' pipelines are made of: transformers and pipelines of our own. Needs diffusers; imported on use."""

from visionhybrid.diffusion.hybrid_dit import HybridDiT
from visionhybrid.diffusion.pipeline import HybridDiTPipeline, UNetPipeline

__all__ = ["HybridDiT", "HybridDiTPipeline", "UNetPipeline"]
