"""What every process of the tests needs at once; fixtures stand in `common_fixtures.py`."""

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for processes that tests start, beside other tests


def pytest_configure(config: pytest.Config) -> None:
    """Fixtures import torch and diffusers, which takes seconds: the process that hands tests to others has no need."""
    hands_out = bool(config.getoption("tx", None)) and not hasattr(config, "workerinput")
    if not hands_out:
        config.pluginmanager.import_plugin("common_fixtures")
