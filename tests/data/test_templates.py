"""Instruction records and the template that makes prompts of them."""

import json

import pytest

from minillm.data import InstructionRecord, alpaca_prompt, alpaca_template, load_instructions

PASSIVE = InstructionRecord(
    "Rewrite the following sentence using passive voice.",
    "The team achieved great results.",
    "Great results were achieved by the team.",
)


@pytest.mark.equation("alpaca-template", "instruction-dataset", "wn-alpaca")
def test_the_passive_voice_record_through_the_template():
    assert alpaca_template(PASSIVE) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n"
        "\n"
        "### Instruction:\n"
        "Rewrite the following sentence using passive voice.\n"
        "\n"
        "### Input:\n"
        "The team achieved great results.\n"
        "\n"
        "### Response:\n"
        "Great results were achieved by the team."
    )


@pytest.mark.equation("alpaca-template")
def test_without_input_its_heading_is_left_out():
    assert (
        alpaca_prompt("Say hello.", preamble="Do this.")
        == "Do this.\n\n### Instruction:\nSay hello.\n\n### Response:\n"
    )
    record = InstructionRecord("Say hello.", "", "Hello.")
    assert alpaca_template(record) == alpaca_prompt("Say hello.") + "Hello."
    assert "### Input:" not in alpaca_template(record)
    with pytest.raises(ValueError, match="the instruction must be some text"):
        alpaca_prompt("  ")


@pytest.mark.equation("instruction-dataset")
def test_records_are_read_from_json(tmp_path):
    path = tmp_path / "records.json"
    path.write_text(json.dumps([PASSIVE._asdict(), {"instruction": "Say hello.", "output": "Hello."}]))
    assert load_instructions(path) == [PASSIVE, InstructionRecord("Say hello.", "", "Hello.")]


@pytest.mark.equation("instruction-dataset")
@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([], "a list of records"),
        ({"instruction": "a"}, "a list of records"),
        ([{"instruction": "a", "output": "b"}, {"instruction": "a"}], "record 1"),
        (["text"], "record 0"),
        ([{"instruction": "a", "output": 3}], "record 0"),
    ],
)
def test_files_of_another_form_are_refused(tmp_path, entries, said):
    path = tmp_path / "records.json"
    path.write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=said):
        load_instructions(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="complete JSON"):
        load_instructions(path)
