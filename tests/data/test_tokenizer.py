"""Tokenizers round-trip every text exactly, never produce a control symbol from text, and are the same in every process."""

import json
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt4o_jax.data import tokenizer as tokenizers
from gpt4o_jax.data.tokenizer import BOS, EOS, PAD, RESERVED, SPECIALS, byte_lengths
from gpt4o_jax.errors import ExitCode, RunError

DOCUMENTS = [
    "The cat sat on the mat.\n\tThe dog sat on the log; 12345 times.\r\n" * 5,
    "def f(x):\n    return x  # <|user|> is no symbol here, <bos> neither, ▁ and \0 are characters\n" * 5,
    "Füße, naïve café, 日本語, \U0001f600\n" * 5,
]
BPE = tokenizers.train("bpe", 420, DOCUMENTS)
BYTE = tokenizers.byte_tokenizer()
CHAR = tokenizers.train("char", 0, DOCUMENTS)
KINDS = {"bpe": BPE, "byte": BYTE, "char": CHAR}
OPEN = {"bpe": BPE, "byte": BYTE}  # kinds that take any text

LOOK_ALIKES = [
    *SPECIALS,
    "<|spare_0|>",
    "<0x41>",
    "<s>",
    "</s>",
    "\u2581",
    "\0",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "\ufeff",
    "the",
    "1",
]
texts = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.lists(st.one_of(st.sampled_from(LOOK_ALIKES), st.characters(exclude_categories=["Cs"])), max_size=12).map("".join),
    st.text(st.sampled_from(" \n\t\u2581\0\u00a0\u3000a")),
)


def refusal(call, *args) -> str:
    with pytest.raises(RunError) as e:
        call(*args)
    assert e.value.code == ExitCode.DATA
    return str(e.value)


# ---------------------------------------------------------------- text -> ids -> text


@pytest.mark.parametrize("kind", OPEN)
@settings(deadline=None)
@given(text=texts)
def test_every_text_comes_back_and_no_control_symbol_comes_out(kind, text):
    tokenizer = OPEN[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(RESERVED <= i < tokenizer.vocab_size for i in ids)
    assert int(byte_lengths(tokenizer)[ids].sum()) == len(text.encode())


@settings(deadline=None)
@given(st.lists(st.sampled_from(sorted(set("".join(DOCUMENTS))))).map("".join))
def test_char_gives_back_what_its_characters_can_write(text):
    ids = CHAR.encode(text)
    assert CHAR.decode(ids) == text and len(ids) == len(text)
    assert all(RESERVED <= i < CHAR.vocab_size for i in ids)
    assert int(byte_lengths(CHAR)[ids].sum()) == len(text.encode())


@settings(deadline=None)
@given(st.lists(st.integers(0, BPE.vocab_size - 1)))
def test_any_ids_decode_to_some_text(ids):
    for tokenizer in OPEN.values():
        kept = [i for i in ids if i < tokenizer.vocab_size]
        assert tokenizer.decode(kept) == tokenizer.decode_bytes(kept).decode("utf-8", "replace")


def test_bpe_is_shorter_than_bytes_on_its_own_text():
    text = DOCUMENTS[0]
    assert len(BPE.encode(text)) < 0.5 * len(BYTE.encode(text))


# ---------------------------------------------------------------- reserved ids


@pytest.mark.parametrize("kind", KINDS)
def test_reserved_ids_mean_the_same_in_every_kind_and_write_nothing(kind):
    tokenizer = KINDS[kind]
    assert [tokenizer.special(name) for name in SPECIALS] == list(range(len(SPECIALS)))
    assert [tokenizer.special(s) for s in ("<pad>", "<bos>", "<eos>")] == [PAD, BOS, EOS] == [0, 1, 2]
    assert tokenizer.decode(range(RESERVED)) == ""
    assert not byte_lengths(tokenizer)[:RESERVED].any()


def test_the_published_reserved_ids_never_move():
    names = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end_of_turn|>", "<|image_begin|>", "<|audio_end|>")
    assert [BPE.special(name) for name in names] == [4, 5, 6, 7, 8, 9, 12]


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("text", "where"), [("\ud800", 0), ("ok\udfff", 2)])
def test_lone_surrogates_are_refused_with_their_place(kind, text, where):
    message = refusal(KINDS[kind].encode, text)
    assert f"lone surrogate U+{ord(text[where]):04X} at character {where}" in message


