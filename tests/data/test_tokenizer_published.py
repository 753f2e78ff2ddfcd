"""Published tokenizers keep their own ids: those of the library they were made with, for every text; a text cannot contain
their control symbols; a folder is imported once and reads back the same.
"""

import io
import json

import numpy as np
import pytest
import tokenizers as library
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from gpt4o_jax.data import tokenizer as tokenizers
from gpt4o_jax.data.batches import make_batch
from gpt4o_jax.data.token_cache import build
from gpt4o_jax.data.tokenizer_published import TEMPLATE_FILE, is_unknown
from gpt4o_jax.errors import ExitCode, RunError
from gpt4o_jax.tasks import chat
from tests.data.published import FAMILIES, LOSSLESS, TEXT, special


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Name -> (the library's tokenizer, ours, folder)."""
    found = {}
    for family in FAMILIES:
        reference, files = family()
        folder = tmp_path_factory.mktemp(family.__name__)
        reference.save(str(folder / "tokenizer.json"))
        for name, content in files.items():
            (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
        found[family.__name__] = reference, tokenizers.load(folder), folder
    return found


NAMES = [
    "<|endoftext|>",
    "<|begin_of_text|>",
    "<|eot_id|>",
    "<|im_end|>",
    "<s>",
    "</s>",
    "<unk>",
    "<pad>",
    "[CLS]",
    "[UNK]",
    "<0x41>",
    "<think>",
]
letters = st.characters(exclude_categories=["Cs"])
texts = st.one_of(
    st.text(letters),
    st.lists(st.one_of(st.sampled_from([*NAMES, " ", "\n", "the", "cat", "é", "▁"]), letters), max_size=9).map("".join),
)


# ---------------------------------------------------------------- text -> ids -> text


@pytest.mark.parametrize("family", [f.__name__ for f in FAMILIES])
def test_ids_are_the_librarys_and_no_symbol_can_be_written(made, family):
    reference, ours, _ = made[family]
    reference.encode_special_tokens = True  # names of symbols in a text are plain text
    unknown = {ours.names.get("<unk>"), ours.names.get("[UNK]")}

    @settings(deadline=None)
    @given(texts)
    def check(text):
        wanted, got = reference.encode(text, add_special_tokens=False).ids, ours.encode(text)
        forged = ours.symbols.control - unknown
        assert not forged & set(got)
        assert got == wanted or forged & set(wanted), "another way only where the library itself gives out a symbol"

    check()
    reference.encode_special_tokens = False


def test_the_library_would_give_out_symbols_where_we_do_not(made):
    reference, ours, _ = made["unigram"]
    reference.encode_special_tokens = True
    assert ours.names["<s>"] in reference.encode("a <s> c", add_special_tokens=False).ids, "else the guard is for nothing"
    reference.encode_special_tokens = False
    assert ours.decode(ours.encode("a <s> c")) == " a <s> c"
    assert made["llama2"][1].decode(made["llama2"][1].encode("x</s>y")) == " x</s>y"


@pytest.mark.parametrize("family", [f.__name__ for f in LOSSLESS])
@settings(deadline=None)
@given(text=texts.filter(lambda t: "▁" not in t))
def test_texts_come_back_in_whole_and_in_pieces(made, family, text):
    reference, ours, _ = made[family]
    ids = ours.encode(text)
    whole = ours.prefix.decode() + text if text else ""
    assert ours.decode(ids) == whole
    assert b"".join(ours.decode_bytes([i]) for i in ids) == whole.encode()
    assert int(tokenizers.byte_lengths(ours)[ids].sum()) == len(whole.encode())
    assert reference.decode(ids).strip("�") == text.strip("�")


def test_a_space_stands_in_front_only_where_the_family_puts_it(made):
    assert {f: t.prefix for f, (_, t, _) in made.items()} == {
        "gpt2": b"", "llama3": b"", "qwen": b"", "gemma": b"",
        "llama2": b" ", "mistral3": b" ", "unigram": b" ", "wordpiece": b" ",
    }  # fmt: skip


@pytest.mark.parametrize("family", ["llama3", "qwen", "llama2", "mistral3", "gemma"])
@pytest.mark.parametrize("text", ["Hello cat", " the", "\n\nthe", "1"])
def test_texts_behind_a_symbol_are_cut_as_the_library_cuts_them(made, family, text):
    reference, ours, _ = made[family]
    symbol = next(iter(ours.names))
    wanted = reference.encode(f"{symbol}{text}{symbol}", add_special_tokens=False).ids
    assert [ours.names[symbol], *ours.encode(text, behind_symbol=True), ours.names[symbol]] == wanted


@pytest.mark.parametrize("model", ["bpe", "unigram"])
def test_a_piece_called_first_or_never_keeps_its_id_behind_a_symbol(tmp_path, model):
    """These are also the names of the schemes by which a tokenizer.json says where a space is prepended."""
    pieces = ["<unk>", "<s>", "</s>", "▁", *"firstnevo", "fi", "rs", "fir", "st", "first", "never"]
    if model == "bpe":
        merges = [("f", "i"), ("r", "s"), ("fi", "r"), ("s", "t"), ("fir", "st")]
        t = library.Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>"))
    else:
        t = library.Tokenizer(models.Unigram([(p, -2.0 - (p == "never") - 4 * (len(p) == 1)) for p in pieces], unk_id=0))
    t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(prepend_scheme="first", split=False)])
    t.decoder = decoders.Metaspace(prepend_scheme="first")
    t.add_special_tokens(special("<unk>", "<s>", "</s>"))
    t.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    ours = tokenizers.load(tmp_path)
    for text in ("first", "never", "over"):
        for front in ("", "<s>"):
            wanted = t.encode(front + text, add_special_tokens=False).ids[bool(front) :]
            assert ours.encode(text, behind_symbol=bool(front)) == wanted, (text, front)


