r"""A task whose answers a program can verify: addition, ``12+19=`` to be continued by ``130`` (31 reversed) and EOS."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from minillm.checks import message, require, require_one_of, require_positive
from minillm.data.batches import IGNORE, Batch, shift
from minillm.data.tokenizers import CharTokenizer


class Column(NamedTuple):
    """One column of a sum done by hand, from the right."""

    first: int
    second: int
    carry_in: int
    total: int
    digit: int
    carry_out: int


class Demonstrations(NamedTuple):
    """Prompts (B, P), answers (B, A) as a teacher wrote them, and which of them (B,) carry a wrong digit."""

    prompts: np.ndarray
    answers: np.ndarray
    is_wrong: np.ndarray

    @property
    def tokens(self) -> Int[np.ndarray, "B L"]:
        """Prompt and answer in one row."""
        return np.concatenate([self.prompts, self.answers], axis=1)

    def batch(self) -> Batch:
        r"""Inputs and shifted targets with the prompt masked, (B, P + A - 1).

        Equation: `sft-masking` prompt masked, answer and EOS kept
        """
        inputs, targets = shift(self.tokens)
        targets = targets.copy()
        targets[:, : self.prompts.shape[1] - 1] = IGNORE
        return Batch(inputs, targets)


class AdditionTask:
    r"""Sums of two numbers of ``digits`` digits, with leading zeros, answers written from the units on.

    Equation: `verifiable-dataset` $(x,a^\ast)$: prompt and answer only, no reasoning
    Shapes: problems (B, 2), prompts (B, 2 digits + 2), answers (B, digits + 2) with their EOS
    Raises: ValueError for digits outside 1 to 3 or a share that leaves train or held-out problems empty.
    Source: deepseek (GRPO).

    Ids 0 to 9 are the digits, then ``+``, ``=``, EOS, PAD, BOS: 15 in all. The problems are divided once, by
    ``split_seed``, into those to train on and those held out.
    """

    def __init__(self, digits: int = 2, held_out_share: float = 0.1, split_seed: int = 0):
        require(digits in (1, 2, 3), "AdditionTask", "digits", "1, 2 or 3", digits)
        self.digits = digits
        self.tokenizer = CharTokenizer("0123456789+=", specials=("eos", "pad", "bos"))
        self.prompt_length, self.answer_length = 2 * digits + 2, digits + 2
        everything = self.all_problems()
        n_held_out = round(len(everything) * held_out_share)
        sound = 0 < n_held_out < len(everything)
        require(sound, "AdditionTask", "held_out_share", "a share that leaves both parts some", held_out_share)
        order = np.random.default_rng(split_seed).permutation(len(everything))
        self.held_out_problems = everything[np.sort(order[:n_held_out])]
        self.train_problems = everything[np.sort(order[n_held_out:])]

    @property
    def vocab_size(self) -> int:
        """Number of ids: V of the model."""
        return self.tokenizer.vocab_size

    @property
    def eos_id(self) -> int:
        """Id that ends an answer."""
        return self.tokenizer.n_ordinary + self.tokenizer.specials.index("eos")

    def all_problems(self) -> Int[np.ndarray, "N 2"]:
        """Every pair of numbers in order: 10,000 for two digits."""
        numbers = np.arange(10**self.digits)
        return np.stack(np.meshgrid(numbers, numbers, indexing="ij"), axis=-1).reshape(-1, 2)

    def problems(self, rng: np.random.Generator, n: int, split: str = "train") -> Int[np.ndarray, "n 2"]:
        """Draw n problems with replacement from ``"train"``, ``"held_out"`` or ``"all"``.

        Raises: ValueError for another split.
        """
        require_one_of(split, ("train", "held_out", "all"), "AdditionTask.problems", "split")
        require_positive(n, "AdditionTask.problems", "n", integer=True, zero_ok=True)
        pool = {"train": self.train_problems, "held_out": self.held_out_problems}.get(split)
        pool = self.all_problems() if pool is None else pool
        return pool[rng.integers(len(pool), size=n)]

    def prompt_ids(self, problems: Int[np.ndarray, "B 2"]) -> Int[np.ndarray, "B P"]:
        """``ab+cd=`` as ids, most significant digit first."""
        a, b = self._checked(problems).T
        plus, equals = (np.full((len(a), 1), int(self.tokenizer.encode(sign)[0])) for sign in "+=")
        return np.hstack([_digits(a, self.digits)[:, ::-1], plus, _digits(b, self.digits)[:, ::-1], equals])

    def answer_ids(self, problems: Int[np.ndarray, "B 2"]) -> Int[np.ndarray, "B A"]:
        """The sum as ids, units first, so that every carry is known when it is needed; then EOS."""
        total = self._checked(problems).sum(1)
        return np.hstack([_digits(total, self.digits + 1), np.full((len(total), 1), self.eos_id)])

    def demonstrations(
        self, rng: np.random.Generator, n: int, noise: float = 0.6, split: str = "train"
    ) -> Demonstrations:
        """Worked answers of an unreliable teacher: each is wrong with probability ``noise``, by exactly one digit.

        The place is uniform over the digits of the answer, the digit uniform over the nine wrong ones; EOS is right.
        A policy that fits them perfectly samples a right answer with probability ``1 - noise`` and, as the right
        digit stays the most likely one at every place (up to a noise of 0.9), answers without error when greedy.

        Raises: ValueError unless noise is in [0, 1].
        """
        require(0 <= noise <= 1, "AdditionTask.demonstrations", "noise", "a share in [0, 1]", noise)
        problems = self.problems(rng, n, split)
        answers = self.answer_ids(problems)
        wrong = np.flatnonzero(rng.random(n) < noise)
        place = rng.integers(self.digits + 1, size=len(wrong))
        answers[wrong, place] = (answers[wrong, place] + rng.integers(1, 10, size=len(wrong))) % 10
        return Demonstrations(self.prompt_ids(problems), answers, np.isin(np.arange(n), wrong))

    def parse_problem(self, prompts: Int[np.ndarray, "B P"]) -> Int[np.ndarray, "B 2"]:
        """Read the two numbers back out of prompts. Raises: ValueError for anything that is not such a prompt."""
        prompts = np.asarray(prompts)
        where, form = "AdditionTask.parse_problem", f"prompts of shape (B, {self.prompt_length})"
        require(prompts.ndim == 2 and prompts.shape[1] == self.prompt_length, where, "prompts", form, prompts)
        a, b = prompts[:, : self.digits], prompts[:, self.digits + 1 : -1]
        powers = 10 ** np.arange(self.digits)[::-1]
        problems = np.stack([a @ powers, b @ powers], axis=1)  # (B, 2)
        sound = bool(((problems >= 0) & (problems < 10**self.digits)).all())
        if not sound or not np.array_equal(self.prompt_ids(problems), prompts):
            raise ValueError(message(where, "every prompt", "of the form ab+cd=", prompts))
        return problems

    def parse_answer(self, responses: Int[np.ndarray, "B T"]) -> Int[np.ndarray, " B"]:
        """The number that a response states, or -1 if it states none.

        A response counts when it is exactly ``digits + 1`` digits and then EOS; what follows EOS is not looked at.
        Shorter or longer numbers, other signs before EOS and a missing EOS are no answer.
        """
        responses = np.asarray(responses)
        require(responses.ndim == 2, "AdditionTask.parse_answer", "responses", "of shape (B, T)", responses)
        n = self.digits + 1
        if responses.shape[1] <= n:
            return np.full(len(responses), -1)
        digits = responses[:, :n]
        well_formed = ((digits >= 0) & (digits <= 9)).all(1) & (responses[:, n] == self.eos_id)
        return np.where(well_formed, digits @ 10 ** np.arange(n), -1)

    def is_right(self, problems: Int[np.ndarray, "B _"], responses: Int[np.ndarray, "B T"]) -> Bool[np.ndarray, " B"]:
        """Whether each response states the sum of its problem; problems as numbers (B, 2) or as prompts (B, P)."""
        problems, responses = np.asarray(problems), np.asarray(responses)
        if problems.ndim == 2 and problems.shape[1] == self.prompt_length:
            problems = self.parse_problem(problems)
        problems = self._checked(problems)
        same = responses.ndim == 2 and len(responses) == len(problems)
        form = f"of shape ({len(problems)}, T), one row a problem"
        require(
            same, "AdditionTask.verify", "responses", form, responses, "Repeat each problem once for every response."
        )
        return self.parse_answer(responses) == problems.sum(1)

    def verify(self, problems: Int[np.ndarray, "B _"], responses: Int[np.ndarray, "B T"]) -> Float[np.ndarray, " B"]:
        r"""Reward 1 for a right answer and 0 for everything else.

        Equation: `verifiable-dataset` $r(x,y)=[\mathrm{parse}(y)=a^\ast]$
        Shapes: problems (B, 2) or prompts (B, P), responses (B, T) -> (B,) float64
        Raises: ValueError for shapes that do not belong together or prompts that are none.
        Source: deepseek (GRPO).
        """
        return self.is_right(problems, responses).astype(np.float64)

    def _checked(self, problems: Int[np.ndarray, "B 2"]) -> Int[np.ndarray, "B 2"]:
        problems = np.asarray(problems)
        form = f"integers of shape (B, 2) in [0, {10**self.digits})"
        sound = problems.ndim == 2 and problems.shape[1] == 2 and np.issubdtype(problems.dtype, np.integer)
        sound = sound and bool(((problems >= 0) & (problems < 10**self.digits)).all())
        require(sound, "AdditionTask", "problems", form, problems)
        return problems


def addition_columns(a: int, b: int) -> list[Column]:
    """The sum done by hand: one column a digit from the units on, and a last one for the carry that remains."""
    require(a >= 0 and b >= 0, "addition_columns", "the numbers", "not negative", f"{a} and {b}")
    columns, carry = [], 0
    for place in range(len(str(max(a, b))) + 1):
        first, second = a // 10**place % 10, b // 10**place % 10
        total = first + second + carry
        columns.append(Column(first, second, carry, total, total % 10, total // 10))
        carry = total // 10
    return columns


def _digits(numbers: Int[np.ndarray, " B"], n: int) -> Int[np.ndarray, "B n"]:
    """The n lowest digits, units first."""
    return numbers[:, None] // 10 ** np.arange(n) % 10  # (B, n)
