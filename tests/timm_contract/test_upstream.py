"""Every test and fixture of the file that VISIONHYBRID_TIMM_TESTS names, on our classifiers, as if it stood here."""

import fnmatch
import importlib.util
import os
import warnings
from unittest import mock

import pytest
import timm

import visionhybrid

# timm's tests do not run under `-W error`.
pytestmark = pytest.mark.filterwarnings("ignore")

if not timm.__version__.startswith("1.0.31"):
    pytest.skip(f"the contract is that of timm 1.0.31, this is {timm.__version__}", allow_module_level=True)


def plain_too(patterns):
    """timm's patterns, where those for its plain vision transformers mean ours as well; their features have no grid."""
    found = [p for p in patterns if p]
    return found + [f"vh_{p}" for p in found if p == "vit_*"]


def ours(filter="", module="", pretrained=False, exclude_filters="", every=timm.list_models, **kwargs):
    """`timm.list_models` of our classifiers, whichever timm module is asked for; timm's exclusions hold."""
    every_exclusion = plain_too([exclude_filters] if isinstance(exclude_filters, str) else exclude_filters)
    classifiers = set(visionhybrid.list_models(task="classification"))
    names = every("vh_*", pretrained=pretrained, exclude_filters=every_exclusion, **kwargs)
    patterns = plain_too([filter] if isinstance(filter, str) else filter)
    return [
        name
        for name in names
        if name.split(".")[0] in classifiers
        and (not patterns or any(fnmatch.fnmatch(name, p) for p in patterns))
    ]


spec = importlib.util.spec_from_file_location("timm_test_models", os.environ["VISIONHYBRID_TIMM_TESTS"])
upstream = importlib.util.module_from_spec(spec)
# It lists the models while it is imported; its markers are in timm's own settings, not in ours.
with (
    mock.patch("timm.list_models", ours),
    mock.patch("timm.list_pretrained", return_value=[]),
    warnings.catch_warnings(),
):
    warnings.simplefilter("ignore")
    spec.loader.exec_module(upstream)
globals().update({k: v for k, v in vars(upstream).items() if k.startswith("test_") or k == "cfg_device"})
