"""diffusers' own tests on models with mixers: `VISIONHYBRID_DIFFUSERS=.../diffusers pytest tests/diffusers_contract`.

The variable names a checkout of diffusers' repository, of the installed version or near it; its tests are in no package. They
need peft, parameterized and requests-mock. Nothing of them is copied; what matters most of them is mirrored in
`tests/test_hosts_saving.py`, `test_hosts_lora.py` and `test_hosts_compatible.py`, which always run.
"""

import os
import sys
import warnings
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

CHECKOUT = os.environ.get("VISIONHYBRID_DIFFUSERS")
collect_ignore = [] if CHECKOUT else ["test_models.py", "test_pipelines.py"]

if CHECKOUT:
    # Under a name of its own: pytest calls this repository's folder `tests` as well.
    spec = spec_from_file_location("diffusers_tests", Path(CHECKOUT, "tests", "__init__.py"))
    sys.modules["diffusers_tests"] = module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its markers are in settings of its own
        for part in ("models", "pipelines"):
            import_module(f"diffusers_tests.{part}.testing_utils")
