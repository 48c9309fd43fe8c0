"""The losses against the NumPy reference, by property; in all forms; and what the estimators' gradients are in mean."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from kernels import compare, registry
from kernels.token_loss import op, prepare
from minillm.autograd import Tensor, grad
from minillm.functional import information, policy_losses, reductions
from minillm.functional import losses as written
from minillm.fused import losses as derived

pytestmark = [
    pytest.mark.equation(
        "softmax", "softmax-stable", "softmax-jacobian", "log-softmax", "logsumexp", "gather-logprob", "entropy",
        "cross-entropy-logits", "label-smoothing", "lm-head", "ppo-clip", "ppo-gradient-region", "ppo-dual-clip",
        "ppo-lm-loss", "grpo-loss", "grpo-clip-higher", "grpo-ratio-token", "grpo-ratio-sequence", "gspo", "tis",
        "importance-ratio", "entropy-bonus", "loss-aggregation", "kl-estimator-is", "sample-behaviour-logprob",
    ),
    pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU: test_token_loss_gpu.py"),
]  # fmt: skip
PROPERTIES = {prop.name: prop for prop in registry.load("token_loss").PROPERTIES}
BOTH = ("gradient",)  # in both precisions also in the fast tests; the others take turns


ON_SOME = (  # functions only, in the fast tests: what does not depend on what is computed
    "layouts", "inputs-unchanged", "contract", "guard-zones", "deterministic", "any-strip", "any-launch", "soiled-rows",
    "nothing-counts", "empty",
)  # fmt: skip
SOME = ("log_softmax", "policy_loss", "linear_token_logprobs")


def check(names, examples, dtypes=None, functions=None):
    subject = compare.our_subject("token_loss")
    if functions:
        subject = replace(subject, functions={name: subject.functions[name] for name in functions})
    outcomes = compare.compare(
        "token_loss", subject, examples=examples, number=0, properties=names, dtypes=dtypes
    )  # fmt: skip
    assert outcomes
    print(compare.report(outcomes))
    failed = [outcome for outcome in outcomes if not outcome.passed]
    assert not failed, compare.report(failed)


@pytest.mark.quick
@pytest.mark.parametrize("name", PROPERTIES)
def test_property(name):
    turn = ("float32", "float16")[sorted(PROPERTIES).index(name) % 2]
    check([name], 3, None if name in BOTH else [turn], SOME if name in ON_SOME else None)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_all_properties_on_many_examples(dtype):
    """In one call, so that what several properties look at is computed once."""
    check(list(PROPERTIES), 4, dtypes=[dtype])


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_written_derived_and_fast_agree(rng):
    """Cross-entropy in three forms and both fast ways: value and gradient, in float32, on one draw."""
    z = rng.standard_normal((4, 33)).astype(np.float32)
    targets = np.array([0, 32, -100, 5])
    found = []
    for form in (written.cross_entropy, derived.cross_entropy):
        x = Tensor(z, requires_grad=True)
        loss = form(x, targets)
        found.append((loss.item(), grad([loss], [x])[0].numpy()))
    for inplace in (False, True):
        x = torch.from_numpy(z.copy()).requires_grad_()
        loss = op.cross_entropy(x, torch.from_numpy(targets), inplace=inplace)
        found.append((loss.item(), torch.autograd.grad(loss, x)[0].numpy().copy()))
    for value, gradient in found[1:]:
        assert value == pytest.approx(found[0][0], abs=1e-6)
        np.testing.assert_allclose(gradient, found[0][1], rtol=0, atol=1e-6)


def enumerated(kind, V=7, kl_ratio=False):
    """The mean over a sampled token of its estimate and of the estimate's gradient, each token a row of one batch."""
    rng = np.random.default_rng(3)
    z, ref = rng.normal(size=(2, V))
    log_p, log_q = (x - np.log(np.exp(x).sum()) for x in (z, ref))
    p = np.exp(log_p)
    logits = torch.from_numpy(np.tile(z, (V, 1, 1)).astype(np.float32)).requires_grad_()  # (V, 1, V)

    def column(values):
        return torch.from_numpy(np.asarray(values, np.float32)[:, None])

    tokens = torch.arange(V)[:, None]
    found = op.policy_loss(
        logits, tokens, column(log_p), torch.zeros(V), torch.ones(V, 1, dtype=torch.bool), column(log_q),
        column(p), beta=1.0, kl=kind, kl_ratio=kl_ratio, reduction="sum",
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(found.loss, logits)
    estimate = getattr(found, kind)[:, 0].double().numpy()
    return float(p @ estimate), p @ gradient[:, 0].double().numpy(), z, ref


def exact(direction):
    """Divergence and its gradient by the logits, from the reference package."""
    _, _, z, ref = enumerated("k1")
    x = Tensor(z, requires_grad=True)
    divergence = information.kl_token_exact(x, Tensor(ref), direction)
    return divergence.item(), grad([divergence], [x])[0].numpy()


@pytest.mark.equation("kl-estimator-k1", "kl-estimator-k2", "kl-estimator-k3", "kl-divergence")
def test_estimators_over_an_enumerated_vocabulary():
    """Means: k1 and k3 are the divergence. Mean gradients: k1's is 0, k2's that of KL(p||ref), k3's that of KL(ref||p)."""
    reverse, d_reverse = exact("reverse")
    _, d_forward = exact("forward")
    (m1, g1, *_), (_, g2, *_), (m3, g3, *_) = (enumerated(kind) for kind in ("k1", "k2", "k3"))
    assert m1 == pytest.approx(reverse, abs=1e-6)
    assert m3 == pytest.approx(reverse, abs=1e-6)
    np.testing.assert_allclose(g1, 0, atol=1e-6)
    np.testing.assert_allclose(g2, d_reverse, atol=1e-6)
    np.testing.assert_allclose(g3, d_forward, atol=1e-6)
    assert np.abs(d_reverse - d_forward).max() > 0.01  # the test tells them apart


@pytest.mark.equation("kl-estimator-is")
@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_with_the_ratio_differentiated_both_have_the_reverse_gradient(kind):
    np.testing.assert_allclose(enumerated(kind, kl_ratio=True)[1], exact("reverse")[1], atol=1e-6)


@pytest.mark.equation("entropy-bonus")
def test_entropy_gradient_by_its_formula(rng):
    """dH/dz = -p (log p + H)."""
    z = torch.from_numpy(rng.standard_normal((3, 19)).astype(np.float32)).requires_grad_()
    _, _, entropy = op.token_logprobs(z, torch.zeros(3, dtype=torch.int64))
    (gradient,) = torch.autograd.grad(entropy.sum(), z)
    log_p = torch.log_softmax(z.detach().double(), -1)
    p = log_p.exp()
    expected = -p * (log_p - (p * log_p).sum(-1, keepdim=True))
    torch.testing.assert_close(gradient.double(), expected, atol=1e-6, rtol=0)


@pytest.mark.equation("loss-aggregation")
@pytest.mark.parametrize("reduction", reductions.REDUCTIONS)
@pytest.mark.parametrize("all_masked", [False, True])
def test_weights_are_those_of_the_reference(reduction, all_masked):
    keep = np.zeros((3, 4), bool) if all_masked else np.array([[1, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]], bool)
    for divisor in (None, 5.0) if reduction != "sum" else (None,):
        ours = prepare.token_weights(torch.from_numpy(keep), reduction, 6, divisor).numpy()
        np.testing.assert_allclose(
            ours, reductions.aggregation_weights(keep, reduction, length=6, divisor=divisor), rtol=1e-6
        )


@pytest.mark.equation("grpo-loss")
def test_the_loss_is_the_packages_own(rng):
    """Beside `minillm.functional.policy_losses.grpo_loss` on log-probs, with everything switched on."""
    B, T, V = 3, 4, 11
    z = rng.standard_normal((B, T, V)).astype(np.float32)
    targets = rng.integers(0, V, (B, T))
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]], bool)
    logp = np.take_along_axis(z - np.log(np.exp(z).sum(-1, keepdims=True)), targets[..., None], -1)[..., 0]
    old, ref = logp - 0.05, logp + 0.3
    a = np.array([1.0, -0.5, 2.0], np.float32)
    entropy = information.entropy_from_logits(Tensor(z))
    theirs = policy_losses.grpo_loss(
        Tensor(logp), old, a, mask, ref, beta=0.1, entropies=entropy, entropy_coef=0.01, dual_clip=3.0
    )
    t = [torch.from_numpy(np.asarray(x)) for x in (z, targets, old, a, mask, ref)]
    ours = op.policy_loss(*t, beta=0.1, entropy_coef=0.01, dual_clip=3.0)
    assert ours.loss.item() == pytest.approx(theirs.loss.item(), abs=1e-6)
    assert ours.k3[torch.from_numpy(mask)].mean().item() == pytest.approx(theirs.kl, abs=1e-6)
