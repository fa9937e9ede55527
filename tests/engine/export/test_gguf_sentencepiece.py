"""A SentencePiece tokenizer read back from a GGUF file splits texts into the same pieces."""

from __future__ import annotations

import ast
import itertools
import json
from pathlib import Path

import gguf
import pytest

from engine.errors import InputError
from engine.export.gguf_sentencepiece import SPACE, adds_space, scores
from engine.export.gguf_vocab import add_vocab

TEXTS = [
    "Return the absolute value of the argument.", "  two  spaces\nand lines\n\n", "no", "", " ",
    "Überraschung: naïve café, 東京 🙂", "def f(x):\n    return x ** 2  # squared", "<0x41> is no byte",
    "aaaaaaaaab ababab 1234567",
]  # fmt: skip
METASPACE = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}
PREPEND = {"type": "Sequence", "normalizers": [
    {"type": "Prepend", "prepend": SPACE}, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]}  # fmt: skip


@pytest.fixture(scope="module")
def pieces() -> list[str]:
    """Return about 900 pieces, most useful first, learnt from docstrings as SentencePiece does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tree = ast.parse(Path(ast.__file__).read_text())
    texts = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=900, show_progress=False, special_tokens=[])
    learner.train_from_iterator(texts * 3, trainer)
    return sorted(learner.get_vocab(), key=learner.get_vocab().get)


def rules(pieces: list[str]) -> list[list[str]]:
    """Return the merge rules as Hugging Face converts a tokenizer.model.

    They are all pairs of pieces whose union is a piece, in the order of the unions.
    """
    known = set(pieces)
    return [[p[:i], p[i:]] for p in pieces for i in range(1, len(p)) if p[:i] in known and p[i:] in known]


def write(folder: Path, pieces: list[str], legacy: bool = False, merges=None, bos: bool = True, **model) -> dict:
    """Write a tokenizer folder and return the content of its tokenizer.json."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, "<|user|>"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": tokens.index(token), "content": token, **flags} for token in ("<unk>", "<s>", "</s>", "<|user|>")]
    decoders = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
    parts = (("SpecialToken", "<s>"), ("Sequence", "A"), ("Sequence", "B"))
    start, one, two = ({kind: {"id": name, "type_id": 0}} for kind, name in parts)
    begin = {"type": "TemplateProcessing", "single": [start, one], "pair": [start, one, start, two],
             "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}}  # fmt: skip
    values = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": PREPEND if legacy else None, "pre_tokenizer": None if legacy else METASPACE,
        "post_processor": begin if bos else None, "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
                  "vocab": {token: i for i, token in enumerate(tokens[:-1])},
                  "merges": rules(pieces) if merges is None else merges, **model},
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(values))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return values


def size(values: dict) -> int:
    return len(values["model"]["vocab"]) + 1


