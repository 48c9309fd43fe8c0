r"""The one configuration: sizes and choices of every model, in the catalogue's symbols.

The defaults are those of a LLaMA, which `Decoder` computes fast; `Transformer` and `EncoderDecoder` compute every other
choice too.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from minillm.checks import require, require_one_of, require_positive
from minillm.functional.feed_forward import GATES
from minillm.functional.positions import PAIRINGS
from minillm.functional.rope_scaling import RopeScaling
from minillm.functional.routing import check_groups
from minillm.nn.experts import ROUTERS
from minillm.nn.ffn import KINDS as FEED_FORWARDS
from minillm.nn.layers import INIT_STD
from minillm.nn.norms import KINDS as NORMS
from minillm.nn.positions import KINDS as POSITIONS

ARCHITECTURES = ("decoder", "encoder", "prefix", "encoder-decoder")
ATTENTIONS = ("heads", "latent", "linear")
FFNS = (*FEED_FORWARDS, "experts")
NORM_PLACES = ("pre", "post")
LAYOUTS = ("sequential", "parallel")
BRANCHES = ("plain", "halved", "learnt")


@dataclass(frozen=True)
class Config:
    r"""Sizes and choices of a model.

    Equation: `llama-config` the defaults: RMSNorm in front, RoPE, SwiGLU, no biases, GQA by ``n_kv_heads``, untied head
    Raises: ValueError for sizes that do not fit together and for unknown or contradictory choices.
    Source: lecture06 (the LLaMA slides).
    Differs: no biases, by which the totals come out exact (erratum 7).
    """

    vocab_size: int
    d_model: int = 128
    n_layers: int = 4
    n_heads: int = 4
    n_kv_heads: int | None = None  # as many as query heads
    d_ff: int | None = None  # 8/3 of the width when gated, 4 times it otherwise
    context: int = 256
    tied: bool = False
    rope_base: float = 10_000.0
    rope_pairing: str = "interleaved"
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    init_std: float = INIT_STD

    architecture: str = "decoder"
    n_encoder_layers: int | None = None  # of an encoder-decoder; as many as n_layers
    head_width: int | None = None  # d_model / n_heads
    positions: str = "rope"
    shaw_distance: int = 16  # of positions "shaw": farther tokens are all alike
    attention: str = "heads"  # heads: MHA, GQA, MQA by n_kv_heads; latent: DeepSeek's; linear: a running sum
    window: int | None = None
    qk_norm: bool = False
    divide_scores: bool = True  # by the root of d_head; T5 does not
    ffn: str = "swiglu"
    bias: bool = False
    norm: str = "rmsnorm"
    norm_place: str = "pre"
    layout: str = "sequential"
    branches: str = "plain"  # halved: the two parallel branches over the root of 2; learnt: a gain for each branch
    branch_init: float = 0.1
    droppath: float = 0.0
    dropout: float = 0.0  # of the embedded tokens and of every branch, in training
    attention_dropout: float = 0.0  # of the weights of attention, in training
    embedding_norm: bool = False
    n_segments: int = 0
    scaled_head: bool = False  # the head reads h / sqrt(d_model), as T5 does with its tied matrix
    n_experts: int = 8
    experts_per_token: int = 2
    n_shared_experts: int = 0
    router: str = "softmax"
    n_expert_groups: int = 1  # a token's experts come from a few groups of them: DeepSeek-V3
    expert_groups_per_token: int = 1
    expert_scale: float = 1.0  # of the weights of a token's experts
    n_dense_layers: int = 0  # with experts: so many blocks at the front have one gated network instead
    d_ff_dense: int | None = None  # of that network; d_ff
    capacity_factor: float | None = None
    d_latent: int | None = None  # of latent attention: keys and values; d_model / 2
    d_latent_q: int | None = None  # of latent attention: queries; None: not compressed
    d_rotary: int | None = None  # of latent attention: the part that turns; half a head
    d_value: int | None = None  # of latent attention: a head's values; as wide as its keys

    def __post_init__(self) -> None:
        self._fill("n_kv_heads", self.n_heads)
        for name in ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "context"):
            require_positive(getattr(self, name), "Config", name, integer=True)
        self._fill(
            "d_ff", 4 * -(-(8 * self.d_model // 3) // 4) if self.ffn in (*GATES, "experts") else 4 * self.d_model
        )
        require_positive(self.d_ff, "Config", "d_ff", integer=True)
        self._check_choices()
        self._check_heads()
        self._check_combinations()
        for name in ("norm_eps", "init_std", "branch_init"):
            require_positive(getattr(self, name), "Config", name, zero_ok=name == "branch_init")
        require(self.rope_base > 1, "Config", "rope_base", "above 1", self.rope_base)
        for name in ("droppath", "dropout", "attention_dropout"):
            require(0 <= getattr(self, name) < 1, "Config", name, "in [0, 1)", getattr(self, name))

    def _fill(self, name: str, value: int) -> None:
        if getattr(self, name) is None:
            object.__setattr__(self, name, value)

    def _check_choices(self) -> None:
        wanted = "'latent' for DeepSeek's (a narrow cache); for Perceiver's few queries use `LatentTransformer`"
        require(self.attention != "mla", "Config", "attention", wanted, "'mla', which means both")
        for name, allowed in {
            "rope_pairing": PAIRINGS,
            "architecture": ARCHITECTURES,
            "positions": POSITIONS,
            "attention": ATTENTIONS,
            "ffn": FFNS,
            "norm": NORMS,
            "norm_place": NORM_PLACES,
            "layout": LAYOUTS,
            "branches": BRANCHES,
        }.items():
            require_one_of(getattr(self, name), allowed, "Config", name)
        for name in (
            "n_encoder_layers",
            "head_width",
            "window",
            "d_latent",
            "d_latent_q",
            "d_rotary",
            "d_value",
            "d_ff_dense",
        ):
            if getattr(self, name) is not None:
                require_positive(getattr(self, name), "Config", name, integer=True)
        for name in ("n_segments", "n_shared_experts", "n_dense_layers"):
            require_positive(getattr(self, name), "Config", name, integer=True, zero_ok=True)

    def _check_heads(self) -> None:
        turns = self.positions == "rope" and self.attention != "latent"
        given = f"{self.d_model} / {self.n_heads}" if self.head_width is None else self.head_width
        if turns:
            even = self.d_model % (2 * self.n_heads) == 0 if self.head_width is None else self.head_width % 2 == 0
            wanted = "an even integer (rotary positions turn pairs)"
            require(even, "Config", "d_model / n_heads", wanted, given)
        elif self.head_width is None:
            require(self.d_model % self.n_heads == 0, "Config", "d_model / n_heads", "an integer", given)
        divides = self.n_heads % (self.n_kv_heads or self.n_heads) == 0
        require(divides, "Config", "n_kv_heads", f"a divisor of n_heads = {self.n_heads}", self.n_kv_heads)

    def _check_combinations(self) -> None:
        turns = self.positions == "rope" and self.attention == "heads"
        wanted = "None without rotary positions of attention by heads"
        require(self.rope_scaling is None or turns, "Config", "rope_scaling", wanted, self.rope_scaling)
        causal_only = self.attention == "latent" or self.window is not None
        require(
            not causal_only or self.architecture == "decoder",
            "Config",
            "the architecture",
            "'decoder' with latent attention or a window",
            self.architecture,
        )
        wanted = "'parallel' for halved branches (there are two to add)"
        require(self.branches != "halved" or self.layout == "parallel", "Config", "the layout", wanted, self.layout)
        parallel_post = self.layout == "parallel" and self.norm_place == "post"
        require(not parallel_post, "Config", "norm_place", "'pre' in a parallel block", self.norm_place)
        if self.layout == "parallel":
            wanted = "'sequential' for an encoder-decoder"
            require(self.architecture != "encoder-decoder", "Config", "the layout", wanted, self.layout)
        dense = self.ffn == "experts" and self.architecture != "encoder-decoder"
        most = self.n_layers if dense else 0
        wanted = f"at most {most}" + ("" if dense else " without experts in one stack")
        require(self.n_dense_layers <= most, "Config", "n_dense_layers", wanted, self.n_dense_layers)
        require_positive(self.expert_scale, "Config", "expert_scale")
        if self.ffn == "experts":
            require_one_of(self.router, ROUTERS, "Config", "router")
            if self.capacity_factor is not None:
                require_positive(self.capacity_factor, "Config", "capacity_factor")
            require_positive(self.n_experts, "Config", "n_experts", integer=True)
            require_positive(self.experts_per_token, "Config", "experts_per_token", integer=True)
            fits = self.experts_per_token <= self.n_experts
            require(fits, "Config", "experts_per_token", f"at most {self.n_experts}", self.experts_per_token)
            check_groups(
                "Config", self.n_experts, self.n_expert_groups, self.expert_groups_per_token, self.experts_per_token
            )
        by_heads = self.attention == "heads" and self.positions != "shaw"
        wanted = "0 unless attention is by heads, without Shaw's positions"
        require(by_heads or not self.attention_dropout, "Config", "attention_dropout", wanted, self.attention_dropout)
        if self.positions == "shaw":
            require_positive(self.shaw_distance, "Config", "shaw_distance", integer=True)
            plain = self.attention == "heads" and self.n_kv_heads == self.n_heads
            plain = plain and self.window is None and self.divide_scores
            wanted = "another, or attention by heads with n_kv_heads = n_heads, no window and divided scores"
            require(plain, "Config", "positions", wanted, self.positions)
        if self.attention == "linear":
            plain = self.positions in ("none", "sinusoidal", "learned") and self.n_kv_heads == self.n_heads
            wanted = "'none', 'sinusoidal' or 'learned' with linear attention, and n_kv_heads = n_heads"
            require(plain, "Config", "positions", wanted, f"{self.positions!r}, n_kv_heads = {self.n_kv_heads}")
            require(self.architecture == "decoder", "Config", "the architecture", "'decoder' here", self.architecture)

    @property
    def d_head(self) -> int:
        """The width of one head."""
        return self.d_model // self.n_heads if self.head_width is None else self.head_width

    @property
    def is_llama(self) -> bool:
        """Whether `Decoder` has everything that is asked for."""
        plain = Config(1).to_dict()
        return all(value == plain[name] for name, value in self.to_dict().items() if name not in LLAMA_SIZES)

    def to_dict(self) -> dict:
        """The configuration as plain data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Config":
        """A configuration from what `to_dict` gave."""
        scaling = values.get("rope_scaling")
        stretched = RopeScaling(**scaling) if isinstance(scaling, Mapping) else scaling
        return cls(**{**values, "rope_scaling": stretched})


LLAMA_SIZES = frozenset(
    "vocab_size d_model n_layers n_heads n_kv_heads d_ff context tied rope_base rope_pairing rope_scaling norm_eps init_std".split()
)
