"""decode on a GPU: exact witnesses, equal bits in two runs, every property, far offsets."""

import pytest
import torch

from kernels import compare
from kernels.decode import op, witness
from tests.kernels.gpu import EXAMPLES

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", witness.FORMS)
def test_witnesses_are_exact(form, dtype):
    """Equality for every shape, dtype and form: finds layout and assembler bugs that a tolerance would hide."""
    found = witness.of_form("cuda", dtype, form)
    assert not {name: count for name, count in found if count}


@pytest.mark.parametrize("name", [prop.name for prop in compare.registry.load("decode").PROPERTIES])
def test_property(name):
    outcomes = compare.compare("decode", examples=EXAMPLES, number=0, properties=[name])
    assert all(outcome.passed for outcome in outcomes), compare.report(outcomes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 32, 8, 1, 5000, 128), (1, 8, 1, 4, 30_000, 64), (70_000, 1, 1, 1, 3, 16)])
def test_two_runs_agree_in_every_bit(shape, dtype):
    """The last shape has more heads than a grid's second axis could hold."""
    B, H, H_kv, L_q, capacity, d = shape
    q, k, v = (
        torch.randn(B, n, L, d, device="cuda").to(dtype) for n, L in ((H, L_q), (H_kv, capacity), (H_kv, capacity))
    )
    first = op.decode_attention(q, k, v)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, op.decode_attention(q, k, v)))


def test_a_cache_beyond_two_billion_elements():
    memory = torch.zeros(2**31 + 2**20, dtype=torch.float16, device="cuda")
    far = memory.as_strided((1, 1, 3, 128), (0, 0, 2**30 + 256, 1))
    far.copy_(torch.randn(1, 1, 3, 128))
    q, near = torch.randn(1, 4, 1, 128, device="cuda").half(), far.contiguous()
    assert all(torch.equal(a, b) for a, b in zip(op.decode_attention(q, far, far), op.decode_attention(q, near, near)))
