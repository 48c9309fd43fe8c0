"""Folders with the tokenizers of Llama 2 and BERT, end to end: from text to what the model says of it."""

import json

import numpy as np
import pytest

from minillm.cli import main
from minillm.data.sentencepiece_bpe import SentencePieceBPE
from minillm.data.templates import CHATML_TEMPLATES, Message, chatml_ids, chatml_text
from minillm.data.tokenizer_json import write_tokenizer_json
from minillm.data.wordpiece import WordPiece
from minillm.decoding import generate
from minillm.models import Config, Decoder
from minillm.models.folder import save_folder
from minillm.models.heads import pooled
from minillm.models.pretrained import load_pretrained
from tests.oracles.tokenizer_files import BOS, EOS, bert, sentencepiece, written

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CHATML = ("<|im_start|>", "<|im_end|>")
PLAIN = next(template for template, system in CHATML_TEMPLATES.items() if system is None)
PROMPT = "the class  é\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    theirs = sentencepiece("llama-2", specials=CHATML)
    written(theirs, path, bos_token=BOS, eos_token=EOS)
    sizes = {"d_model": 16, "n_layers": 1, "n_heads": 2, "d_ff": 24, "context": 160, "init_std": 0.7}
    save_folder(Decoder(Config(theirs.get_vocab_size(), **sizes), np.random.default_rng(5)), path)
    (path / "chat_template.jinja").write_text(PLAIN, encoding="utf-8")
    return path


@pytest.mark.equation("tokenizer-bpe", "greedy")
def test_a_llama_2_folder_continues_a_prompt_as_transformers_does(folder, capsys):
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    read = theirs(PROMPT, return_tensors="pt")
    ends = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": theirs.eos_token_id, "pad_token_id": 0}
    with torch.no_grad():
        everything = model.generate(read["input_ids"], attention_mask=read["attention_mask"], **ends)[0]
    expected = everything[read["input_ids"].shape[1] :].tolist()
    command = ["generate", "--checkpoint", str(folder), "--prompt", PROMPT, "--temperature", "0"]
    capsys.readouterr()
    assert main([*command, "--max-new-tokens", "12", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)[0]
    assert found["tokens"] == expected
    assert main([*command, "--max-new-tokens", "12"]) == 0
    streamed = capsys.readouterr().out
    assert streamed == found["prompt"] + found["text"] + "\n"
    ours = load_pretrained(folder).tokenizer
    assert isinstance(ours, SentencePieceBPE) and ours.adds_bos
    assert ours.decode([*ours.encode(PROMPT), *expected]) == PROMPT + found["text"]


@pytest.mark.equation("greedy", "special-tokens")
def test_a_llama_2_folder_answers_in_a_conversation(folder, capsys):
    capsys.readouterr()
    options = ["--message", "def the", "--message", " x", "--temperature", "0", "--max-new-tokens", "10"]
    assert main(["chat", "--model", str(folder), *options, "--json"]) == 0
    turns = json.loads(capsys.readouterr().out)
    assert main(["chat", "--model", str(folder), *options]) == 0
    assert capsys.readouterr().out == "".join(turn["content"] + "\n" for turn in turns[1::2])
    found = load_pretrained(folder)
    asked = [Message("user", "def the")]
    ids = chatml_ids(found.tokenizer, asked)
    library = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    assert ids.tolist() == library(chatml_text(asked), add_special_tokens=False)["input_ids"]
    end = found.tokenizer.special_id(CHATML[1])
    made = generate(found.model, ids[None], 10, np.random.default_rng(0), temperature=0, eos_id=end)
    answer = found.tokenizer.decode_next(made.tokens[0][made.mask[0]]).decode("utf-8", "replace")
    assert turns[1]["content"] == answer


@pytest.mark.equation("bert-config", "cls-pooling", "special-tokens")
def test_a_bert_folder_turns_two_texts_into_a_vector(tmp_path):
    (tmp_path / "again").mkdir()
    names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    library = bert()
    written(library, tmp_path, **names)
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=library.get_vocab_size(), max_position_embeddings=64, **sizes)
    theirs = transformers.BertModel(config).eval()
    theirs.save_pretrained(tmp_path)
    texts = ("The class's Method, é!", "don't import  IT")
    fast = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    with torch.no_grad():
        read = fast(*texts, return_tensors="pt", return_token_type_ids=True)
        expected = theirs(**read).last_hidden_state[:, 0].numpy()
    found = load_pretrained(tmp_path)
    assert isinstance(found.tokenizer, WordPiece)
    ids, segments = found.tokenizer.frame_texts(*texts)
    assert ids.tolist() == read["input_ids"][0].tolist() and segments.tolist() == read["token_type_ids"][0].tolist()
    write_tokenizer_json(found.tokenizer, tmp_path / "again")
    again = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "again")(*texts, return_tensors="pt")
    assert {name: values.tolist() for name, values in again.items()} == {k: v.tolist() for k, v in read.items()}
    vector = pooled(found.model.hidden(ids[None], segments=segments[None]), "cls")
    np.testing.assert_allclose(vector.data, expected, atol=2e-5)


def test_a_folder_goes_out_and_comes_in_again(folder, tmp_path):
    found = load_pretrained(folder)
    save_folder(found.model, tmp_path)
    write_tokenizer_json(found.tokenizer, tmp_path)
    again = load_pretrained(tmp_path)
    assert again.tokenizer == found.tokenizer
    ids = again.tokenizer.encode(PROMPT, bos=True)[None]
    np.testing.assert_array_equal(again.model(ids).data, found.model(ids).data)
