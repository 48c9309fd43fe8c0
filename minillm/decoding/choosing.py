r"""One answer out of several: the best by a score, or the most frequent one; and a template that separates them."""

import re
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float, Int

from minillm.checks import require, require_positive

Answer = TypeVar("Answer", bound=Hashable)
THINK, ANSWER = ("<think>", "</think>"), ("<answer>", "</answer>")


def best_of_n(scores: Float[np.ndarray, "B n"]) -> Int[np.ndarray, " B"]:
    r"""The index of the response with the largest score, the first of several equal ones.

    Equation: `best-of-n` $\arg\max_iR(x,y_i)$
    Shapes: scores (B, n) of n responses to each of B prompts -> (B,)
    Raises: ValueError for no responses or a score that is NaN.
    Source: lecture06 (the quotation on Llama 3).
    """
    require(scores.ndim == 2 and scores.shape[1] > 0, "best_of_n", "scores", "of shape (B, n) with n >= 1", scores)
    require(not np.isnan(scores).any(), "best_of_n", "scores", "free of NaN", scores)
    return scores.argmax(1)


def expected_best(values: Float[np.ndarray, " m"], law: Float[np.ndarray, " m"], n: int) -> float:
    r"""The mean of the largest of n independent scores, which grows with n.

    Equation: `best-of-n` $\mathbb E\max_{i\le n}R=\sum_r r\,(F(r)^n-F(r^-)^n)$
    Shapes: values (m,) with probabilities law (m,) -> a number
    Raises: ValueError unless law is a distribution over the values and n is a positive integer.
    Source: lecture06 (the quotation on Llama 3).
    """
    require_positive(n, "expected_best", "n", integer=True)
    sound = law.shape == values.shape and values.size > 0 and (law >= 0).all() and abs(float(law.sum()) - 1) < 1e-6
    require(bool(sound), "expected_best", "law", "probabilities of the values that sum to 1", law)
    order = np.argsort(values)
    below = np.concatenate([[0.0], law[order].cumsum()])
    return float((values[order] * np.diff(below**n)).sum())


def self_consistency(answers: Sequence[Answer | None]) -> tuple[Answer | None, float]:
    r"""The most frequent answer and its share of the votes; of equally frequent ones the first that was given.

    Equation: `self-consistency` mode of the extracted answers
    Raises: ValueError for no answers at all.
    Source: deepseek (many responses to one question); Wang et al. 2022.

    A response without an answer (None) has no vote; if none has, the result is (None, 0).
    """
    require(len(answers) > 0, "self_consistency", "answers", "at least one", "none")
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return None, 0.0
    winner, count = votes.most_common(1)[0]
    return winner, count / sum(votes.values())


class Reasoned(NamedTuple):
    """The two regions of a response; None where a region is missing or broken."""

    reasoning: str | None
    answer: str | None


def cot_prompt(question: str) -> str:
    r"""Ask to think before answering, in regions that a program can tell apart.

    Equation: `cot-template` template with a reasoning and an answer region
    Raises: ValueError for an empty question.
    Source: deepseek (the goal of GRPO); DeepSeek-AI 2025 (R1).
    """
    require(question.strip() != "", "cot_prompt", "the question", "some text", repr(question))
    think, answer = "{} ... {}".format(*THINK), "{} ... {}".format(*ANSWER)
    return f"Think first, in the form {think}, then give only the result, in the form {answer}.\n{question}\n{THINK[0]}"


def parse_cot(response: str) -> Reasoned:
    r"""Find reasoning and answer in a response; the opening mark of the reasoning may stand in the prompt.

    Equation: `cot-template` parser for the answer
    Source: deepseek (the goal of GRPO).

    The last complete answer region behind the reasoning counts; a region that is opened twice or never closed does not.
    """
    head, closed, rest = response.partition(THINK[1])
    inner = head.lstrip().removeprefix(THINK[0])
    reasoning = inner if closed and THINK[0] not in inner else None
    pattern = f"{re.escape(ANSWER[0])}((?:(?!{re.escape(ANSWER[0])}).)*?){re.escape(ANSWER[1])}"
    found = re.findall(pattern, rest if closed else response, re.DOTALL)
    return Reasoned(None if reasoning is None else reasoning.strip(), found[-1].strip() if found else None)
