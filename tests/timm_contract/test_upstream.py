"""Every test and fixture of the file that VISIONHYBRID_TIMM_TESTS names, as if it stood here."""

import importlib.util
import os

import pytest
import timm

pytestmark = pytest.mark.filterwarnings("default")

if not timm.__version__.startswith("1.0.31"):
    pytest.skip(f"the contract is that of timm 1.0.31, this is {timm.__version__}", allow_module_level=True)

_spec = importlib.util.spec_from_file_location("timm_test_models", os.environ["VISIONHYBRID_TIMM_TESTS"])
_upstream = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_upstream)
globals().update({k: v for k, v in vars(_upstream).items() if k.startswith("test_") or k == "cfg_device"})
