"""Addition with a verifier: what counts as an answer, how demonstrations go wrong, how problems are divided."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.data import IGNORE, AdditionTask, addition_columns

pytestmark = pytest.mark.equation("verifiable-dataset")

TASKS = {digits: AdditionTask(digits) for digits in (1, 2, 3)}
TASK = TASKS[2]
EOS, PAD = TASK.eos_id, TASK.tokenizer.pad_id
two_digits = st.tuples(st.integers(0, 99), st.integers(0, 99))


def answer(text):
    return np.array([[int(c) if c.isdigit() else {"e": EOS, "p": PAD, "+": 10, "=": 11}[c] for c in text]])


@pytest.mark.equation("verifiable-dataset", "wn-addition")
def test_twelve_and_nineteen_are_thirty_one():
    units, tens, rest = addition_columns(12, 19)
    assert (units.first, units.second, units.total, units.digit, units.carry_out) == (2, 9, 11, 1, 1)
    assert (tens.first, tens.second, tens.carry_in, tens.total, tens.carry_out) == (1, 1, 1, 3, 0)
    assert rest.digit == 0
    problem = np.array([[12, 19]])
    assert TASK.tokenizer.decode(TASK.prompt_ids(problem)[0]) == "12+19="
    assert TASK.tokenizer.decode(TASK.answer_ids(problem)[0], skip_special=False) == "130<eos>"
    assert TASK.verify(problem, answer("130e")) == 1


@settings(max_examples=50)
@given(a=st.integers(0, 10**6), b=st.integers(0, 10**6))
def test_columns_make_the_sum(a, b):
    columns = addition_columns(a, b)
    assert sum(column.digit * 10**i for i, column in enumerate(columns)) == a + b
    assert columns[-1].carry_out == 0
    with pytest.raises(ValueError, match="not negative"):
        addition_columns(-1, b)


@pytest.mark.parametrize("digits", [1, 2, 3])
@settings(max_examples=30)
@given(data=st.data())
def test_prompts_and_answers_say_what_they_mean(digits, data):
    task = TASKS[digits]
    number = st.integers(0, 10**digits - 1)
    problems = np.array(data.draw(st.lists(st.tuples(number, number), min_size=1, max_size=5)))
    prompts, answers = task.prompt_ids(problems), task.answer_ids(problems)
    assert prompts.shape[1] == task.prompt_length and answers.shape[1] == task.answer_length
    for (a, b), prompt, ids in zip(problems, prompts, answers, strict=True):
        assert task.tokenizer.decode(prompt) == f"{a:0{digits}d}+{b:0{digits}d}="
        assert task.tokenizer.decode(ids) == f"{a + b:0{digits + 1}d}"[::-1]
    np.testing.assert_array_equal(task.parse_problem(prompts), problems)
    np.testing.assert_array_equal(task.parse_answer(answers), problems.sum(1))
    np.testing.assert_array_equal(task.verify(problems, answers), 1.0)
    np.testing.assert_array_equal(task.verify(prompts, answers), 1.0)


@settings(max_examples=50)
@given(problem=two_digits, response=st.lists(st.integers(0, 14), max_size=7))
def test_reward_is_one_for_the_exact_answer_and_nothing_else(problem, response):
    a, b = problem
    right = [int(c) for c in f"{a + b:03d}"[::-1]] + [EOS]
    problems = np.array([problem])
    for candidate in (response, right + response, right[:-1] + response):
        expected = float(candidate[:4] == right)
        reward = TASK.verify(problems, np.array([candidate], dtype=np.int64).reshape(1, -1))
        assert reward.dtype == np.float64 and reward.tolist() == [expected]


@pytest.mark.parametrize(
    ("response", "value"),
    [
        ("130e", 31),
        ("130epp", 31),
        ("130e999", 31),
        ("000e", 0),
        ("130", -1),  # no EOS
        ("130p", -1),
        ("1305", -1),
        ("13e", -1),  # too short, though the same number
        ("1300e", -1),
        ("e130", -1),
        ("13+e", -1),
        ("13=e", -1),
        ("1e30e", -1),
        ("", -1),
    ],
)
def test_what_counts_as_an_answer(response, value):
    ids = answer(response) if response else np.zeros((1, 0), np.int64)
    assert TASK.parse_answer(ids).tolist() == [value]
    assert TASK.verify(np.array([[12, 19]]), ids).tolist() == [float(value == 31)]


def test_problems_are_divided_without_overlap_and_the_same_way_every_time():
    train = {tuple(p) for p in TASK.train_problems.tolist()}
    held_out = {tuple(p) for p in TASK.held_out_problems.tolist()}
    assert len(train) == 9000 and len(held_out) == 1000 and not train & held_out
    assert train | held_out == {tuple(p) for p in TASK.all_problems().tolist()}
    np.testing.assert_array_equal(AdditionTask().held_out_problems, TASK.held_out_problems)
    other = {tuple(p) for p in AdditionTask(split_seed=1).held_out_problems.tolist()}
    assert other != held_out
    rng = np.random.default_rng(0)
    for split, pool in (("train", train), ("held_out", held_out)):
        drawn = TASK.problems(rng, 500, split)
        assert drawn.shape == (500, 2) and {tuple(p) for p in drawn.tolist()} <= pool
    assert len({tuple(p) for p in TASK.problems(rng, 500, "all").tolist()} & held_out) > 10


def test_a_share_of_the_demonstrations_carries_one_wrong_digit():
    demonstrations = TASK.demonstrations(np.random.default_rng(0), 20_000, noise=0.6)
    problems = TASK.parse_problem(demonstrations.prompts)
    differs = demonstrations.answers != TASK.answer_ids(problems)
    np.testing.assert_array_equal(differs.sum(1), demonstrations.is_wrong)
    np.testing.assert_array_equal(TASK.verify(problems, demonstrations.answers), ~demonstrations.is_wrong)
    assert demonstrations.is_wrong.mean() == pytest.approx(0.6, abs=0.015)
    assert not differs[:, 3].any()  # EOS is never wrong
    np.testing.assert_allclose(differs[:, :3].mean(0), 0.2, atol=0.012)  # each of three places alike
    offset = (demonstrations.answers - TASK.answer_ids(problems))[differs] % 10
    np.testing.assert_allclose(np.bincount(offset, minlength=10) / len(offset), [0] + [1 / 9] * 9, atol=0.012)
    held_out = {tuple(p) for p in TASK.held_out_problems.tolist()}
    assert not held_out & {tuple(p) for p in problems.tolist()}


@pytest.mark.parametrize(("noise", "wrong"), [(0.0, 0), (1.0, 50)])
def test_noise_at_its_ends(noise, wrong):
    assert TASK.demonstrations(np.random.default_rng(0), 50, noise=noise).is_wrong.sum() == wrong


@pytest.mark.equation("sft-masking")
def test_demonstrations_as_a_batch_train_on_the_answer_only():
    demonstrations = TASK.demonstrations(np.random.default_rng(0), 7)
    inputs, targets = demonstrations.batch()
    assert inputs.shape == targets.shape == (7, 9)
    assert (targets[:, :5] == IGNORE).all()
    np.testing.assert_array_equal(targets[:, 5:], demonstrations.answers)
    np.testing.assert_array_equal(inputs, demonstrations.tokens[:, :-1])


def test_the_same_generator_gives_the_same_demonstrations():
    first, second = (TASK.demonstrations(np.random.default_rng(3), 20) for _ in range(2))
    np.testing.assert_array_equal(first.tokens, second.tokens)


def test_the_vocabulary_is_small_and_complete():
    assert TASK.vocab_size == 15
    assert [TASK.tokenizer.decode([i], skip_special=False) for i in range(15)] == [
        *"0123456789+=",
        "<eos>",
        "<pad>",
        "<bos>",
    ]


def test_refusals():
    problem = np.array([[12, 19]])
    with pytest.raises(ValueError, match=r"in \[0, 100\)"):
        TASK.prompt_ids(np.array([[100, 1]]))
    with pytest.raises(ValueError, match=r"integers of shape \(B, 2\)"):
        TASK.answer_ids(np.array([[1.0, 2.0]]))
    with pytest.raises(ValueError, match="Repeat each problem"):
        TASK.verify(problem, np.zeros((2, 4), np.int64))
    with pytest.raises(ValueError, match="of the form ab"):
        TASK.verify(np.array([[1, 2, 3, 4, 5, 6]]), answer("130e"))
    with pytest.raises(ValueError, match=r"of the form ab|prompts of shape"):
        TASK.parse_problem(np.full((1, 6), 12))
    with pytest.raises(ValueError, match=r"of shape \(B, T\)"):
        TASK.parse_answer(np.array([1, 3, 0, EOS]))
    with pytest.raises(ValueError, match="split must be one of"):
        TASK.problems(np.random.default_rng(0), 3, "test")
    with pytest.raises(ValueError, match="noise must be a share"):
        TASK.demonstrations(np.random.default_rng(0), 3, noise=1.5)
    with pytest.raises(ValueError, match="digits must be 1, 2 or 3"):
        AdditionTask(4)
    for share in (0.0, 1.0):
        with pytest.raises(ValueError, match="held_out_share"):
            AdditionTask(held_out_share=share)