def write_gguf(folder: Path, vocab_size: int) -> Path:
    """Write a GGUF file with only the vocabulary."""
    writer = gguf.GGUFWriter(folder / "vocab.gguf", "llama")
    for name, value in (("context_length", 64), ("embedding_length", 8), ("block_count", 1), ("feed_forward_length", 8),
                        ("head_count", 1), ("vocab_size", vocab_size)):  # fmt: skip
        getattr(writer, f"add_{name}")(value)
    writer.add_layer_norm_rms_eps(1e-5)
    add_vocab(writer, folder, vocab_size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "vocab.gguf"


def from_folder(folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def field(file: Path, name: str):
    return gguf.GGUFReader(file).fields[f"tokenizer.ggml.{name}"].contents()


def cut(held: dict, text: str) -> list[str]:
    """Split `text` as a reader of the file does.

    It joins the neighbours whose union has the highest score, the leftmost first, and writes the
    rest as bytes.
    """
    scored = dict(zip(held["tokens"], held["scores"]))
    normal = {token for token, kind in zip(held["tokens"], held["token_type"]) if kind == gguf.TokenType.NORMAL}
    parts = list((SPACE if held["add_space_prefix"] and text else "") + text.replace(" ", SPACE))
    while True:
        joins = [(-scored[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in normal]
        if not joins:
            break
        i = min(joins)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return [piece for part in parts for piece in ([part] if part in normal else [f"<0x{byte:02X}>" for byte in part.encode()])]


def held_by(file: Path) -> dict:
    return {name: field(file, name) for name in ("tokens", "scores", "token_type", "add_space_prefix")}


@pytest.mark.parametrize("legacy", [False, True])
def test_read_back_the_file_cuts_texts_into_the_same_pieces(pieces, tmp_path, legacy):
    values = write(tmp_path, pieces, legacy)
    file = write_gguf(tmp_path, size(values) + 3)
    held = held_by(file)
    assert (field(file, "model"), held["add_space_prefix"], field(file, "bos_token_id")) == ("llama", True, 1)
    assert held["tokens"][-3:] == [f"[PAD{size(values) + i}]" for i in range(3)]
    tokenizer = from_folder(tmp_path)
    texts = [text for text in TEXTS if legacy or not text.startswith(" ")]
    wanted = {text: tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts}
    assert {text: cut(held, text) for text in texts} == wanted
    # pieces, not bytes
    assert sum(map(len, wanted.values())) < 0.7 * sum(len(text.encode()) for text in texts)
    # twin: with equal scores, as gguf's own class for such folders writes them, the split is
    # different
    held["scores"] = [-1000.0] * len(held["scores"])
    assert {text: cut(held, text) for text in texts} != wanted


@pytest.mark.parametrize("bos", [False, True])
def test_whether_a_text_gets_a_beginning_is_what_the_tokenizer_does(pieces, tmp_path, bos):
    values = write(tmp_path, pieces, bos=bos)
    file = write_gguf(tmp_path, size(values))
    assert (field(file, "add_bos_token"), field(file, "add_eos_token")) == (bos, False)
    kinds = dict(zip(field(file, "tokens"), field(file, "token_type")))
    expected = {"<unk>": "UNKNOWN", "</s>": "CONTROL", "<|user|>": "CONTROL", "<0x0A>": "BYTE", "e": "NORMAL"}
    assert {token: gguf.TokenType(kinds[token]).name for token in expected} == expected


def test_llama_cpp_itself_cuts_texts_into_the_same_pieces(pieces, tmp_path):
    """Needs llama-cpp-python (not a dependency; skipped without it)."""
    llama_cpp = pytest.importorskip("llama_cpp")
    values = write(tmp_path, pieces, legacy=True)
    loaded = llama_cpp.Llama(str(write_gguf(tmp_path, size(values))), vocab_only=True, verbose=False)
    tokenizer = from_folder(tmp_path)
    for text in TEXTS:
        assert loaded.tokenize(text.encode(), add_bos=True, special=False) == tokenizer(text)["input_ids"], text


def move_one_of_two_rules(merges: list[list[str]]) -> None:
    """Move the first of two rules with the same union to the end, away from the other."""
    first = next(i for i, (one, two) in enumerate(itertools.pairwise(merges)) if "".join(one) == "".join(two))
    merges.append(merges.pop(first))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values["model"]["merges"].pop(), "is joined by llama.cpp where no rule joins it"),
        (lambda values: move_one_of_two_rules(values["model"]["merges"]), "rules in two places"),
        (lambda values: values["model"]["vocab"].pop("<0x41>"), "<0x41>"),
        (lambda values: values.update(pre_tokenizer={**METASPACE, "split": True}), "no GGUF export for this tokenizer"),
        (lambda values: values.update(normalizer={"type": "NFKC"}), "no GGUF export for this tokenizer"),
    ],
)
def test_a_tokenizer_that_no_scores_can_say_is_refused(pieces, tmp_path, change, message):
    values = write(tmp_path, pieces)
    scores(values), adds_space(values)  # twin
    change(values)
    with pytest.raises(InputError, match=message):
        scores(values), adds_space(values)


def test_a_merged_model_with_such_a_tokenizer_is_exported_whole(pieces, tmp_path):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from engine.export.__main__ import main
    from tests.support.export_models import SIZES, save_adapter

    values = write(tmp_path / "base", pieces, legacy=True)
    sizes = {**SIZES, "vocab_size": size(values), "bos_token_id": 1, "eos_token_id": 2}
    LlamaForCausalLM(LlamaConfig(**sizes)).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    save_adapter(tmp_path / "given", tmp_path / "base", target_modules=["q_proj"])
    arguments = [str(tmp_path / "given"), "--to", "gguf-merged", "--out", str(tmp_path / "out"), "--no-losses"]
    assert main(arguments) == 0
    held = held_by(tmp_path / "out" / "model.gguf")
    tokenizer = from_folder(tmp_path / "base")
    assert len(held["tokens"]) == size(values)
    assert cut(held, TEXTS[0]) == tokenizer.convert_ids_to_tokens(tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"])
