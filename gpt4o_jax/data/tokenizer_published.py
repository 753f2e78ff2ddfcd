"""Tokenizers of published models: tokenizer.json (Hugging Face `tokenizers`) and third-party SentencePiece models.

A run folder keeps the published file and, next to it, one of ours, tokenizer.extra.json:

    bos, pad          ids
    eos               ids that end a text; the first ends a document
    prompts_begin     whether a prompt begins with bos
    control           name -> id of every control symbol
    template          chat template of the model (tasks/chat.py), or ""
    vocab_size        ids in use

The folder of a published model has no such file: there the same is read from tokenizer_config.json, generation_config.json,
config.json and chat_template.jinja, so that `load(folder).save_in(run)` imports a tokenizer.
Its chat template is kept as chat_template.jinja, supported here or not (further ones, by name, in additional_chat_templates/); a
tokenizer of one of our own kinds has that file if it came with an exported model.
Texts are encoded as the library does with special tokens treated as text: "<|im_end|>" in a text is encoded as its letters.
"""

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path

from gpt4o_jax.data.tokenizer import Symbols, Tokenizer, piece_bytes
from gpt4o_jax.errors import RunError, data_error, lone_surrogate
from gpt4o_jax.tasks import chat

EXTRA = "tokenizer.extra.json"
TEMPLATE_FILE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"  # folder of further ones, NAME.jinja, as in transformers
_META = "\u2581"  # SentencePiece writes a space as this character
_DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|end▁of▁sentence|>")


def template_mark(name: str) -> str:
    """The Jinja comment that begins every template we write."""
    return f"{{#- gpt4o_jax: {name} #}}"


# Name in tasks/chat.py, and strings that occur together only in this template; the first entry with all of them found wins.
_TEMPLATE_MARKS = (
    *((name, template_mark(name)) for name in chat.TEMPLATES),
    ("qwen2.5", "You are Qwen, created by Alibaba Cloud"),
    ("qwen3", "loop.index0 > ns.last_query_index"),
    ("qwen2.5-base", "You are a helpful assistant.<|im_end|>", "<tool_response>"),
    ("qwen2", "You are a helpful assistant.<|im_end|>"),
    ("qwen1.5", "You are a helpful assistant<|im_end|>"),
    ("chatml", "<|im_start|>"),
    ("llama3.1", "Cutting Knowledge Date"),
    ("llama3", "<|start_header_id|>"),
    ("gemma", "<start_of_turn>"),
    ("llama2", "<<SYS>>"),
    ("mistral", "'[INST] ' + message['content'] + ' [/INST]' }}{% elif"),
    ("mistral0.2", "{{- ' [INST] ' + message['content'] + ' [/INST]' }}", "{{- ' ' + message['content'] + eos_token}}"),
    ("mistral0.3", '"[INST] " + message["content"] + "[/INST]"'),
    ("olmo2", "{{ bos_token }}{% for", "'<|assistant|>", "message['content'] + eos_token + '"),
)


def from_json(serialized: bytes, folder: Path) -> Tokenizer:
    """Reads a tokenizer.json. Raises RunError if it or a file beside it is damaged, or its decoder is not supported."""
    try:
        import tokenizers
    except ImportError:
        raise RunError("a tokenizer.json needs the package tokenizers: pip install -r requirements-interop.txt") from None
    stored = json.loads(serialized)
    open_ = lambda stored: tokenizers.Tokenizer.from_str(json.dumps(stored))
    try:
        library = open_(stored)
    except Exception as e:  # the library raises no narrower type
        raise data_error(f"damaged tokenizer.json ({str(e).splitlines()[0]})") from None
    added = library.get_added_tokens_decoder()
    vocab = library.get_vocab()
    control = {t.content: i for i, t in added.items() if t.special}
    begun = library.encode("a").ids  # including what the model expects in front of a text
    extra = _extra(folder, vocab, control, {}, lambda bos: begun[:1] == [bos])
    files = {"tokenizer.json": serialized, **_templates(folder)}
    plain = lambda stored: _plain(open_(stored))
    # After a symbol, no piece is the first of a text.
    behind = stored | {part: _never_first(stored[part]) for part in ("pre_tokenizer", "normalizer") if part in stored}
    unknown = stored["model"].get("unk_id", vocab.get(stored["model"].get("unk_token")))
    pieces_of = _piece_reader(stored)
    pieces = [b""] * extra["vocab_size"]
    for text, i in vocab.items():
        if i < len(pieces):
            pieces[i] = text.encode() if i in added else pieces_of(text)
    return _published("json", pieces, files, extra, vocab, unknown, plain(stored), plain(behind))


