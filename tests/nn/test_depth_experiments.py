"""What the place of the norm does to a deep stack: trends that must show, never digits."""

import numpy as np
import pytest

from minillm.nn import depth_experiments as deep


def mean_gradient(depth, placement, seeds=4):
    return np.mean([deep.last_layer_gradient(depth, placement, np.random.default_rng(s)) for s in range(seeds)])


@pytest.mark.equation("pre-ln", "post-ln", "final-ln")
def test_the_stream_grows_linearly_with_the_norm_before_and_not_with_the_norm_after():
    """Erratum 13: it is the branches that are normalised; the stream is not."""
    pre = np.mean([deep.stream_variance(24, "pre", np.random.default_rng(s)) for s in range(3)], axis=0)
    post = deep.stream_variance(24, "post", np.random.default_rng(0))
    np.testing.assert_allclose(post[1:], 1.0, rtol=1e-3)
    slopes = np.diff(pre[[0, 8, 16, 24]]) / 8
    assert slopes.min() > 0.5 and slopes.max() < 1.6 * slopes.min()


@pytest.mark.equation("norm-gradient-flow")
def test_the_last_gradient_shrinks_with_depth_only_with_the_norm_before():
    pre, post = ([mean_gradient(depth, placement) for depth in (6, 24, 48)] for placement in ("pre", "post"))
    assert pre[0] > 1.4 * pre[1] > 1.4 * 1.2 * pre[2]
    assert post[2] > 0.6 * post[0]


@pytest.mark.slow
@pytest.mark.equation("warmup-need", "wn-preln-speed")
def test_only_the_norm_after_needs_warm_up_here():
    """The loss at the end, over three seeds; how much faster one placement learns is reported, not asserted."""
    ends = {
        placement: np.array([[curve[-1] for curve in deep.warmup_trial(placement, seed)] for seed in range(3)])
        for placement in deep.PLACEMENTS
    }  # (seeds, without / with)
    assert ends["post"][:, 0].mean() > 100 * ends["post"][:, 1].mean()
    assert ends["pre"][:, 0].mean() < 0.01 and ends["pre"][:, 1].mean() < 0.01
    steps = {p: int(np.argmax(deep.warmup_trial(p, 0).with_warmup < 0.1)) for p in deep.PLACEMENTS}
    print(f"steps to a loss of 0.1 with warm-up: {steps}")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda rng: deep.ResidualStack(3, 4, 2, "middle", rng), "ResidualStack: placement must be one of 'pre', 'post'"),
        (lambda rng: deep.ResidualStack(0, 4, 2, "pre", rng), "ResidualStack: depth must be a positive integer, got 0"),
        (lambda rng: deep.warmup_trial("pre", 0, steps=0), "warmup_trial: steps must be a positive integer, got 0"),
        (lambda rng: deep.warmup_trial("pre", 0, warmup=0), "warmup_trial: warmup must be a positive integer, got 0"),
        (lambda rng: deep.warmup_trial("pre", 0, steps=5, warmup=6), "warmup_trial: warmup must be at most steps = 5, got 6"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(np.random.default_rng(0))
