"""timm's own model tests on our models: `VISIONHYBRID_TIMM_TESTS=.../timm-1.0.31/tests/test_models.py pytest tests/timm_contract`.

The file is in timm's source distribution only: `pip download --no-deps --no-binary timm timm==1.0.31`. Nothing of it is copied.
What applies of it is mirrored in `tests/test_models.py`, which always runs.
"""

import fnmatch
import os

import pytest
import timm

import visionhybrid

UPSTREAM = os.environ.get("VISIONHYBRID_TIMM_TESTS")
collect_ignore = [] if UPSTREAM else ["test_upstream.py"]


@pytest.fixture(autouse=True)
def _their_warnings(recwarn):
    """timm's tests do not run under `-W error`."""


def ours(filter="", module="", pretrained=False, exclude_filters="", **kwargs):
    """`timm.list_models` of our classifiers, whatever timm module is asked for; timm's exclusions hold."""
    classifiers = set(visionhybrid.list_models(task="classification"))
    every = _list_models("vh_*", pretrained=pretrained, exclude_filters=exclude_filters, **kwargs)
    patterns = [p for p in ([filter] if isinstance(filter, str) else filter) if p]
    return [
        name
        for name in every
        if name.split(".")[0] in classifiers
        and (not patterns or any(fnmatch.fnmatch(name, p) for p in patterns))
    ]


_list_models = timm.list_models
if UPSTREAM:
    # Read when the upstream file is imported, which builds its parameters from these.
    timm.list_models, timm.list_pretrained = ours, lambda *args, **kwargs: []


def pytest_collection_modifyitems(items):
    """Of the upstream file only what runs on a model of ours."""
    items[:] = [i for i in items if "test_upstream" not in i.nodeid or "vh_" in i.name]
