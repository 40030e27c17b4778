"""Trained models at use: tiled restoration, classification of files, attribution maps."""
