"""Policies so small that every response can be listed: exact expectations instead of samples.

Everything here is plain NumPy with gradients written out by hand, independent of the engine.
"""

import itertools

import numpy as np

# The test law of five actions: two softmax policies with standard-normal logits and a reward for each action.
LOGITS_P = np.array(
    [1.5409961082440433, -0.2934289057609464, -2.1787893820745574, 0.5684312772806678, -1.084522342424021]
)
LOGITS_Q = np.array(
    [-1.3985953953708767, 0.4033468476292993, 0.8380263329976598, -0.7192575784693592, -0.40334352493217457]
)
LOGITS_OTHER = np.array(
    [-0.5966353626151273, 0.18203648506130554, -0.8566745932963743, 1.100604170903427, -1.0711873631091473]
)
REWARDS = np.array([1.0, 0.0, 0.5, 0.2, 0.9])


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return float(np.sum(p * np.log(p / q)))


class TinyPolicy:
    """All responses over three words, the last of which ends a response, with a free logit row for each prefix.

    ``ids``, ``mask`` and ``states`` are (n, T): the words (padded), which of them are real, and the index of
    the prefix that each was chosen after. The parameters are logits of shape (states, 3).
    """

    words, end = 3, 2

    def __init__(self, longest: int):
        prefixes = [p for length in range(longest) for p in itertools.product(range(self.end), repeat=length)]
        self.index = {prefix: i for i, prefix in enumerate(prefixes)}
        self.responses = []
        for prefix in prefixes:
            last = range(self.words) if len(prefix) == longest - 1 else [self.end]
            self.responses += [(*prefix, word) for word in last]
        n = len(self.responses)
        self.ids = np.full((n, longest), self.end)
        self.mask = np.zeros((n, longest), bool)
        self.states = np.zeros((n, longest), int)
        for i, response in enumerate(self.responses):
            for t, word in enumerate(response):
                self.ids[i, t], self.mask[i, t], self.states[i, t] = word, True, self.index[response[:t]]

    @property
    def n_states(self) -> int:
        return len(self.index)

    def token_logprobs(self, logits: np.ndarray) -> np.ndarray:
        """Log-prob of every word of every response, (n, T); something odd at the padding."""
        log_p = np.log(softmax(logits))[self.states, self.ids]
        return np.where(self.mask, log_p, 123.0)

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """The probability of every response, (n,)."""
        return np.exp(np.where(self.mask, self.token_logprobs(logits), 0.0).sum(-1))

    def pull(self, logits: np.ndarray, by_logprob: np.ndarray) -> np.ndarray:
        """The gradient by the logits, from one by the log-probs (n, T): each pulls with one-hot minus policy."""
        gradient, p = np.zeros_like(logits), softmax(logits)
        for i, t in zip(*np.nonzero(self.mask), strict=True):
            score = np.eye(self.words)[self.ids[i, t]] - p[self.states[i, t]]
            gradient[self.states[i, t]] += by_logprob[i, t] * score
        return gradient

    def policy_gradient(self, logits: np.ndarray, rewards: np.ndarray) -> np.ndarray:
        """The gradient of the expected reward: each response's probability times reward times its scores."""
        weights = self.probabilities(logits) * rewards
        return self.pull(logits, np.broadcast_to(weights[:, None], self.mask.shape))

    def expected_reward(self, logits: np.ndarray, rewards: np.ndarray) -> float:
        return float(self.probabilities(logits) @ rewards)


def scalar_grpo(logprobs, old, reference, advantages, mask, *, low=0.2, high=0.2, beta=0.0, weights=None):
    """The GRPO loss and its gradient by every log-prob, one token after the other, by the sign cases.

    ``weights`` (B, T) are the tokens' weights in the aggregate; by default those of the response mean.
    """
    B, T = mask.shape
    loss, gradient = 0.0, np.zeros((B, T))
    for i in range(B):
        length = sum(bool(m) for m in mask[i])
        for t in range(T):
            if not mask[i, t]:
                continue
            weight = 1 / (B * length) if weights is None else weights[i, t]
            ratio, a = np.exp(logprobs[i, t] - old[i, t]), advantages[i]
            if a >= 0:
                term, slope = (ratio * a, ratio * a) if ratio <= 1 + high else ((1 + high) * a, 0.0)
            else:
                term, slope = (ratio * a, ratio * a) if ratio >= 1 - low else ((1 - low) * a, 0.0)
            d = reference[i, t] - logprobs[i, t]
            loss += weight * (-term + beta * (np.exp(d) - 1 - d))
            gradient[i, t] = weight * (-slope + beta * (1 - np.exp(d)))
    return loss, gradient
