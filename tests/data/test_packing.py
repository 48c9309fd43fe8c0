"""Packing: nothing is lost, nothing crosses a boundary, and the loss is that of the documents one by one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.data import IGNORE, concat_documents, first_fit_decreasing, next_token_chunks, pack_concat, pack_documents
from minillm.functional.attention import causal_mask

EOS, PAD = 10, 11
documents = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=8), min_size=1, max_size=8)


@pytest.mark.equation("packing-concat")
@settings(max_examples=40)
@given(docs=st.lists(st.lists(st.integers(0, 9), max_size=6), min_size=1, max_size=6), n_ctx=st.integers(1, 8))
def test_the_stream_holds_every_document_closed_by_eos_and_is_cut_without_padding(docs, n_ctx):
    stream = concat_documents(docs, EOS)
    pieces, current = [], []
    for token in stream.tolist():
        if token == EOS:
            pieces.append(current)
            current = []
        else:
            current.append(token)
    assert pieces == docs and current == []
    if len(stream) <= n_ctx:
        with pytest.raises(ValueError, match="tokens must be at least"):
            pack_concat(docs, n_ctx, EOS)
        return
    inputs, targets = pack_concat(docs, n_ctx, EOS)
    expected = next_token_chunks(stream, n_ctx)
    np.testing.assert_array_equal(inputs, expected.inputs)
    np.testing.assert_array_equal(targets, expected.targets)
    assert (targets != IGNORE).all()


@pytest.mark.equation("packing-concat")
def test_a_document_may_be_split_between_rows():
    inputs, targets = pack_concat([[1, 2, 3], [4], [5, 6]], 4, EOS)
    assert inputs.tolist() == [[1, 2, 3, EOS], [4, EOS, 5, 6]]
    assert targets.tolist() == [[2, 3, EOS, 4], [EOS, 5, 6, EOS]]


def plain_first_fit(lengths, n_ctx):
    bins = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for members in bins:
            if sum(lengths[j] for j in members) + lengths[i] <= n_ctx:
                members.append(i)
                break
        else:
            bins.append([i])
    return bins


@pytest.mark.equation("packing-ffd")
@settings(max_examples=50)
@given(lengths=st.lists(st.integers(1, 12), max_size=25))
def test_first_fit_decreasing_equals_the_plain_program(lengths):
    bins = first_fit_decreasing(lengths, 12)
    assert bins == plain_first_fit(lengths, 12)
    assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
    least = -(-sum(lengths) // 12)
    assert len(bins) <= 11 / 9 * least + 2 or len(bins) <= 2 * least  # Johnson's bound is on the best packing


@pytest.mark.equation("packing-positions")
def test_two_documents_in_a_row():
    packed = pack_documents([[1, 2], [3, 4, 5]], 6, pad_id=PAD)
    assert packed.tokens.tolist() == [[3, 4, 5, 1, 2, PAD]]
    assert packed.targets.tolist() == [[4, 5, IGNORE, 2, IGNORE, IGNORE]]
    assert packed.segments.tolist() == [[0, 0, 0, 1, 1, -1]]
    assert packed.positions.tolist() == [[0, 1, 2, 0, 1, 0]]


@pytest.mark.equation("packing-positions")
@settings(max_examples=40)
@given(docs=documents)
def test_every_document_is_somewhere_whole_with_its_own_positions_and_targets(docs):
    packed = pack_documents(docs, 8, pad_id=PAD)
    found = []
    for tokens, targets, segments, positions in zip(*packed, strict=True):
        for segment in range(segments.max() + 1):
            here = segments == segment
            assert (np.diff(np.flatnonzero(here)) == 1).all()
            np.testing.assert_array_equal(positions[here], np.arange(here.sum()))
            assert targets[here].tolist() == [*tokens[here][1:].tolist(), IGNORE]
            found.append(tokens[here].tolist())
        assert (tokens[segments < 0] == PAD).all() and (targets[segments < 0] == IGNORE).all()
    assert sorted(found) == sorted(docs)


def toy_nll(tokens, positions, keep, targets):
    """A predictor that mixes what it may attend to, and where it stands: sum and count of its losses."""
    rng = np.random.default_rng(0)
    embedding, place, head = rng.normal(size=(12, 5)), rng.normal(size=(8, 5)), rng.normal(size=(5, 12))
    x = embedding[tokens] + place[positions]
    scores = np.where(keep, x @ x.T, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    logits = (weights / weights.sum(-1, keepdims=True)) @ x @ head
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    kept = targets != IGNORE
    return -logprobs[kept, targets[kept]].sum(), kept.sum()


@pytest.mark.equation("packing-positions")
@settings(max_examples=30)
@given(docs=documents.filter(lambda docs: any(len(d) > 1 for d in docs)))
def test_packed_and_unpacked_losses_agree_under_token_mean(docs):
    packed = pack_documents(docs, 8, pad_id=PAD)
    rows = []
    for tokens, targets, segments, positions in zip(*packed, strict=True):
        keep = causal_mask(8) & (segments[:, None] == segments[None, :])
        rows.append(toy_nll(tokens, positions, keep, targets))
    alone = []
    for doc in map(np.array, docs):
        targets = np.append(doc[1:], IGNORE)
        alone.append(toy_nll(doc, np.arange(len(doc)), causal_mask(len(doc)), targets))
    (packed_sum, packed_count), (alone_sum, alone_count) = np.sum(rows, axis=0), np.sum(alone, axis=0)
    assert packed_count == alone_count
    assert packed_sum / packed_count == pytest.approx(alone_sum / alone_count)


def test_refusals():
    with pytest.raises(ValueError, match=r"every length must be in \[1, 4\], got 5 for document 1"):
        first_fit_decreasing([2, 5], 4)
    with pytest.raises(ValueError, match="got 0 for document 0"):
        pack_documents([[]], 4, pad_id=PAD)
    with pytest.raises(ValueError, match="documents must be at least one"):
        concat_documents([], EOS)
    with pytest.raises(ValueError, match="document 0 must be a sequence of ids"):
        concat_documents([np.array([0.5])], EOS)
