r"""The law that is sampled: the model's logits after penalties, temperature and truncation, in one place.

Every way of decoding that draws tokens, plain or speculative, goes through this, so that they agree on what is drawn.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from minillm.checks import require, require_positive
from minillm.decoding.penalties import apply_penalties, keep_typical
from minillm.decoding.repetition import count_tokens, forbid_repeated_ngrams
from minillm.decoding.samplers import Sampled, draw, greedy, keep_finite, probabilities, truncate


@dataclass(frozen=True)
class Law:
    r"""How the law of the next token is made from the model's logits and the text so far.

    Order: repetition, frequency and presence penalties, no repeated n-gram, temperature, top-k, top-p, min-p, typical.
    Penalties count the whole text, prompt included. Temperature 0 is greedy: a law with all its mass on one token.

    Equation: `sample-combine` temperature → top-$k$ → top-$p$
    Equation: `sample-penalties` repetition $\theta$, frequency $\alpha_f$, presence $\alpha_p$, $p_{\min}$, typical $\tau$
    Raises: ValueError for a setting out of range.
    Source: notes §10.5; topics #9.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0
    no_repeat_ngram: int = 0

    def __post_init__(self) -> None:
        require_positive(self.temperature, "Law", "the temperature", zero_ok=True)
        require_positive(self.repetition, "Law", "repetition")
        require_positive(self.no_repeat_ngram, "Law", "no_repeat_ngram", integer=True, zero_ok=True)
        if self.top_k is not None:
            require_positive(self.top_k, "Law", "top_k", integer=True)
        for name in ("top_p", "typical_p"):
            share = getattr(self, name)
            require(share is None or 0 < share <= 1, "Law", name, "in (0, 1]", share)
        require(self.min_p is None or 0 <= self.min_p <= 1, "Law", "min_p", "in [0, 1]", self.min_p)
        for name in ("frequency", "presence"):
            require(bool(np.isfinite(getattr(self, name))), "Law", name, "a finite number", getattr(self, name))

    @property
    def reads_text(self) -> bool:
        """Whether the law depends on the tokens so far other than through the model."""
        return self.no_repeat_ngram > 0 or (self.repetition, self.frequency, self.presence) != (1.0, 0.0, 0.0)

    def penalised(self, logits: Float[np.ndarray, "B V"], text: Int[np.ndarray, "B L"]) -> Float[np.ndarray, "B V"]:
        """Logits after the controls that read the text (B, L)."""
        if not self.reads_text:
            return logits
        counts = count_tokens(text, logits.shape[-1])
        logits = apply_penalties(
            logits, counts, repetition=self.repetition, frequency=self.frequency, presence=self.presence
        )
        return forbid_repeated_ngrams(logits, text, self.no_repeat_ngram) if self.no_repeat_ngram else logits

    def logits(self, logits: Float[np.ndarray, "B V"], text: Int[np.ndarray, "B L"]) -> Float[np.ndarray, "B V"]:
        """Logits of the law for a positive temperature; minus infinity where a token is excluded."""
        kept = truncate(self.penalised(logits, text), self.temperature, self.top_k, self.top_p, self.min_p)
        return kept if self.typical_p is None else keep_typical(kept, self.typical_p)

    def probabilities(self, logits: Float[np.ndarray, "B V"], text: Int[np.ndarray, "B L"]) -> Float[np.ndarray, "B V"]:
        """The law itself, in float64: (B, V), rows that sum to 1."""
        logits = keep_finite("Law.probabilities", logits).astype(np.float64)
        if self.temperature > 0:
            return probabilities(self.logits(logits, text))
        return np.eye(logits.shape[-1])[greedy(self.penalised(logits, text))]

    def draw(
        self, logits: Float[np.ndarray, "B V"], text: Int[np.ndarray, "B L"], uniforms: Float[np.ndarray, " B"]
    ) -> Sampled:
        """One token a row at a uniform number in [0, 1), with its log-probability under this law."""
        logits = keep_finite("Law.draw", logits)
        if self.temperature == 0:
            return Sampled(greedy(self.penalised(logits, text)), np.zeros(len(logits), logits.dtype))
        return draw(self.logits(logits, text), uniforms)
