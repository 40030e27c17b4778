"""Pictures and numbers: image files, resizing, degradations, metrics, datasets, sample images."""
