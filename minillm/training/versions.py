r"""What the last bits of a run depend on, beside its settings."""

import platform
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from threadpoolctl import threadpool_info


def versions(threads: int) -> dict[str, Any]:
    """Python, NumPy, the matrix library with its kernel for this processor, and the number of threads."""
    blas = [info for info in threadpool_info() if info.get("user_api") == "blas"]
    return {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "blas": [f"{i.get('internal_api')} {i.get('version')} {i.get('architecture', '')}".strip() for i in blas][:1],
        "threads": threads,
    }


def warn_of_differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Warn that a resumed run may differ in the last bits, and say why."""
    keys = dict.fromkeys([*now, *saved])
    changed = [f"{key} {saved.get(key)} -> {now.get(key)}" for key in keys if saved.get(key) != now.get(key)]
    if changed:
        warnings.warn(
            f"resume: {', '.join(changed)}; the run goes on, but not to the bit as it would have.", stacklevel=3
        )
