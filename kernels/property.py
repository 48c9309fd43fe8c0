"""One property of a family: for which functions, on what problems, and how it is checked."""

from collections.abc import Callable
from dataclasses import dataclass

from kernels.problem import Problem
from kernels.subject import Subject
from kernels.tolerance import Verdict


@dataclass(frozen=True)
class Property:
    """``strategy(function, dtype, gpu)`` draws problems, ``check(subject, problem)`` returns verdicts.

    ``share`` is the part of the examples it gets (at least three; one if it is 0): relations need fewer than the comparison with
    the reference. ``gradient`` says that it makes no sense without a gradient, ``ours_only`` that it looks inside our launch.
    """

    name: str
    functions: tuple[str, ...]
    strategy: Callable
    check: Callable[[Subject, Problem], list[Verdict]]
    gradient: bool = False
    ours_only: bool = False
    share: float = 1.0

    def examples(self, asked: int) -> int:
        """How many problems to try when ``asked`` are asked for."""
        return max(int(asked * self.share), 3 if self.share else 1)
