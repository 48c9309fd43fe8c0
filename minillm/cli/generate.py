"""`minillm generate`: continue a text with a model that `minillm train` has saved, or with a pretrained one."""

import argparse
import codecs
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minillm.checks import require, require_positive
from minillm.cli.output import print_json
from minillm.data import Tokenizer
from minillm.decoding import beam_search, generate
from minillm.decoding.conditional import writer
from minillm.models.making import AnyModel
from minillm.models.pretrained import is_pretrained, load_pretrained
from minillm.training.restore import load_model

MOST_BY_DEFAULT = 200
T5_START = 0  # its padding id


def read_ids(text: str) -> np.ndarray:
    """Ids from numbers between commas or spaces."""
    words = text.replace(",", " ").split()
    whole = all(word.removeprefix("-").isdecimal() for word in words)
    require(whole, "generate", "--prompt-ids", "whole numbers between commas or spaces", text)
    return np.array([int(word) for word in words], np.int64)


def prompt_ids(args: argparse.Namespace, tokenizer: Tokenizer | None) -> np.ndarray:
    """The ids that the text starts with."""
    if args.prompt_ids is not None:
        ids = read_ids(args.prompt_ids)
    else:
        hint = "Pass --prompt-ids."
        require(tokenizer is not None, "generate", "the checkpoint", "one with a tokenizer", "one without", hint)
        assert tokenizer is not None
        ids = tokenizer.encode(args.prompt, bos=tokenizer.adds_bos and tokenizer.bos_id is not None)
    require(ids.size > 0, "generate", "the prompt", "at least one token", "an empty text")
    return ids


class Loaded(NamedTuple):
    """A model and its tokenizer; what an encoder-decoder begins with, where it is not its source's last token."""

    model: AnyModel
    tokenizer: Tokenizer | None
    start: int | None


def load(checkpoint: Path) -> Loaded:
    """A pretrained model, or one that a run has saved."""
    if is_pretrained(checkpoint):
        found = load_pretrained(checkpoint)
        return Loaded(found.model, found.tokenizer, T5_START)
    restored = load_model(checkpoint)
    return Loaded(restored.model, restored.tokenizer, None)


class Printer:
    """Prints a text as its tokens come; the bytes of a character may be spread over several."""

    def __init__(self, prompt: str, tokenizer: Tokenizer | None):
        self.waiting, self.tokenizer = prompt, tokenizer
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def __call__(self, ids: np.ndarray) -> None:
        if self.tokenizer is None:
            text = f" {ids[0]}"
        else:
            text = self.decoder.decode(self.tokenizer.decode_next(ids[:1]))
        print(self.waiting + text, end="", flush=True)
        self.waiting = ""


def run(args: argparse.Namespace) -> int:
    """Load, generate and print."""
    require_positive(args.samples, "generate", "--samples", integer=True)
    loaded, tokenizer, start = load(args.checkpoint)
    ids = prompt_ids(args, tokenizer)
    model, prompts = writer("generate", loaded, ids, start)
    room = max(1, model.config.context + 1 - prompts.shape[1])
    shown = args.prompt if args.prompt_ids is None else " ".join(map(str, ids))
    streaming = args.samples == 1 and not args.json and args.beams is None
    length = min(MOST_BY_DEFAULT, room) if args.max_new_tokens is None else args.max_new_tokens
    ends = {"eos_id": None if tokenizer is None else tokenizer.eos_id, "stop": stop_sequences(args.stop, tokenizer)}
    if args.beams is not None:
        show(args, shown, tokenizer, beam_rows(args, model, prompts, length, ends))
        return 0
    made = generate(
        model,
        prompts,
        length,
        np.random.default_rng(args.seed),
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        typical_p=args.typical_p,
        repetition=args.repetition,
        frequency=args.frequency,
        presence=args.presence,
        no_repeat_ngram=args.no_repeat_ngram,
        copies=args.samples,
        on_token=Printer(shown, tokenizer) if streaming else None,
        **ends,
    )
    if streaming:
        print()
        return 0
    show(args, shown, tokenizer, zip(*made))
    return 0


