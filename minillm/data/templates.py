r"""Instructions and conversations as text: the records and the prompts that are made of them."""

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from minillm.checks import message, require
from minillm.data.files import read_json
from minillm.data.tokenizer_base import Tokenizer

PREAMBLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."


class InstructionRecord(NamedTuple):
    r"""One task with its answer; the input may be empty.

    Equation: `instruction-dataset` (instruction, input, output)
    Source: lecture06 (Instruction dataset).
    """

    instruction: str
    input: str
    output: str


def alpaca_prompt(instruction: str, input: str = "", *, preamble: str = PREAMBLE) -> str:
    r"""The prompt up to and including the heading under which the response is to be written.

    Equation: `alpaca-template` preamble, `### Instruction:`, `### Input:` if there is one, `### Response:`
    Raises: ValueError for an empty instruction.
    Source: lecture06 (Instruction dataset).
    """
    require(instruction.strip() != "", "alpaca_prompt", "the instruction", "some text", repr(instruction))
    parts = [preamble, f"### Instruction:\n{instruction}"]
    if input:
        parts.append(f"### Input:\n{input}")
    return "\n\n".join([*parts, "### Response:\n"])


def alpaca_template(record: InstructionRecord, *, preamble: str = PREAMBLE) -> str:
    r"""Prompt and response as one text, what instruction tuning reads.

    Equation: `alpaca-template` prompt of :func:`alpaca_prompt` followed by the output
    Source: lecture06 (Instruction dataset).
    """
    return alpaca_prompt(record.instruction, record.input, preamble=preamble) + record.output


def load_instructions(path: str | os.PathLike) -> list[InstructionRecord]:
    r"""Read a JSON array of objects with ``instruction``, ``output`` and, where there is one, ``input``.

    Equation: `instruction-dataset` records of instruction, input, output
    Raises: FileNotFoundError if there is no file, ValueError naming the record that does not have this form.
    Source: lecture06 (Instruction dataset).
    """
    where = "load_instructions"
    entries = read_json(path, where)
    require(isinstance(entries, list) and len(entries) > 0, where, f"the file {path}", "a list of records", entries)
    records = []
    for i, entry in enumerate(entries):
        fields = {"input": "", **entry} if isinstance(entry, dict) else {}
        sound = all(isinstance(fields.get(name), str) for name in InstructionRecord._fields)
        require(sound, where, f"record {i}", "an object with the texts instruction, input, output", repr(entry))
        records.append(InstructionRecord(*(fields[name] for name in InstructionRecord._fields)))
    return records


class Message(NamedTuple):
    """One turn of a conversation; the role is system, user or assistant."""

    role: str
    content: str


# Chat templates that `chatml_text` renders, and the system message each of them puts in front where there is none.
CHATML_TEMPLATES = {
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}": "You are a helpful AI assistant named "
    "SmolLM, trained by Hugging Face",
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}": None,
}

ROLES = ("system", "user", "assistant")
TURN_STARTS, TURN_ENDS = "<|im_start|>", "<|im_end|>"


def chatml_text(messages: Sequence[Message], *, system: str | None = None, open_answer: bool = True) -> str:
    r"""A conversation in the form ChatML, and the opening of the answer.

    Each turn is `<|im_start|>`, the role, a line break, the content, `<|im_end|>`, a line break.

    Raises: ValueError for no messages, an unknown role, or a system message that is not the first.
    Source: the chat template of SmolLM2.

    ``system`` is the system message of a conversation that does not begin with one; none is put in when it is None.
    """
    turns = _turns(messages, system)
    text = "".join(f"{TURN_STARTS}{role}\n{content}{TURN_ENDS}\n" for role, content in turns)
    return text + (f"{TURN_STARTS}assistant\n" if open_answer else "")


def chatml_ids(
    tokenizer: Tokenizer, messages: Sequence[Message], *, system: str | None = None, open_answer: bool = True
) -> Int[np.ndarray, " L"]:
    r"""The ids of :func:`chatml_text`, in which only the template's own marks become special tokens.

    Raises: ValueError as chatml_text does, or if the tokenizer has no ids for the two marks.

    What a message says is encoded as ordinary text, so a message cannot end its own turn and speak for somebody else.
    """
    marks = []
    for name in (TURN_STARTS, TURN_ENDS):
        token = tokenizer.special_id(name)
        require(token is not None, "chatml_ids", "the tokenizer", f"one with a special token {name}", tokenizer)
        marks.append(np.array([token], np.int64))
    start, end = marks
    parts = []
    for role, content in _turns(messages, system):
        parts += [start, tokenizer.encode_next(f"{role}\n{content}"), end, tokenizer.encode_next("\n")]
    if open_answer:
        parts += [start, tokenizer.encode_next("assistant\n")]
    return np.concatenate(parts)


def default_system(template: str | None) -> str | None:
    """The system message that a model's chat template puts in by itself.

    Raises: ValueError for a template that is not of the form ChatML, or for none.
    """
    for text, system in CHATML_TEMPLATES.items():
        if template in (text, text.replace("\n", "\\n")):
            return system
    received = "none" if template is None else repr(template[:60])
    raise ValueError(message("chat", "the model's chat template", "ChatML in a known form", received, "Use generate."))


def _turns(messages: Sequence[Message], system: str | None) -> list[Message]:
    require(len(messages) > 0, "chatml", "the conversation", "at least one message", "none")
    for i, (role, _) in enumerate(messages):
        require(role in ROLES, "chatml", f"the role of message {i}", "one of " + ", ".join(ROLES), repr(role))
        first = role != "system" or i == 0
        require(first, "chatml", f"message {i}", "of the user or the assistant", "a system message behind others")
    given = messages[0].role == "system"
    return [*([] if given or system is None else [Message("system", system)]), *messages]
