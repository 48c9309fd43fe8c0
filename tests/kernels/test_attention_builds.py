"""The closed form of the tensor-core instructions of attention; the rest of what is compiled: test_builds.py."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_tensor_core_instructions_follow_from_the_tiles():
    """One target and width in the fast part: the forward on Hopper, with the closed form held by the build itself."""
    code = (
        "from kernels import inspection\nfrom kernels.aot import attempt\nfrom kernels.attention import builds, config\n"
        "tile = config.plan_for('sm_90', 2, 128, 128).forward\n"
        "build = builds.forward('sm_90', 'causal', 'bf16', 128, 128, tile)\n"
        "(compiled,) = attempt([build], 'sm_90')\n"
        "print(compiled.tensor_core, compiled.register_a, inspection.faults(build, compiled, 'sm_90'))\n"
        "print(builds.products('sm_90', tile, [(128, 128, 128), (128, 128, 128)]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    found, wanted = done.stdout.strip().splitlines()
    assert found.split()[0] == wanted == "16", done.stderr
    assert found.endswith("[]")
