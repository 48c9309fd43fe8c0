"""The gated units, the rotation and a network of all kernels on a GPU: exact witnesses, every property, two equal runs."""

import numpy as np
import pytest
import torch

from kernels import compare, registry
from kernels.transformer import Decoder
from minillm.models import Config
from minillm.models import Decoder as NumPyDecoder
from tests.kernels.gpu import EXAMPLES

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("family", ["activations", "rope"])
class TestFamily:
    def test_witnesses_are_exact(self, family):
        wrong = {n: count for n, count in registry.load_part(family, "witness").witnesses("cuda") if count}
        assert not wrong

    def test_properties(self, family):
        outcomes = compare.compare(family, examples=EXAMPLES, number=0)
        assert all(outcome.passed for outcome in outcomes), compare.report(outcomes)


def test_the_decoder_agrees_with_numpy_and_with_itself():
    config = Config(vocab_size=300, d_model=256, n_layers=3, n_heads=4, n_kv_heads=2, context=128, tied=True)
    model = NumPyDecoder(config, np.random.default_rng(0))
    ids = np.random.default_rng(1).integers(0, 300, (4, 100))
    network = Decoder(config, device="cuda")
    network.load_arrays(model.state_dict())
    given = torch.from_numpy(ids).cuda()
    np.testing.assert_allclose(network(given).detach().cpu().numpy(), model(ids).data, atol=2e-4)
    runs = []
    for _ in range(2):
        network.zero_grad()
        network(given, given, 400.0).backward()
        runs.append([p.grad.clone() for p in network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs))
