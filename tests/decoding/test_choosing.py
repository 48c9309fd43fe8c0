"""One answer out of several: best of n, majority vote, and the regions of a response."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.decoding.choosing import best_of_n, cot_prompt, expected_best, parse_cot, self_consistency


@pytest.mark.equation("best-of-n")
def test_the_best_is_the_first_of_the_largest():
    np.testing.assert_array_equal(best_of_n(np.array([[1.0, 3.0, 3.0], [0.0, -1.0, -2.0]])), [1, 0])


@pytest.mark.equation("best-of-n")
@given(st.integers(0, 10**6), st.integers(1, 4))
@settings(max_examples=30)
def test_the_expected_best_is_that_of_all_draws_and_grows(seed, n):
    rng = np.random.default_rng(seed)
    values, law = rng.integers(0, 4, size=3).astype(float), rng.dirichlet(np.ones(3))
    draws = np.stack(np.meshgrid(*[np.arange(3)] * n, indexing="ij")).reshape(n, -1)
    enumerated = (values[draws].max(0) * law[draws].prod(0)).sum()
    assert expected_best(values, law, n) == pytest.approx(enumerated)
    assert expected_best(values, law, n + 1) >= expected_best(values, law, n) - 1e-12
    assert expected_best(values, law, 1) == pytest.approx(values @ law)


@pytest.mark.equation("self-consistency")
def test_the_majority_wins_and_silence_has_no_vote():
    assert self_consistency(["7", None, "8", "7", None]) == ("7", pytest.approx(2 / 3))
    assert self_consistency(["b", "a"]) == ("b", 0.5)  # the first of equals
    assert self_consistency([None, None]) == (None, 0.0)


@pytest.mark.equation("self-consistency")
def test_a_vote_is_right_more_often_than_one_answer():
    """Three answers, the right one with probability 0.45: a vote of 15 finds it far more often."""
    rng, law = np.random.default_rng(0), [0.45, 0.3, 0.25]
    draws = rng.choice(3, p=law, size=(800, 15))
    voted = np.mean([self_consistency(row.tolist())[0] == 0 for row in draws])
    assert voted > 0.6 > np.mean(draws == 0)


@pytest.mark.equation("cot-template")
def test_reasoning_and_answer_are_told_apart():
    assert parse_cot("<think>2 and 2</think>\n<answer> 4 </answer>") == ("2 and 2", "4")
    assert parse_cot("2 and 2</think><answer>4</answer> bye") == ("2 and 2", "4")  # opened in the prompt
    assert cot_prompt("What is 2 + 2?").endswith("What is 2 + 2?\n<think>")
    prompt = cot_prompt("What is 2 + 2?")
    assert parse_cot((prompt + "easy</think><answer>4</answer>")[prompt.rindex("<think>") :]) == ("easy", "4")


@pytest.mark.equation("cot-template")
@pytest.mark.parametrize(
    ("response", "reasoning", "answer"),
    [
        ("just 4", None, None),
        ("<think>never closed <answer>4</answer>", None, "4"),
        ("<think>a</think><answer>3</answer> no, <answer>4</answer>", "a", "4"),
        ("<think>a</think><answer>4", "a", None),
        ("<think>is it <answer>3</answer>?</think><answer>4</answer>", "is it <answer>3</answer>?", "4"),
        ("<think>is it <answer>3</answer>?</think> yes", "is it <answer>3</answer>?", None),
        ("<think><think>a</think><answer>4</answer>", None, "4"),
        ("<answer><answer>4</answer>", None, "4"),
    ],
)
def test_broken_responses_give_what_is_left_of_them(response, reasoning, answer):
    assert parse_cot(response) == (reasoning, answer)


def test_bad_arguments_are_refused():
    for scores in (np.zeros((2, 0)), np.zeros(3)):
        with pytest.raises((ValueError, TypeError), match=r"scores|Type-check"):
            best_of_n(scores)
    with pytest.raises(ValueError, match="scores must be free of NaN"):
        best_of_n(np.array([[np.nan, 1.0]]))
    with pytest.raises(ValueError, match="n must be a positive integer"):
        expected_best(np.ones(2), np.full(2, 0.5), 0)
    with pytest.raises(ValueError, match="law must be probabilities"):
        expected_best(np.ones(2), np.full(2, 0.6), 2)
    with pytest.raises(ValueError, match="answers must be at least one"):
        self_consistency([])
    with pytest.raises(ValueError, match="question must be some text"):
        cot_prompt("  ")
