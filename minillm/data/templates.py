r"""Instructions as text: the record and the prompt that is made of it."""

import os
from typing import NamedTuple

from minillm.checks import require
from minillm.data.files import read_json

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