# ---------------------------------------------------------------- which ids are what


def test_each_family_has_its_own_symbols(made):
    names = lambda t, ids: [next(n for n, i in t.names.items() if i == j) for j in ids]
    got = {
        f: (names(t, [t.symbols.bos, *t.symbols.eos, t.symbols.pad]), t.symbols.prompts_begin, t.template)
        for f, (_, t, _) in made.items()
    }
    assert got["gpt2"] == (["<|endoftext|>"] * 3, False, "")
    assert got["llama3"] == (["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|end_of_text|>"], True, "llama3")
    assert got["qwen"] == (["<|endoftext|>", "<|endoftext|>", "<|im_end|>", "<|endoftext|>"], False, "chatml")
    assert got["llama2"] == got["gemma"] == (["<s>", "</s>", "</s>"], True, "")
    assert got["unigram"] == (["<s>", "<s>", "<pad>"], False, "")
    qwen = made["qwen"][1]
    assert qwen.symbols.control == set(qwen.names.values()) and "<think>" not in qwen.names
    assert qwen.decode(qwen.encode("<think>")) == "<think>" and len(qwen.encode("<think>")) == 1, "a word, no symbol"


# Parts of published templates, enough to tell each from its neighbours; in a tokenizer_config.json a line break within
# quotes belongs to the text, Qwen 2.5's and 3's write it as \\n.
TEMPLATES = {
    "Qwen2-7B-Instruct": (
        "qwen2",
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a"
        " helpful assistant.<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content']",
    ),
    "Qwen1.5-7B-Chat": (  # without the full stop
        "qwen1.5",
        "{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a"
        " helpful assistant<|im_end|>\n' }}",
    ),
    "Qwen2.5-0.5B": (
        "qwen2.5-base",
        "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }} {{- '\\n<tool_response>\\n' }}",
    ),
    "Qwen2.5-7B-Instruct": (
        "qwen2.5",
        "{{- 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' }} {{- '\\n<tool_response>\\n' }}"
        "{{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}",
    ),
    "Qwen3-8B": ("qwen3", "{%- if loop.index0 > ns.last_query_index %} {{- '<|im_start|>' + message.role"),
    "OLMo-2-1124-7B-Instruct": (
        "olmo2",
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{{ '<|system|>\n' + message['content']"
        " + '\n' }}{% elif message['role'] == 'assistant' %}{% if not loop.last %}{{ '<|assistant|>\n'  + message['content'] +"
        " eos_token + '\n' }}",
    ),
    "Mistral-7B-Instruct-v0.2, first": (
        "mistral",
        "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] =="
        " 'assistant' %}{{ message['content'] + eos_token}}",
    ),
    "Mixtral-8x7B-Instruct-v0.1": (  # and today's Mistral-7B-Instruct-v0.2
        "mistral0.2",
        "{{- ' [INST] ' + system_message + '\\n\\n' + message['content'] + ' [/INST]' }}\n        {%- else %}\n"
        "            {{- ' [INST] ' + message['content'] + ' [/INST]' }}\n        {%- endif %}\n"
        "    {%- elif message['role'] == 'assistant' %}\n        {{- ' ' + message['content'] + eos_token}}\n",
    ),
    "Mixtral-8x22B-Instruct-v0.1": (  # a space before eos, which no template here has
        "",
        "{{ ' [INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] +"
        " ' ' + eos_token}}",
    ),
    "Llama-3.1-Tulu-3-8B": (  # OLMo 2's without bos, which no template here has
        "",
        "{% for message in messages %}{% if message['role'] == 'system' %}{{ '<|system|>\n' + message['content'] + '\n' }}"
        "{% if not loop.last %}{{ '<|assistant|>\n'  + message['content'] + eos_token + '\n' }}",
    ),
    "zephyr-7b-beta": (
        "",
        "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}",
    ),
}


@pytest.mark.parametrize("model", TEMPLATES)
@pytest.mark.parametrize("file", ["tokenizer_config.json", "chat_template.jinja"])
def test_a_published_template_is_told_by_its_marks(made, tmp_path, model, file):
    name, text = TEMPLATES[model]
    assert name in ("", *chat.TEMPLATES)
    (tmp_path / "tokenizer.json").write_bytes((made["gpt2"][2] / "tokenizer.json").read_bytes())
    said = {"eos_token": "<|endoftext|>", "chat_template": text if file == "tokenizer_config.json" else "<start_of_turn>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    if file == "chat_template.jinja":  # which wins if both exist
        (tmp_path / file).write_text(text)
    assert tokenizers.load(tmp_path).template == name


@pytest.mark.parametrize(
    ("templates", "kept", "name"),
    [
        ("{{ 'ü' }}\r\n", {TEMPLATE_FILE: "{{ 'ü' }}\r\n"}, ""),
        ("", {}, ""),
        (None, {}, ""),
        ([], {}, ""),
        (
            [{"name": "default", "template": "<start_of_turn>"}, {"name": "tool_use", "template": "{{ tools }}"}],
            {TEMPLATE_FILE: "<start_of_turn>", "additional_chat_templates/tool_use.jinja": "{{ tools }}"},
            "gemma",
        ),
        ([{"name": "rag-2.0", "template": "x"}], {"additional_chat_templates/rag-2.0.jinja": "x"}, ""),
    ],
    ids=["text", "empty", "null", "none", "two", "no default"],
)
@pytest.mark.parametrize("layout", ["config", "files"])
def test_templates_are_kept_as_they_are(made, tmp_path, templates, kept, name, layout):
    """Whether they came in tokenizer_config.json or as files, and whether or not they are recognised."""
    source, run = tmp_path / "source", tmp_path / "run"
    (source / "additional_chat_templates").mkdir(parents=True)
    run.mkdir()
    (source / "tokenizer.json").write_bytes((made["gpt2"][2] / "tokenizer.json").read_bytes())
    said = {"eos_token": "<|endoftext|>", "chat_template": templates if layout == "config" or not kept else "not this one"}
    (source / "tokenizer_config.json").write_text(json.dumps(said))
    for file, text in kept.items() if layout == "files" else ():
        (source / file).write_bytes(text.encode())
    ours = tokenizers.load(source)
    ours.save_in(run)
    for tokenizer in (ours, tokenizers.load(run)):
        files = {f: c.decode() for f, c in tokenizer.files.items() if f.endswith(".jinja")}
        assert (files, tokenizer.template, is_unknown(tokenizer)) == (kept, name, bool(kept) and not name)
    assert {f: (run / f).read_bytes() for f in kept} == {f: text.encode() for f, text in kept.items()}
    assert ours.digest == made["gpt2"][1].digest


def test_prompts_begin_as_the_family_was_trained(made):
    ids = {f: t.prompt("the") for f, (_, t, _) in made.items()}
    for family, (reference, ours, _) in made.items():
        assert ids[family] == reference.encode("the").ids
        assert ours.prompt("") == [ours.symbols.bos]
        assert ours.document("the") == [ours.symbols.bos, *ours.encode("the"), ours.symbols.eos[0]]


def test_one_symbol_for_both_ends_is_predicted_only_as_an_end(made, tmp_path):
    ours = made["gpt2"][1]
    stream = build(tmp_path, "cache", ["the cat", "the"], ours).tokens.astype(np.int32)
    batch = make_batch([(stream, np.ones_like(stream))], ours.symbols)
    X = ours.symbols.bos
    ends = (batch.targets == X) & (batch.tokens != X)
    assert ends.sum() == 2 and (batch.weights[batch.targets == X].sum(), batch.weights[ends].sum()) == (2, 2)


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("family", [f.__name__ for f in FAMILIES])
def test_an_imported_tokenizer_is_the_same_without_the_files_it_came_from(made, family, tmp_path):
    _, ours, folder = made[family]
    ours.save_in(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    told = json.loads((folder / "tokenizer_config.json").read_text()).get("chat_template")
    template = (folder / TEMPLATE_FILE).read_bytes() if (folder / TEMPLATE_FILE).exists() else (told or "").encode()
    kept = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert kept.pop(TEMPLATE_FILE, b"") == template and sorted(kept) == ["tokenizer.extra.json", "tokenizer.json"]
    for again in (tokenizers.load(tmp_path), tokenizers.load(tmp_path / "tokenizer.json")):
        for what in ("kind", "pieces", "symbols", "names", "digest", "template", "prefix", "vocab_size"):
            assert getattr(again, what) == getattr(ours, what), what
        assert again.encode(TEXT[1]) == ours.encode(TEXT[1])


def test_digests_tell_mappings_apart_that_have_the_same_pieces(made):
    assert len({t.digest for _, t, _ in made.values()}) == len(FAMILIES)


def test_symbols_the_model_has_no_row_for_are_left_out(made, tmp_path):
    _, ours, folder = made["llama3"]
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    rows = ours.vocab_size - 1  # without <|eot_id|>
    (tmp_path / "generation_config.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"})
    )
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": rows}))
    fewer = tokenizers.load(tmp_path)
    assert fewer.vocab_size == rows and "<|eot_id|>" not in fewer.names


BAD_EXTRA = {"bos": 1, "eos": [2], "pad": 0, "prompts_begin": True, "control": {}, "template": "", "vocab_size": 300}


@pytest.mark.parametrize(
    ("name", "content", "fragment"),
    [
        ("tokenizer.json", '{"model": {"type": "BPE"', "damaged tokenizer file (not JSON)"),
        ("tokenizer.json", '{"model": {"type": "Nothing"}}', "damaged tokenizer.json"),
        ("tokenizer.json", '{"kind": "word"}', "damaged"),
        ("tokenizer_config.json", "[]", "expected a JSON object"),
        ("tokenizer_config.json", "{", "damaged (not JSON)"),
        ("tokenizer_config.json", "{}", "neither a bos nor an eos"),
        ("tokenizer_config.json", '{"eos_token": ["</s>"]}', "eos_token is ['</s>'], expected str"),
        ("tokenizer_config.json", '{"bos_token": {"content": 1}}', "bos_token is 1, expected str"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"0": "<s>"}}', "added_tokens_decoder: '0' is '<s>', expected an id"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "<s>"}}}', "'x' is {'content'"),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "added_tokens_decoder is [1], expected dict"),
        (
            "tokenizer_config.json",
            '{"eos_token": "<|endoftext|>", "chat_template": 3}',
            "chat_template: 3, expected a text, or a list",
        ),
        (
            "tokenizer_config.json",
            '{"eos_token": "<|endoftext|>", "chat_template": {"default": "x"}}',
            "chat_template: {'default': 'x'}",
        ),
        (
            "tokenizer_config.json",
            '{"eos_token": "<|endoftext|>", "chat_template": ["x"]}',
            "chat_template: 'x', expected a text",
        ),
        (
            "tokenizer_config.json",
            '{"eos_token": "<|endoftext|>", "chat_template": [{"name": "a", "template": 1}]}',
            "expected a text",
        ),
        (
            "tokenizer_config.json",
            '{"eos_token": "<|endoftext|>", "chat_template": [{"name": "../../a", "template": "x"}]}',
            "letters and digits",
        ),
        (
            "tokenizer_config.json",
            '{"eos_token": "<|endoftext|>", "chat_template": "\\ud800"}',
            "chat_template is not valid Unicode",
        ),
        ("additional_chat_templates/rag.jinja", b"\xff", "rag.jinja: not UTF-8 (byte 0xff at offset 0)"),
        ("config.json", '{"text_config": [1]}', "text_config is [1], expected dict"),
        ("config.json", '{"vocab_size": "300"}', "vocab_size is '300', expected int"),
        ("chat_template.jinja", b"{{ \xff }}", "not UTF-8 (byte 0xff at offset 3)"),
        ("tokenizer.extra.json", json.dumps({**BAD_EXTRA, "eos": 2}), "eos is 2, expected list"),
        ("tokenizer.extra.json", json.dumps({**BAD_EXTRA, "bos": 300}), "id 300 of a symbol"),
        ("tokenizer.extra.json", json.dumps({**BAD_EXTRA, "eos": []}), "id None of a symbol"),
    ],
)
def test_damaged_files_are_refused_by_name(made, tmp_path, name, content, fragment):
    for file in ("tokenizer.json", "tokenizer_config.json")[: 1 + (name == "config.json" or name.endswith(".jinja"))]:
        (tmp_path / file).write_bytes((made["gpt2"][2] / file).read_bytes())
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RunError) as e:
        tokenizers.load(tmp_path)
    assert e.value.code == ExitCode.DATA and fragment in str(e.value) and str(tmp_path) in str(e.value)


