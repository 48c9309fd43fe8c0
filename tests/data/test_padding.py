"""Padding and what it wastes, grouping by length, labels for supervised fine-tuning."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.autograd import Tensor
from minillm.data import IGNORE, bucket_by_length, first_fit_decreasing, pad_batch, padding_waste, sft_batch, sft_labels
from minillm.functional.losses import cross_entropy

sequences = st.lists(st.lists(st.integers(0, 9), max_size=8), min_size=1, max_size=5)


@pytest.mark.equation("padding-dynamic", "special-tokens")
@pytest.mark.parametrize("side", ["left", "right"])
@settings(max_examples=40)
@given(rows=sequences)
def test_the_mask_gives_every_sequence_back(side, rows):
    tokens, mask = pad_batch(rows, 3, side=side)  # 3 is a real token as well: the mask may not look at values
    assert tokens.shape == mask.shape == (len(rows), max(map(len, rows)))
    assert mask.dtype == bool and tokens.dtype == np.int64
    for row, padded, real in zip(rows, tokens, mask, strict=True):
        assert padded[real].tolist() == row
        assert (padded[~real] == 3).all()
        ordered = np.sort(real) if side == "left" else np.sort(real)[::-1]
        np.testing.assert_array_equal(real, ordered)


@pytest.mark.equation("padding-dynamic")
def test_the_batch_is_as_long_as_its_longest_sequence():
    assert pad_batch([[1], [1, 2, 3]], 0).tokens.tolist() == [[1, 0, 0], [1, 2, 3]]
    assert pad_batch([[1], [1, 2, 3]], 0, side="left").tokens.tolist() == [[0, 0, 1], [1, 2, 3]]
    assert pad_batch([[1], [2]], 0).tokens.shape == (2, 1)


def test_refusals_of_padding():
    with pytest.raises(ValueError, match="at least one"):
        pad_batch([], 0)
    with pytest.raises(ValueError, match="side must be one of 'left', 'right'"):
        pad_batch([[1]], 0, side="both")
    with pytest.raises(ValueError, match="sequence 1 must be one-dimensional"):
        pad_batch([np.array([1]), np.array([[1]])], 0)


@pytest.mark.equation("padding-waste")
@settings(max_examples=40)
@given(rows=sequences.filter(lambda rows: any(rows)))
def test_waste_is_the_share_of_the_mask_that_is_false(rows):
    assert padding_waste([len(row) for row in rows]) == pytest.approx(1 - pad_batch(rows, 0).mask.mean())


@pytest.mark.equation("padding-waste")
def test_waste_of_several_batches_counts_places():
    assert padding_waste([1, 3]) == pytest.approx(2 / 6)
    assert padding_waste([5, 5, 5]) == 0
    assert padding_waste([1, 3, 10], batch_size=2) == pytest.approx(1 - 14 / 16)
    for wrong in ([], [-1, 2], [0, 0]):
        with pytest.raises(ValueError, match="lengths"):
            padding_waste(wrong)


def log_normal_lengths(seed, n=8192):
    return np.clip(np.random.default_rng(seed).lognormal(5, 0.6, n), 1, 2048).astype(int)


@pytest.mark.equation("padding-waste", "bucketing", "packing-ffd", "wn-padding-30")
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_what_is_wasted_depends_on_how_batches_are_made(seed):
    # the figure of the source, up to 30 %, is a claim about unnamed data; here is one law of lengths
    lengths = log_normal_lengths(seed)
    random = padding_waste(lengths, 32)
    ordered = [lengths[batch] for batch in bucket_by_length(lengths, 32)]
    windows = [lengths[batch] for batch in bucket_by_length(lengths, 32, window=8)]
    by_length, nearly = (padding_waste(np.concatenate(batches), 32) for batches in (ordered, windows))
    packed = 1 - lengths.sum() / (len(first_fit_decreasing(lengths, 2048)) * 2048)
    to_the_limit = 1 - lengths.mean() / 2048
    assert to_the_limit > 0.85  # the global maximum instead of the batch's
    assert 0.5 < random < 0.8
    assert by_length < nearly < random / 1.5
    assert by_length < 0.03
    assert 0 <= packed < 0.005


@pytest.mark.equation("bucketing")
@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 50), max_size=40),
    batch_size=st.integers(1, 6),
    window=st.none() | st.integers(1, 4),
)
def test_buckets_hold_every_index_once_and_stay_in_their_window(lengths, batch_size, window):
    batches = bucket_by_length(lengths, batch_size, window=window)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(batch) <= batch_size for batch in batches)
    span = (window or 1000) * batch_size
    for batch in batches:
        assert len({i // span for i in batch.tolist()}) == 1
        assert (np.diff(np.array(lengths)[batch]) >= 0).all()
    if lengths:
        in_order = np.concatenate([np.array(lengths)[batch] for batch in batches])
        if window is None:
            assert (np.diff(in_order) >= 0).all()
        if window is None and len(lengths) % batch_size == 0:
            assert padding_waste(in_order, batch_size) <= padding_waste(lengths, batch_size) + 1e-12


BOS, EOS, PAD = 20, 21, 22


@pytest.mark.equation("sft-masking")
@settings(max_examples=40)
@given(
    prompt=st.lists(st.integers(0, 9), max_size=6), target=st.lists(st.integers(0, 9), max_size=6), bos=st.booleans()
)
def test_bos_and_prompt_are_masked_target_and_eos_kept(prompt, target, bos):
    tokens, labels = sft_labels(prompt, target, bos_id=BOS if bos else None, eos_id=EOS)
    head = ([BOS] if bos else []) + prompt
    assert tokens.tolist() == head + target + [EOS]
    assert labels.tolist() == [IGNORE] * len(head) + target + [EOS]


@pytest.mark.equation("sft-masking", "special-tokens")
@pytest.mark.parametrize("side", ["left", "right"])
@settings(max_examples=30)
@given(
    pairs=st.lists(
        st.tuples(st.lists(st.integers(0, 9), max_size=5), st.lists(st.integers(0, 9), max_size=5)),
        min_size=1,
        max_size=4,
    )
)
def test_a_batch_predicts_exactly_the_targets_and_eos(side, pairs):
    prompts, targets = zip(*pairs, strict=True)
    batch = sft_batch(prompts, targets, bos_id=BOS, eos_id=EOS, pad_id=PAD, side=side)
    assert batch.inputs.shape == batch.targets.shape == batch.mask.shape
    for prompt, target, x, y, real in zip(prompts, targets, *batch, strict=True):
        assert x[real].tolist() == [BOS, *prompt, *target]
        assert y[real].tolist() == [IGNORE] * len(prompt) + [*target, EOS]
        assert (x[~real] == PAD).all() and (y[~real] == IGNORE).all()
        assert PAD not in y and PAD not in x[real]


@pytest.mark.equation("sft-masking", "special-tokens")
def test_the_loss_of_a_batch_does_not_see_prompts_or_padding():
    batch = sft_batch([[1, 2], [3]], [[4], [5, 6, 7]], bos_id=BOS, eos_id=EOS, pad_id=PAD)
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(*batch.inputs.shape, 23))
    loss = cross_entropy(Tensor(logits), batch.targets).item()
    logits[batch.targets == IGNORE] = rng.normal(size=(int((batch.targets == IGNORE).sum()), 23))
    assert cross_entropy(Tensor(logits), batch.targets).item() == pytest.approx(loss)
    assert int((batch.targets != IGNORE).sum()) == 2 + 4


def test_prompts_and_targets_come_in_pairs():
    with pytest.raises(ValueError, match="one for each of 2 prompts, got 1"):
        sft_batch([[1], [2]], [[3]], bos_id=None, eos_id=EOS, pad_id=PAD)