def stop_sequences(texts: list[str], tokenizer: Tokenizer | None) -> list[list[int]]:
    """Ids of the texts behind which to stop; without a tokenizer the texts are ids."""
    return [(read_ids(text) if tokenizer is None else tokenizer.encode_next(text)).tolist() for text in texts]


def beam_rows(args: argparse.Namespace, model, prompts: np.ndarray, length: int, ends: dict) -> Iterable[tuple]:
    """The best continuations by beam search: tokens, log-probabilities, mask, terminated of each."""
    require_positive(args.beams, "generate", "--beams", integer=True)
    fits = args.samples <= args.beams
    require(fits, "generate", "--samples", f"at most the number of beams, {args.beams}", args.samples)
    found = beam_search(
        model,
        prompts,
        length,
        beams=args.beams,
        length_penalty=args.length_penalty,
        repetition=args.repetition,
        no_repeat_ngram=args.no_repeat_ngram,
        **ends,
    )
    return zip(found.tokens[0], found.logprobs[0], found.mask[0], found.terminated[0])


def show(args: argparse.Namespace, shown: str, tokenizer: Tokenizer | None, found: Iterable[tuple]) -> None:
    """Print continuations, or a row of JSON each."""
    rows = []
    for tokens, logprobs, mask, terminated in islice(found, args.samples):
        kept = tokens[mask]
        if tokenizer is None:
            text = " " + " ".join(map(str, kept))
        else:
            text = tokenizer.decode_next(kept).decode("utf-8", "replace")
        rows.append(
            {
                "prompt": shown,
                "text": text,
                "tokens": kept,
                "logprob": float(np.where(mask, logprobs, 0).sum() if np.ndim(logprobs) else logprobs),
                "terminated": bool(terminated),
            }
        )
    if args.json:
        print_json(rows)
    else:
        print("\n---\n".join(row["prompt"] + row["text"] for row in rows))


def add_parser(subparsers) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser("generate", help="continue a text with a trained model", description=__doc__)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        default=Path("runs/train"),
        help="a run's folder, a checkpoint file, smollm2, a GGUF file or a folder of transformers",
    )
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", default="The ", help="text to continue (default %(default)r)")
    prompt.add_argument("--prompt-ids", default=None, help="ids to continue, for a model without a tokenizer")
    parser.add_argument("--max-new-tokens", type=int, default=None, help="tokens to write (default: 200 or what fits)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0 takes the most likely token (default %(default)s)"
    )
    parser.add_argument("--top-k", type=int, default=None, help="sample from the k most likely tokens only")
    parser.add_argument(
        "--top-p", type=float, default=0.95, help="sample from the nucleus of this mass (default %(default)s)"
    )
    parser.add_argument(
        "--min-p", type=float, default=None, help="sample from tokens with this share of the largest only"
    )
    parser.add_argument("--typical-p", type=float, default=None, help="sample from the typical set of this mass")
    parser.add_argument(
        "--repetition",
        type=float,
        default=1.0,
        help="divide or multiply what was said by this (default %(default)s: off)",
    )
    parser.add_argument("--frequency", type=float, default=0.0, help="subtract this for every time a token was said")
    parser.add_argument("--presence", type=float, default=0.0, help="subtract this from tokens that were said")
    parser.add_argument("--no-repeat-ngram", type=int, default=0, help="say no n tokens in a row twice (default: off)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="stop behind this; may be repeated")
    parser.add_argument("--beams", type=int, default=None, help="beam search with so many beams, instead of sampling")
    parser.add_argument(
        "--length-penalty",
        type=float,
        default=0.0,
        help="beams are ranked by log p / length**this (default %(default)s)",
    )
    parser.add_argument("--samples", type=int, default=1, help="texts to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random numbers")
    parser.add_argument("--json", action="store_true", help="one JSON array on standard output")
    parser.set_defaults(run=run)
