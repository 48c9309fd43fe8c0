r"""A LLaMA-style decoder from a GGUF file.

The file holds the rows of the query and key maps in the order in which *neighbouring* components of a head are turned
against each other (its writer reordered them from the order of halves). That is our rope_pairing "interleaved", so
the matrices are taken as they are; :func:`minillm.models.llama_weights.to_llama` puts them back for transformers.
"""

import numpy as np

from minillm.checks import message, require
from minillm.data.gguf import GGUF, GGUFTensor
from minillm.functional.block_formats import DEQUANTISE
from minillm.models.blank import BLANK
from minillm.models.config import Config
from minillm.models.decoder import Decoder

FLOATS = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "F64": np.dtype("<f8")}

PLAIN = {  # within a layer: ours -> the file's
    "attention_norm.gain": "attn_norm.weight",
    "attention.w_out": "attn_output.weight",
    "ffn_norm.gain": "ffn_norm.weight",
    "ffn.w_down": "ffn_down.weight",
}
JOINT = {  # within a layer: ours -> the file's, from top to bottom
    "attention.w_qkv": ["attn_q.weight", "attn_k.weight", "attn_v.weight"],
    "ffn.w_value_gate": ["ffn_up.weight", "ffn_gate.weight"],
}
OUTSIDE = {
    "embedding.weight": "token_embd.weight",
    "final_norm.gain": "output_norm.weight",
    "head.weight": "output.weight",
}


def dequantise(tensor: GGUFTensor) -> np.ndarray:
    """The numbers of a tensor in float32.

    Raises: ValueError for a kind of blocks that is not supported.
    """
    kind, raw = tensor.kind.name, tensor.blocks.reshape(-1)
    known = [*FLOATS, "BF16", *DEQUANTISE]
    require(kind in known, "dequantise", f"the kind of {tensor.name}", "one of " + ", ".join(known), kind)
    if kind in FLOATS:
        numbers = raw.view(FLOATS[kind])
    elif kind == "BF16":  # the upper half of a float32
        numbers = (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        numbers = DEQUANTISE[kind](raw)
    return np.ascontiguousarray(numbers.reshape(tensor.shape), np.float32)


def gguf_config(file: GGUF, context: int | None = None) -> Config:
    r"""The configuration of a GGUF file of the LLaMA architecture; ``context`` makes it shorter.

    Equation: `llama-config` RMSNorm, SwiGLU, RoPE, no biases
    Raises: ValueError for another architecture, scaled rotary positions or heads of another width.
    Source: lecture06 (LLaMA table); Touvron et al. 2023.
    """
    where = "gguf_config"
    architecture = file.field("general.architecture", str)
    require(architecture == "llama", where, f"the architecture of {file.path}", "llama", architecture)
    scaling = file.metadata.get("llama.rope.scaling.type", "none")
    require(scaling == "none", where, "the rotary positions", "unscaled", str(scaling))
    require("rope_freqs.weight" not in file.tensors, where, "the rotary positions", "unscaled", "scaled by a tensor")

    d_model, n_heads = (file.field(f"llama.{name}", int) for name in ("embedding_length", "attention.head_count"))
    width = file.field("llama.rope.dimension_count", int, d_model // max(n_heads, 1))
    require(
        width * n_heads == d_model, where, "the rotated width times the heads", str(d_model), f"{width} * {n_heads}"
    )
    longest = file.field("llama.context_length", int)
    embedding = file.tensors.get("token_embd.weight")
    require(
        embedding is not None, where, f"the tensors of {file.path}", "there, token_embd.weight among them", "others"
    )
    assert embedding is not None
    return Config(
        vocab_size=embedding.shape[0],
        d_model=d_model,
        n_layers=file.field("llama.block_count", int),
        n_heads=n_heads,
        n_kv_heads=file.field("llama.attention.head_count_kv", int, n_heads),
        d_ff=file.field("llama.feed_forward_length", int),
        context=longest if context is None else min(context, longest),
        tied="output.weight" not in file.tensors,
        rope_base=file.field("llama.rope.freq_base", float, 10_000.0),
        rope_pairing="interleaved",
        norm_eps=file.field("llama.attention.layer_norm_rms_epsilon", float),
    )


def from_gguf(file: GGUF, config: Config) -> dict[str, np.ndarray]:
    """Our `state_dict` from the tensors of a GGUF file.

    Shapes: theirs as in the file -> joint matrices ((H + 2 H_kv) d_head, d_model) and (2 d_ff, d_model)
    Raises: ValueError for a missing tensor, or one that this architecture does not have.
    """
    left = dict(file.tensors)

    def take(name: str) -> np.ndarray:
        if name not in left:
            raise ValueError(
                message("from_gguf", f"the tensors of {file.path}", f"there, {name} among them", "none such")
            )
        return dequantise(left.pop(name))

    state = {ours: take(theirs) for ours, theirs in OUTSIDE.items() if not (config.tied and ours == "head.weight")}
    for i in range(config.n_layers):
        for ours, theirs in PLAIN.items():
            state[f"blocks.{i}.{ours}"] = take(f"blk.{i}.{theirs}")
        for ours, parts in JOINT.items():
            state[f"blocks.{i}.{ours}"] = np.concatenate([take(f"blk.{i}.{part}") for part in parts])
    require(not left, "from_gguf", "the tensors", "those of a plain LLaMA", f"also {', '.join(sorted(left)[:3])}")
    return state


def decoder_from_gguf(file: GGUF, context: int | None = None) -> Decoder:
    """The decoder that a GGUF file holds, in float32.

    Raises: ValueError if the file is of another architecture or its tensors are not those that its metadata describe.
    """
    config = gguf_config(file, context)
    check_blocks(file, config)
    model = Decoder(config, BLANK)
    model.load_state_dict(from_gguf(file, config))
    return model


def check_blocks(file: GGUF, config: Config) -> None:
    """Raise ValueError unless the metadata describe the tensors, before a model of the described size is made."""
    d, f = config.d_model, config.d_ff or 0
    kv = (config.n_kv_heads or config.n_heads) * config.d_head
    shapes = {"attn_q": (d, d), "attn_k": (kv, d), "attn_v": (kv, d), "ffn_up": (f, d), "ffn_gate": (f, d)}
    n = sum(name.endswith(".attn_q.weight") for name in file.tensors)
    require(n == config.n_layers, "decoder_from_gguf", "the layers", f"{config.n_layers}, as the metadata say", n)
    for i in range(config.n_layers):
        for part, shape in {**shapes, "attn_output": (d, d), "ffn_down": (d, f)}.items():
            found = file.tensors.get(f"blk.{i}.{part}.weight")
            received = "none" if found is None else str(found.shape)
            require(
                received == str(shape), "decoder_from_gguf", f"blk.{i}.{part}.weight", f"of shape {shape}", received
            )
