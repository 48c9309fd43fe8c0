r"""The policy of the alignment stages: a small decoder, its log-probabilities, and how often it is right."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from minillm.autograd import Tensor
from minillm.checks import require
from minillm.data.tasks import AdditionTask
from minillm.decoding import generate
from minillm.fused.linear import linear
from minillm.fused.softmax import token_logprobs
from minillm.models import Config, Decoder
from minillm.nn.layers import INIT_STD


@dataclass(frozen=True)
class PolicySize:
    """The sizes of a policy: about 0.1M parameters by default."""

    d_model: int = 64
    n_layers: int = 2
    n_heads: int = 8
    d_ff: int = 172


def fresh_policy(task: AdditionTask, size: PolicySize, rng: np.random.Generator) -> Decoder:
    r"""An untrained decoder for a task: maps spread by the fan-in rule, a token table of the usual spread.

    Equation: `init-schemes` standard deviation $1/\sqrt{d_{\rm model}}$ for maps, 0.02 for the table
    Source: bridging §1; LeCun et al. 1998.

    With 0.02 everywhere the plateau before a model of width 64 finds the carry is about three times as long; with
    the larger table too, about twice.
    """
    config = Config(
        vocab_size=task.vocab_size,
        d_model=size.d_model,
        n_layers=size.n_layers,
        n_heads=size.n_heads,
        d_ff=size.d_ff,
        context=task.prompt_length + task.answer_length,
        init_std=size.d_model**-0.5,
    )
    model = Decoder(config, rng)
    model.embedding.weight.data *= INIT_STD / config.init_std
    return model


def response_logits(
    model: Decoder, prompts: Int[np.ndarray, "B P"], responses: Int[np.ndarray, "B T"]
) -> Float[Tensor, "B T V"]:
    r"""Logits of every token of the responses, given the prompt and the tokens before it.

    The head, which maps to the whole vocabulary, runs on these positions only.

    Equation: `lm-as-mdp` $s_t=(x,y_{<t})$, $a_t=y_t$
    Shapes: prompts (B, P), responses (B, T) -> (B, T, V)
    Raises: ValueError if the numbers of prompts and responses differ.
    Source: notes §10.5; bridging §2.
    """
    rows = len(prompts)
    require(len(responses) == rows, "response_logits", "the responses", f"{rows} rows, one a prompt", responses)
    ids = np.concatenate([prompts, responses[:, :-1]], axis=1)  # (B, P + T - 1)
    return linear(model.hidden(ids)[:, prompts.shape[1] - 1 :], model.output_weight)  # (B, T, V)


def response_logprobs(
    model: Decoder, prompts: Int[np.ndarray, "B P"], responses: Int[np.ndarray, "B T"], temperature: float = 1.0
) -> Float[Tensor, "B T"]:
    r"""Log-probability of every token of the responses, under the law that is sampled at this temperature.

    Equation: `gather-logprob` $\ell_t=(\log\mathrm{softmax}(\mathbf o_{t-1}))[y_t]$
    Equation: `policy-sequence` $\pi(y\mid x)=\prod_t\pi(y_t\mid x,y_{<t})$
    Shapes: prompts (B, P), responses (B, T) -> (B, T)
    Raises: ValueError if the numbers of prompts and responses differ.
    Source: bridging §1.6; notes §10.5.
    Differs: the temperature divides the logits here as it does in the sampler, so that ratios start at 1 (erratum 45).
    """
    logits = response_logits(model, prompts, responses)
    return token_logprobs(logits if temperature == 1 else logits * (1.0 / temperature), responses)


class Accuracy(NamedTuple):
    """Shares of right answers: decoded greedily, and sampled at temperature 1."""

    greedy: float
    sampled: float


def accuracy(
    model: Decoder, task: AdditionTask, problems: Int[np.ndarray, "N 2"], rng: np.random.Generator, samples: int = 1
) -> Accuracy:
    """How often the verifier accepts: one greedy answer a problem, and ``samples`` sampled ones."""
    prompts, share = task.prompt_ids(problems), {}
    for temperature, copies in ((0.0, 1), (1.0, samples)):
        answers = generate(
            model, prompts, task.answer_length, rng, temperature=temperature, eos_id=task.eos_id, copies=copies
        )
        share[temperature] = float(task.is_right(problems.repeat(copies, axis=0), answers.tokens).mean())
    return Accuracy(greedy=share[0.0], sampled=share[1.0])


def frozen_copy(model: Decoder) -> Decoder:
    """The same policy with weights of its own, which no training of the original moves."""
    copy = Decoder(model.config, np.random.default_rng(0))
    copy.load_state_dict(model.state_dict())
    return copy