def _never_first(part):
    """A part of a tokenizer.json, without the prefix that it adds to the first piece of a text only."""
    if isinstance(part, dict):
        return {k: "never" if (k, x) == ("prepend_scheme", "first") else _never_first(x) for k, x in part.items()}
    return [_never_first(x) for x in part] if isinstance(part, list) else part


def _plain(library):
    """text -> ids, with nothing added and special tokens treated as text."""
    library.no_truncation()
    library.no_padding()
    library.encode_special_tokens = True
    return lambda text: library.encode(text, add_special_tokens=False).ids


def from_sentencepiece(serialized: bytes, folder: Path) -> Tokenizer:
    """Reads a third-party SentencePiece model, such as Llama 2's, Mistral's or Gemma's.

    Raises RunError if a file beside it is damaged, or none names a bos or eos symbol.
    """
    import sentencepiece as spm

    processor = spm.SentencePieceProcessor(model_proto=serialized)
    vocab = {processor.id_to_piece(i): i for i in range(processor.get_piece_size())}
    control = {t: i for t, i in vocab.items() if processor.is_control(i) or processor.is_unknown(i)}
    own = {"bos": processor.bos_id(), "eos": processor.eos_id(), "pad": processor.pad_id()}
    extra = _extra(folder, vocab, control, {k: i for k, i in own.items() if i >= 0}, lambda bos: own["bos"] == bos)
    pieces = [piece_bytes(processor, i) for i in range(len(vocab))]
    pieces += [b""] * (extra["vocab_size"] - len(pieces))
    files = {"tokenizer.model": serialized, **_templates(folder)}
    return _published("sentencepiece", pieces, files, extra, vocab, processor.unk_id(), *[processor.encode] * 2)


def _published(kind, pieces, files, extra: dict, vocab: Mapping[str, int], unknown, encode, encode_behind) -> Tokenizer:
    """unknown: id of text without a piece; encode: text -> ids; encode_behind: the same for text after a control symbol."""
    control = extra["control"]
    for i in control.values():
        pieces[i] = b""
    unwritten = set(range(len(pieces))) - set(vocab.values())
    spell = _speller(pieces)
    spelled = {i: spell(text) for text, i in control.items() if i != unknown}

    def unforgeable(encode):
        # In some models the names of control symbols are also pieces of text.
        return lambda text: [j for i in encode(text) for j in spelled.get(i, (i,))]

    tokenizer = Tokenizer(kind, pieces, next(iter(files.values())), unforgeable(encode), unforgeable(encode_behind))
    tokenizer.files = {**files, EXTRA: _dump(extra)}
    tokenizer.symbols = Symbols(
        extra["bos"], tuple(extra["eos"]), extra["pad"], frozenset(control.values()) | unwritten, extra["prompts_begin"]
    )
    tokenizer.identity = (tokenizer.serialized, repr((extra["bos"], extra["eos"], sorted(control.items()))).encode())
    tokenizer.names, tokenizer.template = control, extra["template"]
    tokenizer.prefix = tokenizer.decode_bytes(tokenizer.encode("a")).removesuffix(b"a")
    return tokenizer


def _speller(pieces: list[bytes]):
    """Name of a control symbol -> its ids as text: by characters, by bytes where there is no such piece, else nothing."""
    short = {p: i for i, p in reversed(list(enumerate(pieces))) if p and (len(p) == 1 or len(p.decode(errors="replace")) == 1)}

    def spell(name: str) -> list[int]:
        parts = [[c.encode()] if c.encode() in short else [bytes([b]) for b in c.encode()] for c in name]
        return [short[p] for part in parts for p in part if p in short]

    return spell


# ---------------------------------------------------------------- bytes of a token


