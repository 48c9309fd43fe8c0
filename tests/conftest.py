"""What every test runs under: checked annotations, hypothesis profiles, and the rules for slow and GPU tests."""

import functools
import importlib.util
import os
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, settings

from tests import typecheck

typecheck.install()  # before any test module imports minillm

CI = os.environ.get("CI", "") not in ("", "0", "false")

# The machine's speed must not decide whether a test passes; in CI neither must chance.
_common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("ci", derandomize=True, database=None, **_common)
settings.register_profile("local", print_blob=True, **_common)
settings.load_profile("ci" if CI else "local")


@functools.cache
def has_gpu() -> bool:
    """Whether torch sees a GPU, asked of another process so that this one stays without torch."""
    probe = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", probe], capture_output=True, check=False).returncode == 0


# Triton decides whether it interprets when it is first imported, and oracles import it too: settled before any of them.
if importlib.util.find_spec("triton") and "TRITON_INTERPRET" not in os.environ and not has_gpu():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip slow tests outside CI, and GPU tests where there is no GPU."""
    skips = {}
    if not CI:
        skips["slow"] = pytest.mark.skip(reason="slow: runs with CI=1")
    else:
        skips["quick"] = pytest.mark.skip(reason="quick: a slow test of the same runs")
    if any(item.get_closest_marker("gpu") for item in items) and not has_gpu():
        skips["gpu"] = pytest.mark.skip(reason="needs a GPU")
    for item in items:
        for name, skip in skips.items():
            if item.get_closest_marker(name):
                item.add_marker(skip)
