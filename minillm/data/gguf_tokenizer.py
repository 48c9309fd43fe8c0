r"""The tokenizer inside a GGUF file."""

from minillm.checks import message, require
from minillm.data.gguf import GGUF
from minillm.data.pretrained_bpe import PretrainedBPE

# The name of a rule for cutting text, as the files have it, and ours.
SPLITS = {
    "smollm": "smollm",
    "gpt-2": "gpt2",
    "default": "gpt2",
    "llama-bpe": "llama3",
    "llama3": "llama3",
    "qwen2": "qwen2",
}
NORMAL, CONTROL = 1, 3  # kinds of tokens; control tokens spell nothing


def tokenizer_from_gguf(file: GGUF) -> PretrainedBPE:
    """The byte-level BPE tokenizer that a GGUF file describes.

    Raises: ValueError if it describes another kind of tokenizer, or an inconsistent one.
    """
    where = "tokenizer_from_gguf"
    model = file.field("tokenizer.ggml.model", str)
    require(model == "gpt2", where, "the tokenizer", "byte-level BPE (gpt2)", model, "Other kinds are not supported.")
    rule = file.field("tokenizer.ggml.pre", str, "default")
    require(rule in SPLITS, where, "the rule for cutting text", "one of " + ", ".join(SPLITS), rule)
    vocabulary = _texts(file, "tokenizer.ggml.tokens")
    kinds = file.metadata.get("tokenizer.ggml.token_type")
    n = len(kinds) if kinds is not None and hasattr(kinds, "__len__") else None
    require(n == len(vocabulary), where, "the kinds of tokens", f"{len(vocabulary)}, one each", n)
    assert kinds is not None
    specials = {text: token for token, text in enumerate(vocabulary) if kinds[token] == CONTROL}
    roles = {}
    for role, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        if f"tokenizer.ggml.{name}_token_id" in file.metadata:
            roles[role] = file.field(f"tokenizer.ggml.{name}_token_id", int)
    return PretrainedBPE(
        vocabulary,
        [_pair(merge) for merge in _texts(file, "tokenizer.ggml.merges")],
        specials=specials,
        roles=roles,
        split=SPLITS[rule],
        adds_bos=file.field("tokenizer.ggml.add_bos_token", bool, False),
        whole_pieces=SPLITS[rule] == "llama3",
    )


def _texts(file: GGUF, name: str) -> list[str]:
    texts = file.field(name, list)
    require(all(isinstance(text, str) for text in texts), "tokenizer_from_gguf", name, "texts", "something else")
    return texts


def _pair(merge: str) -> tuple[str, str]:
    first, space, second = merge.partition(" ")
    if not (first and space and second):
        raise ValueError(message("tokenizer_from_gguf", "a merge", "two tokens with a space between", repr(merge)))
    return first, second
