"""AdamW against `minillm.optim.AdamW`: by property, and over a training run of several tensors."""

import numpy as np
import pytest
import torch

from kernels import compare, registry
from kernels.adamw import op
from minillm import optim
from minillm.autograd import Tensor

pytestmark = [
    pytest.mark.equation("adam", "adamw", "master-weights"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU: test_adamw_gpu.py"),
]
PROPERTIES = {prop.name: prop for prop in registry.load("adamw").PROPERTIES}


def check(names, examples):
    outcomes = compare.compare("adamw", examples=examples, number=0, properties=names)
    assert outcomes
    failed = [outcome for outcome in outcomes if not outcome.passed]
    assert not failed, compare.report(failed)


@pytest.mark.parametrize("name", PROPERTIES)
def test_property(name):
    check([name], examples=6)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROPERTIES)
def test_property_on_many_examples(name):
    check([name], examples=50)


@pytest.mark.equation("grad-clip", "wd-param-groups")
@pytest.mark.parametrize("max_norm", [None, 1.0, 1e6])
def test_a_run_of_both_optimisers(max_norm):
    """Matrices decay, vectors do not, a parameter without a gradient decays; one norm over all, whole tiles and last ones."""
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(s).astype(np.float32) for s in ((33, 40), (17,), (1,), (0, 3), (32, 64), (3, 2, 5))]
    ours = op.AdamW([torch.from_numpy(a.copy()).requires_grad_() for a in arrays], 0.05, weight_decay=0.3)
    theirs = optim.AdamW([Tensor(a.copy()) for a in arrays], 0.05, weight_decay=0.3)
    for step in range(6):
        gradients = [rng.standard_normal(a.shape).astype(np.float32) for a in arrays]
        gradients[-1][:] = 0
        for p, g in zip(ours.parameters, gradients):
            p.grad = None if not g.any() else torch.from_numpy(g)
        ours.lr = theirs.lr = 0.05 / (1 + step)
        a, b = ours.step(max_norm), theirs.step([gradients], max_norm)
        assert a == pytest.approx(b, rel=1e-6)
        for p, q in zip(ours.parameters, theirs.parameters):
            np.testing.assert_allclose(p.detach().numpy(), q.numpy(), rtol=0, atol=4e-6)
    for name, value in theirs.state_dict().items():
        np.testing.assert_allclose(ours.state_dict()[name].numpy(), value, rtol=0, atol=4e-6, err_msg=name)


@pytest.mark.equation("master-weights")
def test_masters_keep_what_16_bits_lose():
    """A thousand steps of 1e-4 move a float16 parameter of 1 only through its master."""
    p = torch.ones(4, dtype=torch.float16).requires_grad_()
    optimizer = op.AdamW([p], 1e-4, weight_decay=0.0)
    for _ in range(20):
        p.grad = torch.ones_like(p)
        optimizer.step()
    (weight,) = optimizer.weights()
    assert torch.allclose(weight, torch.full((4,), 1 - 20e-4), atol=1e-6)
    assert torch.equal(p.detach(), weight.half()) and bool((p < 1).all())
    alone, m, n = torch.ones(4, dtype=torch.float16), torch.zeros(4), torch.zeros(4)
    for t in range(1, 21):
        op.adamw(alone, torch.ones(4, dtype=torch.float16), m, n, 1e-4, 0.9, 0.95, 1e-8, 0.0, t)
    assert torch.equal(alone, torch.ones(4, dtype=torch.float16))


def test_a_state_goes_from_one_side_to_the_other():
    rng = np.random.default_rng(1)
    arrays = [rng.standard_normal(s).astype(np.float32) for s in ((5, 6), (7,))]
    theirs = optim.AdamW([Tensor(a.copy()) for a in arrays])
    gradients = [[rng.standard_normal(a.shape).astype(np.float32) for a in arrays] for _ in range(2)]
    theirs.step([gradients[0]])
    ours = op.AdamW([torch.from_numpy(p.numpy().copy()).requires_grad_() for p in theirs.parameters])
    ours.load_state_dict(theirs.state_dict())
    for p, g in zip(ours.parameters, gradients[1]):
        p.grad = torch.from_numpy(g)
    ours.step(), theirs.step([gradients[1]])
    for p, q in zip(ours.parameters, theirs.parameters):
        np.testing.assert_allclose(p.detach().numpy(), q.numpy(), rtol=0, atol=1e-6)
    back = optim.AdamW([Tensor(a.copy()) for a in arrays])
    back.load_state_dict({name: t.numpy() for name, t in ours.state_dict().items()})
    assert back.t == 2 and np.array_equal(back.state_dict()["n.1"], ours.state_dict()["n.1"].numpy())
