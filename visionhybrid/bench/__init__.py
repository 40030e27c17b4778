"""This machine's figures beside the peers': `python -m visionhybrid.bench models`."""
