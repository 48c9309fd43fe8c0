"""What models read: tokenizers, corpora, sources of known entropy, batches, packing, tasks with a verifier."""

from minillm.data.batches import IGNORE, Batch, BatchStream, next_token_chunks, prefix_samples, shift
from minillm.data.bpe import BPETokenizer, bytes_per_token
from minillm.data.compression import compressed_bits_per_byte
from minillm.data.corpora import load_documents, load_text, python_docs, python_docs_text, split_held_out
from minillm.data.files import read_json, write_atomically, write_json
from minillm.data.packing import (
    PackedBatch,
    concat_documents,
    first_fit_decreasing,
    pack_concat,
    pack_documents,
)
from minillm.data.padding import (
    LabelledBatch,
    PaddedBatch,
    bucket_by_length,
    pad_batch,
    padding_waste,
    sft_batch,
    sft_labels,
)
from minillm.data.sources import HiddenMarkovSource, bracket_source, even_source, markov_source, noisy_source
from minillm.data.tasks import AdditionTask, Demonstrations, addition_columns
from minillm.data.templates import InstructionRecord, alpaca_prompt, alpaca_template, load_instructions
from minillm.data.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer, tokenizer_from_dict

__all__ = [
    "IGNORE",
    "AdditionTask",
    "BPETokenizer",
    "Batch",
    "BatchStream",
    "ByteTokenizer",
    "CharTokenizer",
    "Demonstrations",
    "HiddenMarkovSource",
    "InstructionRecord",
    "LabelledBatch",
    "PackedBatch",
    "PaddedBatch",
    "Tokenizer",
    "addition_columns",
    "alpaca_prompt",
    "alpaca_template",
    "bracket_source",
    "bucket_by_length",
    "bytes_per_token",
    "compressed_bits_per_byte",
    "concat_documents",
    "even_source",
    "first_fit_decreasing",
    "load_documents",
    "load_instructions",
    "load_text",
    "markov_source",
    "next_token_chunks",
    "noisy_source",
    "pack_concat",
    "pack_documents",
    "pad_batch",
    "padding_waste",
    "prefix_samples",
    "python_docs",
    "python_docs_text",
    "read_json",
    "sft_batch",
    "sft_labels",
    "shift",
    "split_held_out",
    "tokenizer_from_dict",
    "write_atomically",
    "write_json",
]
