"""`minillm chat`: talk to a pretrained model; an empty line or the end of the input ends the conversation."""

import argparse
import codecs
import sys
from collections.abc import Iterator

import numpy as np
from threadpoolctl import ThreadpoolController

from minillm.checks import require, require_positive
from minillm.cli.output import print_json
from minillm.decoding.conversation import Conversation
from minillm.decoding.interface import writing_model
from minillm.models.pretrained import SMOLLM2, load_pretrained
from minillm.training.step import available_cores


def questions(args: argparse.Namespace) -> Iterator[str]:
    """What the user says: the messages of the command line, else lines of the input, with a prompt on a terminal."""
    if args.message:
        yield from args.message
        return
    typed = sys.stdin.isatty()
    while True:
        if typed:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline().strip()
        if not line:
            return
        yield line


def run(args: argparse.Namespace) -> int:
    """Load the model and answer message by message."""
    require_positive(args.context, "chat", "--context", integer=True)
    if args.max_new_tokens is not None:
        require_positive(args.max_new_tokens, "chat", "--max-new-tokens", integer=True)
    require(bool(args.message) or not args.json, "chat", "--json", "used with --message", "a dialogue")
    pretrained = load_pretrained(args.model, args.context)
    tokenizer = pretrained.tokenizer
    require(tokenizer is not None, "chat", "the model", "one with a tokenizer", "one without")
    assert tokenizer is not None
    system = pretrained.system if args.system is None else args.system
    model = writing_model("chat", pretrained.model)
    conversation = Conversation(model, tokenizer, system=system)
    rng = np.random.default_rng(args.seed)
    law = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p, "min_p": args.min_p}
    # A step reads every weight once, so memory bounds it; more than two threads gain nothing there.
    with ThreadpoolController().limit(limits=min(2, available_cores()), user_api="blas"):
        for text in questions(args):
            decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may be spread over tokens
            for token in conversation.ask(text, rng, max_new_tokens=args.max_new_tokens, **law):
                if not args.json:
                    print(decoder.decode(tokenizer.decode_next([token])), end="", flush=True)
            if not args.json:
                print(decoder.decode(b"", final=True), flush=True)
    if args.json:
        print_json([message._asdict() for message in conversation.messages])
    return 0


def add_parser(subparsers) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser("chat", help="talk to a pretrained model", description=__doc__)
    parser.add_argument(
        "--model", default=SMOLLM2, help="smollm2, a GGUF file or a folder with safetensors (default %(default)s)"
    )
    parser.add_argument("--message", action="append", help="say this instead of asking; several make several turns")
    parser.add_argument("--system", default=None, help="system message (default: the model's own)")
    parser.add_argument("--max-new-tokens", type=int, default=None, help="longest answer (default: what fits)")
    parser.add_argument(
        "--context", type=int, default=2048, help="longest conversation in tokens (default %(default)s)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.2, help="0 takes the most likely token (default %(default)s)"
    )
    parser.add_argument("--top-k", type=int, default=None, help="sample from the k most likely tokens only")
    parser.add_argument(
        "--top-p", type=float, default=0.9, help="sample from the nucleus of this mass (default %(default)s)"
    )
    parser.add_argument(
        "--min-p", type=float, default=None, help="sample from tokens with this share of the largest only"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random numbers")
    parser.add_argument("--json", action="store_true", help="one JSON array of the turns on standard output")
    parser.set_defaults(run=run)
