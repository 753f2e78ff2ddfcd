"""Text <-> token ids: SentencePiece BPE, raw bytes, or characters; published tokenizers in tokenizer_published.py.

Our own kinds share the first RESERVED ids, so that "user" or "image begin" has the same id in every vocabulary; a published
tokenizer lists its own in `symbols`. Encoding a text never yields a control symbol: only code places them. With our own kinds
decode(encode(s)) == s for every string s without lone surrogates (char: of known characters).
"""

import dataclasses
import hashlib
import io
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from etils import epath

from gpt4o_jax.errors import RunError, data_error, did_you_mean, lone_surrogate

SPECIALS = (
    "<pad>", "<bos>", "<eos>", "<unk>",
    "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end_of_turn|>",
    "<|image_begin|>", "<|image_end|>", "<|audio_begin|>", "<|audio_end|>",
)  # fmt: skip
RESERVED = 32  # ids below this are control symbols; those after SPECIALS are spares for later modalities
_NAMES = SPECIALS + tuple(f"<|spare_{i}|>" for i in range(RESERVED - len(SPECIALS)))
PAD, BOS, EOS = 0, 1, 2
_META = "\u2581"  # SentencePiece writes a space as this character


@dataclasses.dataclass(frozen=True)
class Symbols:
    """The ids of a tokenizer that are not text.

    bos begins a document; if a published tokenizer has none, it is the separator between documents. eos: ids that end a text; the
    first ends a document. control: ids that are not text and, except those of eos, are never sampled. prompts_begin: whether a
    prompt begins with bos, as in training.
    """

    bos: int = BOS
    eos: tuple[int, ...] = (EOS,)
    pad: int = PAD
    control: frozenset[int] = frozenset(range(RESERVED))
    prompts_begin: bool = True


