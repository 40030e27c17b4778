"""Training on accelerate: config, one loop, run directories, tasks."""
