"""How much the tests on a GPU try: there every new problem compiles its own kernels, seconds each, so few go a long way.

A lent GPU has no time to lose: `python -m pytest -n 12 -m gpu tests/kernels` compiles on all cores at once, and
GPU_EXAMPLES=25 looks longer. MINILLM_TYPECHECK=0 does without beartype where that is not installed.
"""

import os

EXAMPLES = int(os.environ.get("GPU_EXAMPLES", "4"))
