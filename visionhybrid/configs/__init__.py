"""Recipes: functions that return a `visionhybrid.train.config` dataclass, one file per system."""
