r"""Rotary positions in the words of a `config.json`: what stretches them, read and written."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from minillm.checks import message, require, require_one_of, require_positive
from minillm.functional.rope_scaling import RopeScaling
from minillm.models.config import Config

KINDS = ("default", "linear", "dynamic", "yarn", "llama3")


class Rotary(NamedTuple):
    """The base of the frequencies, and how positions are stretched."""

    base: float
    scaling: RopeScaling | None


def rope_kind(theirs: Mapping[str, Any]) -> str:
    """The name of the scaling in a configuration, in its new form (rope_parameters) or its old one (rope_scaling)."""
    rope = _parameters(theirs)
    return str(rope.get("rope_type", rope.get("type")) or "default")


def read_rope(theirs: Mapping[str, Any], context: int) -> Rotary:
    r"""Rotary positions as a configuration describes them, for texts of up to ``context`` tokens.

    Equation: `pos-rope-scaling` linear, dynamic (NTK), yarn, llama3
    Shapes: the contents of a config.json -> base and scaling
    Raises: ValueError for another kind, or one without its numbers.
    Source: notes §6.
    Differs: "dynamic" takes a new base for every length beyond that of the training; here the base is that of the whole
        ``context`` (the training's own up to its length), so that a key in a cache need not be turned again.
    """
    rope, kind = _parameters(theirs), rope_kind(theirs)
    require_one_of(kind, KINDS, "read_rope", "the kind of rotary positions (rope_type)")
    share = rope.get("partial_rotary_factor", theirs.get("partial_rotary_factor"))
    require(share in (None, 1, 1.0), "read_rope", "partial_rotary_factor", "1 (whole heads turn)", share)
    base = float(rope.get("rope_theta") or theirs.get("rope_theta") or 10_000.0)
    longest = int(theirs["max_position_embeddings"])
    trained = int(rope.get("original_max_position_embeddings") or longest)
    if kind == "default":
        return Rotary(base, None)
    if kind == "yarn":
        return Rotary(base, _yarn(rope, longest, trained))
    factor = _number(rope, kind, "factor")
    if kind == "linear":
        return Rotary(base, RopeScaling("linear", factor))
    if kind == "dynamic":
        stretch = factor * max(context, longest) / longest - (factor - 1)
        return Rotary(base, None if stretch == 1 else RopeScaling("ntk", stretch))
    low, high = (_number(rope, kind, f"{name}_freq_factor") for name in ("low", "high"))
    return Rotary(base, RopeScaling("llama3", factor, trained, low, high))


def write_rope(config: Config) -> dict[str, Any]:
    """The `rope_parameters` of a configuration of ours.

    Raises: ValueError for YaRN with a ramp over turns, which their configuration cannot say.
    """
    scaling, base = config.rope_scaling, config.rope_base
    if scaling is None or scaling.kind == "none":
        return {"rope_type": "default", "rope_theta": base}
    if scaling.kind == "ntk":  # no more than another base
        stretched = base * scaling.factor ** (config.d_head / (config.d_head - 2))
        return {"rope_type": "default", "rope_theta": stretched}
    found: dict[str, Any] = {"rope_type": scaling.kind, "rope_theta": base, "factor": scaling.factor}
    if scaling.kind == "llama3":
        found |= {"low_freq_factor": scaling.low, "high_freq_factor": scaling.high}
    elif scaling.kind == "yarn":
        require(scaling.ramp != "turns", "write_rope", "the ramp of YaRN", "'pairs' or 'whole pairs'", scaling.ramp)
        found |= {"beta_slow": scaling.low, "beta_fast": scaling.high, "truncate": scaling.ramp == "whole pairs"}
        found |= {} if scaling.magnitude is None else {"attention_factor": scaling.magnitude}
    return found if scaling.kind == "linear" else {**found, "original_max_position_embeddings": scaling.L_train}


def _parameters(theirs: Mapping[str, Any]) -> Mapping[str, Any]:
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    require(isinstance(rope, Mapping), "read_rope", "rope_parameters", "names with numbers", rope)
    return rope


def _number(rope: Mapping[str, Any], kind: str, name: str) -> float:
    if rope.get(name) is None:
        raise ValueError(message("read_rope", f"the rotary positions '{kind}'", f"given with {name}", "none"))
    require_positive(rope[name], "read_rope", name)
    return float(rope[name])


def _yarn(rope: Mapping[str, Any], longest: int, trained: int) -> RopeScaling:
    factor = longest / trained if rope.get("factor") is None else _number(rope, "yarn", "factor")
    magnitude, whole = rope.get("attention_factor"), rope.get("truncate", True)
    if magnitude is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        first, second = (_magnitude(factor, float(rope[name])) for name in ("mscale", "mscale_all_dim"))
        magnitude = first / second
    return RopeScaling(
        "yarn",
        factor,
        trained,
        low=float(rope.get("beta_slow") or 1.0),
        high=float(rope.get("beta_fast") or 32.0),
        ramp="whole pairs" if whole else "pairs",
        magnitude=None if magnitude is None else float(magnitude),
    )


def _magnitude(factor: float, weight: float) -> float:
    return 1.0 + weight * (RopeScaling("yarn", factor).own_magnitude - 1.0)