def test_a_decoder_that_is_not_known_is_refused(made, tmp_path):
    stored = json.loads((made["gpt2"][2] / "tokenizer.json").read_text()) | {
        "decoder": {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True}
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    with pytest.raises(RunError, match="decodes by CTC"):
        tokenizers.load(tmp_path)


# ---------------------------------------------------------------- other people's SentencePiece models


def sentencepiece_model(**options) -> bytes:
    import sentencepiece as spm

    model = io.BytesIO()
    known = {
        "model_type": "bpe",
        "vocab_size": 400,
        "hard_vocab_limit": False,
        "byte_fallback": True,
        "minloglevel": 2,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,  # as in Llama's and Gemma's
    }
    spm.SentencePieceTrainer.train(sentence_iterator=iter(TEXT), model_writer=model, **{**known, **options})
    return model.getvalue()


TURNS = ["<start_of_turn>", "<end_of_turn>"]
FOREIGN = {
    "llama2": sentencepiece_model(),
    "gemma": sentencepiece_model(add_dummy_prefix=False, pad_id=0, eos_id=1, bos_id=2, unk_id=3, user_defined_symbols=TURNS),
}  # fmt: skip
SAID = {
    "llama2": {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "chat_template": "[INST] <<SYS>>"},
    "gemma": {
        "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "chat_template": "<start_of_turn>",
        "added_tokens_decoder": {str(i): {"content": c, "special": True} for i, c in enumerate(TURNS, 4)},
    },
}  # fmt: skip


@pytest.mark.parametrize("family", FOREIGN)
def test_sentencepiece_models_of_others_keep_their_ids(tmp_path, family):
    import sentencepiece as spm

    (tmp_path / "tokenizer.model").write_bytes(FOREIGN[family])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(SAID[family]))
    (tmp_path / "run").mkdir()
    tokenizers.load(tmp_path).save_in(tmp_path / "run")
    ours, processor = tokenizers.load(tmp_path / "run"), spm.SentencePieceProcessor(model_proto=FOREIGN[family])
    for text in ("The cat sat", " two  spaces ", "Füße \U0001f600\n\tx", "</s><s>"):
        assert ours.encode(text) == processor.encode(text)
        assert ours.decode(ours.encode(text)) == ours.prefix.decode() + text
    assert (ours.symbols.bos, ours.symbols.eos) == ((1, (2,)) if family == "llama2" else (2, (1,)))
    assert ours.symbols.prompts_begin and ours.template == family
    assert ours.prefix == (b" " if family == "llama2" else b"")
    if family == "gemma":
        assert 4 in processor.encode("<start_of_turn>x") and 4 not in ours.encode("<start_of_turn>x")
        assert ours.decode(ours.encode("<start_of_turn>x")) == "<start_of_turn>x" and ours.special("<end_of_turn>") == 5


def test_a_sentencepiece_model_alone_says_what_its_symbols_are(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(FOREIGN["gemma"])
    symbols = tokenizers.load(tmp_path / "tokenizer.model").symbols
    assert (symbols.bos, symbols.eos, symbols.pad, symbols.control, symbols.prompts_begin) == (2, (1,), 0, {0, 1, 2, 3}, True)
