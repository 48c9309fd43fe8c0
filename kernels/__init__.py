"""Triton kernels, each held against the NumPy functions of `minillm` that say what it must compute.

One folder a family, always the same files: `reference.py` (which `minillm` functions are the truth),
`kernel.py` (the device code), `config.py` (tile sizes as pure functions), `op.py` (checks, autograd,
custom op, modules), `traffic.py` (bytes that must move) and `family.py` (what the commands check and time).

    python -m kernels compare norm      # against the reference, with or without a GPU
    python -m kernels compile norm      # registers, spills, load widths: needs no GPU
    python -m kernels bench norm        # fractions of the copy rate: needs one

This file imports nothing, so that a package that only probes for the name `kernels` loads neither torch
nor triton. The version stays plain and below 0.1.1 (see pyproject.toml).
"""

__version__ = "0.1.0"
MINILLM_KERNELS = True  # tells `python -m kernels` that no other package of this name shadows ours
