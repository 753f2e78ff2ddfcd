"""Text <-> token ids: SentencePiece BPE, raw bytes, or characters.

All kinds share the first RESERVED ids, so that a model keeps its meaning of "user" or
"image begin" whatever its vocabulary. None of them can come out of a text: only code
places them. For every string s without lone surrogates, decode(encode(s)) == s.
"""

import hashlib
import io
import json
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from gpt4o_jax.errors import RunError, data_error

SPECIALS = (
    "<pad>", "<bos>", "<eos>", "<unk>",
    "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end_of_turn|>",
    "<|image_begin|>", "<|image_end|>", "<|audio_begin|>", "<|audio_end|>",
)  # fmt: skip
RESERVED = 32  # ids below this are control symbols; those after SPECIALS are spares for later modalities
_NAMES = SPECIALS + tuple(f"<|spare_{i}|>" for i in range(RESERVED - len(SPECIALS)))
PAD, BOS, EOS = 0, 1, 2
_META = "\u2581"  # SentencePiece writes a space as this character


class Tokenizer:
    """Encodes text; `pieces[i]` holds the bytes that id i stands for (b'' for control symbols)."""

    def __init__(self, kind: str, pieces: Sequence[bytes], serialized: bytes, encode_piecewise):
        self.kind = kind
        self.pieces = list(pieces)
        self.serialized = serialized
        self._encode = encode_piecewise

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    @property
    def digest(self) -> str:
        """Names the mapping itself: equal for equal pieces in equal order."""
        return hashlib.sha256(b"\0".join([self.kind.encode(), *self.pieces])).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without bos or eos. Raises RunError for lone surrogates, and for unknown characters (char)."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as e:
            raise data_error(
                f"text is not valid Unicode: lone surrogate U+{ord(text[e.start]):04X} at character {e.start};"
                " read the file as UTF-8, or encode with errors='replace'"
            ) from None
        return self._encode(text)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that `ids` stand for: for streaming, where a character may be incomplete."""
        return b"".join(self.pieces[i] for i in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text that `ids` stand for; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def special(self, name: str) -> int:
        """The id of a reserved symbol, such as '<|user|>'."""
        return _NAMES.index(name)

    def save(self, path: Path) -> None:
        path.write_bytes(self.serialized)


# ---------------------------------------------------------------- kinds


def byte_tokenizer() -> Tokenizer:
    """One id a byte: RESERVED + its value."""
    pieces = [b""] * RESERVED + [bytes([b]) for b in range(256)]
    return Tokenizer("byte", pieces, json.dumps({"kind": "byte"}).encode(), lambda text: [RESERVED + b for b in text.encode()])


def char_tokenizer(characters: str) -> Tokenizer:
    """One id a character of `characters`; others are refused."""
    index = {ch: RESERVED + i for i, ch in enumerate(characters)}

    def encode(text: str) -> list[int]:
        try:
            return [index[ch] for ch in text]
        except KeyError as e:
            ch = e.args[0]
            raise data_error(
                f"character {ch!r} (U+{ord(ch):04X}, {unicodedata.name(ch, 'unnamed')}) at {text.index(ch)} is not among the"
                f" {len(index)} characters of this char tokenizer; use tokenizer.kind=bpe or byte for open text"
            ) from None

    serialized = json.dumps({"kind": "char", "characters": characters}).encode()
    return Tokenizer("char", [b""] * RESERVED + [ch.encode() for ch in characters], serialized, encode)


def bpe_tokenizer(serialized: bytes) -> Tokenizer:
    """A SentencePiece model (protobuf bytes) trained by `train`."""
    import sentencepiece as spm

    processor = spm.SentencePieceProcessor(model_proto=serialized)
    size = processor.get_piece_size()
    pieces = [_piece_bytes(processor, i) for i in range(size)]
    byte_ids = {int(processor.id_to_piece(i)[3:5], 16): i for i in range(size) if processor.is_byte(i)}
    if len(byte_ids) != 256 or [processor.id_to_piece(i) for i in range(RESERVED)] != list(_NAMES):
        raise data_error(
            "this SentencePiece model was not made by gpt4o_jax: it lacks byte fallback or the reserved ids 0 to"
            f" {RESERVED - 1}; train one with `python -m gpt4o_jax tokenizer train`"
        )
    meta_ids = [byte_ids[b] for b in _META.encode()]

    def encode(text: str) -> list[int]:
        # A literal U+2581 would come back as a space, and NUL ends SentencePiece's input: both go by their bytes.
        ids: list[int] = []
        for i, between_nul in enumerate(text.split("\0")):
            if i:
                ids.append(byte_ids[0])
            for j, part in enumerate(between_nul.split(_META)):
                ids += meta_ids if j else []
                ids += processor.encode(part) if part else []
        return ids

    return Tokenizer("bpe", pieces, serialized, encode)


def _piece_bytes(processor, i: int) -> bytes:
    if processor.is_control(i) or processor.is_unknown(i):
        return b""
    if processor.is_byte(i):
        return bytes([int(processor.id_to_piece(i)[3:5], 16)])
    return processor.id_to_piece(i).replace(_META, " ").encode()


# ---------------------------------------------------------------- training, loading


def train(kind: str, vocab_size: int, documents: Iterable[str]) -> Tokenizer:
    """A tokenizer for `documents`. Same documents, same pieces.

    vocab_size counts everything (bpe only); a corpus too small for it gives fewer pieces.
    """
    if kind == "byte":
        return byte_tokenizer()
    if kind == "char":
        return char_tokenizer("".join(sorted(set().union(*documents))))
    import sentencepiece as spm

    model = io.BytesIO()
    lines = (line for text in documents for line in text.replace("\0", "").splitlines() if line)
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            character_coverage=0.9999,
            control_symbols=list(_NAMES[4:]),
            user_defined_symbols=["\n"],
            pad_id=PAD, pad_piece="<pad>",
            bos_id=BOS, bos_piece="<bos>",
            eos_id=EOS, eos_piece="<eos>",
            unk_id=3, unk_piece="<unk>",
            num_threads=1,
            max_sentence_length=1 << 20,
            minloglevel=2,
        )  # fmt: skip
    except RuntimeError as e:
        raise data_error(f"SentencePiece could not train a vocabulary of {vocab_size}: {str(e).splitlines()[-1]}") from None
    return bpe_tokenizer(model.getvalue())


def load(path) -> Tokenizer:
    """Reads what `save` wrote. Raises RunError where the file is missing or is no tokenizer."""
    try:
        serialized = path.read_bytes()
    except OSError as e:
        raise data_error(f"{path}: cannot read the tokenizer ({e.strerror or e})") from None
    if serialized[:1] == b"{":
        try:
            stored = json.loads(serialized)
            kinds = {"byte": byte_tokenizer, "char": lambda: char_tokenizer(stored["characters"])}
            return kinds[stored["kind"]]()
        except (ValueError, KeyError, TypeError, AttributeError):
            raise data_error(f"{path}: damaged tokenizer file (not the JSON that gpt4o_jax writes)") from None
    try:
        if serialized:
            return bpe_tokenizer(serialized)
    except RunError as e:
        raise data_error(f"{path}: {e}") from None
    except RuntimeError:
        pass
    raise data_error(f"{path}: not a SentencePiece model, nor a byte or char tokenizer of gpt4o_jax")


def byte_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """[V] how many bytes each id stands for."""
    return np.array([len(p) for p in tokenizer.pieces], np.int32)
