"""Interpreted or compiled: Triton decides once, when a kernel is decorated, so a process is one or the other."""

import os
import subprocess
import sys
from collections.abc import Sequence

from minillm.checks import optional_import

VARIABLE = "TRITON_INTERPRET"


def interpreted() -> bool:
    """Whether kernels decorated in this process run in Triton's interpreter."""
    return os.environ.get(VARIABLE, "").lower() in ("1", "true", "on", "yes", "y")


def has_gpu() -> bool:
    """Whether torch sees a GPU. Does not import triton."""
    return optional_import("torch", "kernels").cuda.is_available()


def settle(interpret: bool, arguments: Sequence[str]) -> int | None:
    """Put this process in the mode wanted, before triton is imported; None when it is.

    Where triton is already imported in the other mode, the command runs again in a child process, and its exit
    code is returned.
    """
    if interpreted() == interpret:
        return None
    if "triton" not in sys.modules:
        os.environ[VARIABLE] = "1" if interpret else "0"
        return None
    environment = {**os.environ, VARIABLE: "1" if interpret else "0"}
    return subprocess.run([sys.executable, "-m", "kernels", *arguments], env=environment, check=False).returncode
