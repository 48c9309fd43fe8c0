"""What the device code of several families shares: the one place where the precision of a product is decided."""

import triton
import triton.language as tl


@triton.jit
def dot(a, b, acc):
    """acc + a @ b, accumulated in fp32; fp32 operands are multiplied as they are, not rounded to TF32 first."""
    return tl.dot(a, b, acc, input_precision="ieee")