class Tokenizer:
    """Encodes and decodes text; `pieces[i]` holds the bytes that id i stands for (b'' for control symbols).

    prefix: what `encode` adds in front of every text (b" " with SentencePiece models such as Llama 2's).
    template: name of the chat template that its model was trained with (tasks/chat.py), or "".
    """

    symbols = Symbols()
    prefix = b""
    template = ""
    identity: tuple[bytes, ...] = ()  # distinguishes mappings with the same pieces
    names: Mapping[str, int] = {name: i for i, name in enumerate(_NAMES)}  # control symbols

    def __init__(self, kind: str, pieces: Sequence[bytes], serialized: bytes, encode_piecewise, encode_behind=None):
        self.kind = kind
        self.pieces = list(pieces)
        self.serialized = serialized
        self.files = {"tokenizer.model": serialized}  # what a run folder stores
        self._encode = encode_piecewise
        self._encode_behind = encode_behind or encode_piecewise

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    @property
    def digest(self) -> str:
        """Identifies the mapping, 16 hex digits: equal for equal pieces in equal order."""
        return hashlib.sha256(b"\0".join([self.kind.encode(), *self.pieces, *self.identity])).hexdigest()[:16]

    def encode(self, text: str, behind_symbol: bool = False) -> list[int]:
        """Ids of `text`, without bos or eos. Raises RunError for lone surrogates, and for unknown characters (char).

        behind_symbol: the text follows a control symbol, after which some tokenizers add no `prefix`.
        """
        if lone := lone_surrogate(text):
            raise data_error(f"text is not valid Unicode: {lone}; read the file as UTF-8, or encode with errors='replace'")
        return self._encode_behind(text) if behind_symbol else self._encode(text)

    def document(self, text: str) -> list[int]:
        """Ids of a whole document: bos, the text, the first eos."""
        return [self.symbols.bos, *self.encode(text), self.symbols.eos[0]]

    def prompt(self, text: str) -> list[int]:
        """Ids of a text to be continued, after bos unless the model's prompts had none. Never empty."""
        ids = self.encode(text)
        return [self.symbols.bos, *ids] if self.symbols.prompts_begin or not ids else ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that `ids` stand for; for streaming, where a character may be incomplete."""
        return b"".join(self.pieces[i] for i in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text that `ids` stand for, including `prefix`; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def special(self, name: str) -> int:
        """The id of a control symbol, such as '<|user|>'. Raises RunError if this tokenizer has none of that name."""
        if name not in self.names:
            raise data_error(f"this tokenizer has no symbol {name}{did_you_mean(name, self.names)}")
        return self.names[name]

    def save(self, path: Path) -> None:
        """Writes a tokenizer of one of our own kinds to a file."""
        path.write_bytes(self.serialized)

    def save_in(self, folder: Path) -> None:
        """Writes the files that `load(folder)` reads."""
        for name, content in self.files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)


# ---------------------------------------------------------------- kinds


def byte_tokenizer() -> Tokenizer:
    """One id per byte: RESERVED + its value."""
    pieces = [b""] * RESERVED + [bytes([b]) for b in range(256)]
    return Tokenizer("byte", pieces, json.dumps({"kind": "byte"}).encode(), lambda text: [RESERVED + b for b in text.encode()])


def char_tokenizer(characters: str) -> Tokenizer:
    """One id per character of `characters`; encoding others raises RunError."""
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


def is_own(processor) -> bool:
    """Whether this SentencePiece model comes from `train`, recognised by its reserved ids."""
    reserved = range(min(RESERVED, processor.get_piece_size()))
    return [processor.id_to_piece(i) for i in reserved] == list(_NAMES)


def bpe_tokenizer(serialized: bytes) -> Tokenizer:
    """A SentencePiece model (protobuf bytes) trained by `train`."""
    import sentencepiece as spm

    processor = spm.SentencePieceProcessor(model_proto=serialized)
    size = processor.get_piece_size()
    pieces = [piece_bytes(processor, i) for i in range(size)]
    byte_ids = {int(processor.id_to_piece(i)[3:5], 16): i for i in range(size) if processor.is_byte(i)}
    meta_ids = [byte_ids[b] for b in _META.encode()]

    def encode(text: str) -> list[int]:
        # A literal U+2581 would decode to a space, and NUL ends SentencePiece's input: both are encoded as bytes.
        ids: list[int] = []
        for i, between_nul in enumerate(text.split("\0")):
            if i:
                ids.append(byte_ids[0])
            for j, part in enumerate(between_nul.split(_META)):
                ids += meta_ids if j else []
                ids += processor.encode(part) if part else []
        return ids

    return Tokenizer("bpe", pieces, serialized, encode)


def piece_bytes(processor, i: int) -> bytes:
    """The bytes that id i of a SentencePiece model stands for; b'' for control symbols and <unk>."""
    if processor.is_control(i) or processor.is_unknown(i):
        return b""
    if processor.is_byte(i):
        return bytes([int(processor.id_to_piece(i)[3:5], 16)])
    return processor.id_to_piece(i).replace(_META, " ").encode()


# ---------------------------------------------------------------- training, loading


_LINE = 1 << 18  # characters, of up to 4 bytes: longer lines are cut, since SentencePiece silently skips them


def train(kind: str, vocab_size: int, documents: Iterable[str]) -> Tokenizer:
    """Trains a tokenizer on `documents`. Same documents, same pieces.

    vocab_size: total number of ids (bpe only); a small corpus gives fewer. Raises RunError if it is too small for the text.
    """
    if kind == "byte":
        return byte_tokenizer()
    if kind == "char":
        characters: set[str] = set()
        for text in documents:
            characters.update(text)
        return char_tokenizer("".join(sorted(characters)))
    import sentencepiece as spm

    model = io.BytesIO()
    lines = (line for text in documents for line in text.replace("\0", "").splitlines())
    parts = (line[i : i + _LINE] for line in lines for i in range(0, len(line), _LINE))
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=parts,
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
            max_sentence_length=4 * _LINE,
            minloglevel=2,
        )  # fmt: skip
    except RuntimeError as e:
        if needed := re.search(r"required_chars\. \d+ vs (\d+)", str(e)):
            raise data_error(
                f"a vocabulary of {vocab_size} is too small: bytes, special tokens and characters of this text are"
                f" {needed[1]} already; expected that many or more, or kind byte"
            ) from None
        raise data_error(f"SentencePiece could not train a vocabulary of {vocab_size}: {str(e).splitlines()[-1]}") from None
    return bpe_tokenizer(model.getvalue())


def load(path) -> Tokenizer:
    """Reads a tokenizer from its file, or from the folder of a run or a published model; detects its kind.

    Raises RunError if there is none, or it is damaged.
    """
    path = epath.Path(os.path.expanduser(path))
    if path.is_dir():
        names = [n for n in ("tokenizer.json", "tokenizer.model") if (path / n).exists()]
        if not names:
            raise data_error(f"{path}: no tokenizer there; expected tokenizer.model or tokenizer.json")
        path = path / names[0]
    try:
        serialized = path.read_bytes()
    except OSError as e:
        raise data_error(f"{path}: cannot read the tokenizer ({e.strerror or e})") from None
    try:
        return (_from_json if serialized[:1] == b"{" else _from_protobuf)(serialized, path.parent)
    except RunError as e:
        raise data_error(f"{path}: {e}") from None


def _from_json(serialized: bytes, folder) -> Tokenizer:
    from gpt4o_jax.data import tokenizer_published as published

    try:
        stored = json.loads(serialized)
    except ValueError:
        raise data_error("damaged tokenizer file (not JSON)") from None
    if "model" in stored:
        return published.from_json(serialized, folder)
    try:
        kinds = {"byte": byte_tokenizer, "char": lambda: char_tokenizer(stored["characters"])}
        own = kinds[stored["kind"]]()
    except (ValueError, KeyError, TypeError, AttributeError):
        raise data_error("damaged tokenizer file (neither the JSON that gpt4o_jax writes nor a tokenizer.json)") from None
    return published.given_template(own, folder)


def _from_protobuf(serialized: bytes, folder) -> Tokenizer:
    import sentencepiece as spm

    from gpt4o_jax.data import tokenizer_published as published

    try:
        processor = spm.SentencePieceProcessor(model_proto=serialized)
    except RuntimeError:
        processor = None
    if not (serialized and processor):
        raise data_error("not a SentencePiece model, nor a byte or char tokenizer of gpt4o_jax")
    if is_own(processor):
        return published.given_template(bpe_tokenizer(serialized), folder)
    return published.from_sentencepiece(serialized, folder)


def byte_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """int32 [V], the number of bytes that each id stands for."""
    return np.array([len(p) for p in tokenizer.pieces], np.int32)