def _piece_reader(stored: dict):
    """Token -> its bytes, by the decoder of a tokenizer.json. Raises RunError for decoders that are not supported."""
    decoder = stored.get("decoder") or {"type": "Spaces"}
    kinds = {d["type"] for d in decoder.get("decoders", [decoder])}
    if "ByteLevel" in kinds:
        alphabet = _byte_alphabet()
        return lambda token: bytes(alphabet[c] for c in token) if set(token) <= alphabet.keys() else token.encode()
    if kinds & {"Metaspace", "ByteFallback"}:
        is_byte = lambda t: len(t) == 6 and t.startswith("<0x") and t.endswith(">") and "ByteFallback" in kinds
        return lambda t: bytes([int(t[3:5], 16)]) if is_byte(t) else t.replace(_META, " ").encode()
    if kinds == {"WordPiece"}:
        mark = decoder["prefix"]
        return lambda t: (t.removeprefix(mark) if t.startswith(mark) else " " + t).encode()
    if kinds == {"Spaces"}:  # without a decoder, the library puts a space between two tokens
        return lambda t: (" " + t).encode()
    raise data_error(
        f"tokenizer.json decodes by {', '.join(sorted(kinds))}, which is not known here;"
        " expected ByteLevel, Metaspace, ByteFallback or WordPiece"
    )


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """Character -> byte in byte-level BPE (GPT-2's encoder.py): printable Latin-1 as it is, the others from U+0100."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


# ---------------------------------------------------------------- which ids are what


def _extra(folder: Path, vocab: Mapping[str, int], control: dict[str, int], own: dict[str, int], adds_bos) -> dict:
    """The contents of tokenizer.extra.json: read, or assembled from the files of a published model.

    own: bos, eos and pad by the tokenizer's file itself; adds_bos(bos): whether that file puts bos in front of a text.
    """
    if (folder / EXTRA).exists():
        stored = _read(folder / EXTRA)
        keys = {"bos": int, "eos": list, "pad": int, "prompts_begin": bool, "control": dict, "template": str, "vocab_size": int}
        wrong = [k for k, kind in keys.items() if not isinstance(stored.get(k), kind)]
        if wrong:
            raise data_error(f"{folder / EXTRA}: {wrong[0]} is {stored.get(wrong[0])!r}, expected {keys[wrong[0]].__name__}")
        ids = [stored["bos"], *stored["eos"], stored["pad"], *stored["control"].values()]
        bad = [i for i in ids if not (isinstance(i, int) and 0 <= i < stored["vocab_size"])]
        if bad or not stored["eos"]:
            raise data_error(f"{folder / EXTRA}: id {bad[0] if bad else None} of a symbol, expected 0 to vocab_size - 1")
        return stored
    said, generation, model = (
        _read(folder / name) for name in ("tokenizer_config.json", "generation_config.json", "config.json")
    )
    model = model | _told(folder / "config.json", model, "text_config", dict)
    _told(folder / "config.json", model, "vocab_size", int)
    path = folder / "tokenizer_config.json"
    for i, token in _told(path, said, "added_tokens_decoder", dict).items():
        if not (i.isdecimal() and isinstance(token, dict) and isinstance(token.get("content"), str)):
            raise data_error(f"{path}: added_tokens_decoder: {i!r} is {token!r:.60}, expected an id and what it stands for")
        if token.get("special"):
            control = control | {token["content"]: int(i)}
    ids = {**vocab, **control}

    def named(role: str) -> list[int]:
        """Ids of a role, the most specific file first."""
        token = said.get(f"{role}_token")
        token = _told(path, token if isinstance(token, dict) else {"content": token}, "content", str, f"{role}_token")
        found = [generation.get(f"{role}_token_id"), ids.get(token or None), model.get(f"{role}_token_id"), own.get(role)]
        flat = [i for f in found for i in (f if isinstance(f, list) else [f])]
        return [i for i in dict.fromkeys(flat) if isinstance(i, int) and 0 <= i <= max(ids.values())]

    bos, eos, pad = named("bos"), named("eos"), named("pad")
    if not bos and not eos:
        raise data_error(
            "neither a bos nor an eos symbol is named beside this tokenizer; put tokenizer_config.json or generation_config.json"
            f" of the model into {folder}"
        )
    eos = eos or bos[:1]
    ends = [ids[t] for t in _DOCUMENT_ENDS if ids.get(t) in eos]
    eos = list(dict.fromkeys([*ends[:1], *eos]))
    bos = (bos or eos)[0]
    by_id = {i: text for text, i in ids.items()}
    roles = [bos, *eos, *pad[:1], *named("unk")[:1]]
    control = control | {by_id[i]: i for i in roles if i in by_id}
    prompts_begin = said.get("add_bos_token")
    return {
        "bos": bos,
        "eos": eos,
        "pad": (pad or eos)[0],
        "prompts_begin": prompts_begin if isinstance(prompts_begin, bool) else adds_bos(bos),
        "control": _within(control, model, ids),
        "template": _template_name(_templates(folder)),
        "vocab_size": _size(control, model, ids),
    }


def _told(path: Path, stored: dict, key: str, kind: type, name: str = ""):
    """The value of `key` in `stored`, from the file `path`; kind() if null or absent. Raises RunError for another type."""
    value = stored.get(key)
    if value is None or value == []:  # some programs write an empty list for no entries
        return kind()
    if not isinstance(value, kind):
        raise data_error(f"{path}: {name or key} is {value!r:.60}, expected {kind.__name__}")
    return value


def _size(control: dict[str, int], model: dict, ids: Mapping[str, int]) -> int:
    """Number of ids, without trailing control symbols that the model has no row for (Gemma 3's <image_soft_token>)."""
    size, rows = max(ids.values()) + 1, model.get("vocab_size")
    beyond = {i for i in ids.values() if rows and i >= rows}
    return rows if beyond and beyond <= set(control.values()) else size


def _within(control: dict[str, int], model: dict, ids: Mapping[str, int]) -> dict[str, int]:
    size = _size(control, model, ids)
    return {text: i for text, i in control.items() if i < size}


def with_template(tokenizer: Tokenizer, name: str, text: str) -> dict[str, bytes]:
    """The files of `tokenizer`, name -> content, for a model with the chat template `name`, whose Jinja text is `text`."""
    files = {file: content for file, content in tokenizer.files.items() if not file.startswith(f"{MORE_TEMPLATES}/")}
    files |= {TEMPLATE_FILE: text.encode()}
    return files | {EXTRA: _dump(json.loads(files[EXTRA]) | {"template": name})} if EXTRA in files else files


def given_template(tokenizer: Tokenizer, folder: Path) -> Tokenizer:
    """A tokenizer of one of our own kinds, with the chat template beside it if it came with an exported model."""
    found = _templates(folder)
    tokenizer.template = _template_name(found)
    tokenizer.files = {**tokenizer.files, **found}
    return tokenizer


def is_unknown(tokenizer: Tokenizer) -> bool:
    """Whether its model came with a chat template that is not supported here."""
    return not tokenizer.template and any(file == TEMPLATE_FILE or file.startswith(MORE_TEMPLATES) for file in tokenizer.files)


def _template_name(found: dict[str, bytes]) -> str:
    text = found.get(TEMPLATE_FILE, b"").decode()
    return next((name for name, *marks in _TEMPLATE_MARKS if all(m in text for m in marks)), "")


def _templates(folder: Path) -> dict[str, bytes]:
    """file name -> content of the chat templates of the model in `folder`, from files or from tokenizer_config.json.

    Files take precedence, as in transformers. Raises RunError if one is not a text.
    """
    one, more = folder / TEMPLATE_FILE, folder / MORE_TEMPLATES
    names = [TEMPLATE_FILE] if one.exists() else []
    if more.is_dir():
        names += sorted(f"{MORE_TEMPLATES}/{p.name}" for p in more.iterdir() if p.suffix == ".jinja")
    if names:
        return {name: _utf8(folder / name) for name in names}
    path = folder / "tokenizer_config.json"
    said = _read(path).get("chat_template") or []
    named = [{"name": "default", "template": said}] if isinstance(said, str) else said
    found = {}
    for entry in named if isinstance(named, list) else [named]:
        name, text = (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None)
        # The name becomes a file name.
        if not (isinstance(name, str) and re.fullmatch(r"\w[\w.-]*", name) and isinstance(text, str)):
            raise data_error(
                f"{path}: chat_template: {entry!r:.60}, expected a text, or a list of"
                ' {"name": letters and digits, "template": text}'
            )
        if lone := lone_surrogate(text):
            raise data_error(f"{path}: chat_template is not valid Unicode: {lone}; write it anew as UTF-8")
        found[TEMPLATE_FILE if name == "default" else f"{MORE_TEMPLATES}/{name}.jinja"] = text.encode()
    return found


def _utf8(path: Path) -> bytes:
    content = path.read_bytes()
    try:
        content.decode()
    except UnicodeDecodeError as e:
        raise data_error(f"{path}: not UTF-8 (byte 0x{e.object[e.start]:02x} at offset {e.start})") from None
    return content


def _dump(extra: dict) -> bytes:
    return json.dumps(extra, indent=1).encode()


def _read(path: Path) -> dict:
    if not path.exists():
        return {}
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise data_error(f"{path}: damaged (not JSON)") from None
    if not isinstance(stored, dict):
        raise data_error(f"{path}: expected a JSON object")
    return stored