def test_char_refuses_other_characters_by_name_and_place():
    message = refusal(CHAR.encode, "the Ω")
    assert "'Ω' (U+03A9, GREEK CAPITAL LETTER OMEGA) at 4" in message and "bpe or byte" in message


def test_training_needs_text_and_room_for_its_characters():
    assert "could not train a vocabulary of 400" in refusal(tokenizers.train, "bpe", 400, ["\n\n"])
    wide = ["".join(map(chr, range(0x4E00, 0x4F00)))] * 3
    told = refusal(tokenizers.train, "bpe", 300, wide)
    least = int(told.split("are ")[1].split()[0])
    assert "a vocabulary of 300 is too small" in told and tokenizers.train("bpe", least, wide).vocab_size == least


def test_lines_of_any_length_are_learned_from():
    """One line of 1.2 MB; SentencePiece skips lines longer than its limit."""
    line = "many words without an end of line "
    assert len(tokenizers.train("bpe", 330, ["short\n", line * 35_000]).encode(line)) < len(line) / 3


def test_a_vocabulary_larger_than_the_text_allows_is_smaller_instead():
    assert RESERVED + 256 < tokenizers.train("bpe", 2000, ["a little text\n"] * 3).vocab_size < 400


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("kind", KINDS)
def test_saved_tokenizers_are_the_same_when_loaded(kind, tmp_path):
    tokenizer = KINDS[kind]
    tokenizer.save(tmp_path / "t")
    loaded = tokenizers.load(tmp_path / "t")
    assert (loaded.kind, loaded.pieces, loaded.digest) == (kind, tokenizer.pieces, tokenizer.digest)
    assert loaded.encode(DOCUMENTS[0]) == tokenizer.encode(DOCUMENTS[0])


def test_digests_tell_kinds_and_vocabularies_apart():
    others = [tokenizers.train("bpe", 400, DOCUMENTS), tokenizers.char_tokenizer("ab"), tokenizers.char_tokenizer("ba")]
    digests = {t.digest for t in [*KINDS.values(), *others]}
    assert len(digests) == 6


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (None, "cannot read the tokenizer (No such file"),
        (b"", "not a SentencePiece model"),
        (b"hello", "not a SentencePiece model"),
        (b"\xff" * 300, "not a SentencePiece model"),
        (BPE.serialized[:1000], "not a SentencePiece model"),
        (b"{", "damaged"),
        (b"{}", "damaged"),
        (b'{"kind": "char"}', "damaged"),
        (b'{"kind": "word", "characters": "ab"}', "damaged"),
        (b'{"kind": ["char"], "characters": "ab"}', "damaged"),
        (b'{"kind": "char", "characters": [1, 2]}', "damaged"),
        (b'{"kind": "char", "characters": "\\ud800"}', "damaged"),
        (b'{"kind": "char", "characters": "ab', "damaged"),
        (b'{"kind": "byte\xff"}', "damaged"),
    ],
)
def test_damaged_and_foreign_files_are_refused_by_path(tmp_path, content, fragment):
    path = tmp_path / "tokenizer.model"
    if content is not None:
        path.write_bytes(content)
    message = refusal(tokenizers.load, path)
    assert str(path) in message and fragment in message


def test_a_folder_is_no_tokenizer(tmp_path):
    assert "expected tokenizer.model or tokenizer.json" in refusal(tokenizers.load, tmp_path)


# ---------------------------------------------------------------- the same everywhere


def test_training_gives_the_same_pieces_in_a_fresh_process_with_another_hash_seed(tmp_path):
    (tmp_path / "documents.json").write_text(json.dumps(DOCUMENTS))
    code = (
        "import json, pathlib\n"
        "from gpt4o_jax.data import tokenizer as t\n"
        f"documents = json.loads(pathlib.Path({str(tmp_path / 'documents.json')!r}).read_text())\n"
        "print(json.dumps([t.train(k, 420, documents).digest for k in ('bpe', 'byte', 'char')]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": "4321"}, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == [BPE.digest, BYTE.digest, CHAR.digest]
