"""What an exported folder says about its tokenizer; transformers, reading it, gives the same ids as we do for texts and
conversations."""

import json
import os
import subprocess

import pytest

from gpt4o_jax.data import tokenizer as tokenizers
from gpt4o_jax.interop.huggingface import tokenizer_config, tokenizer_files
from gpt4o_jax.tasks import chat
from tests.data.test_tokenizer_published import FAMILIES, FOREIGN, SAID, TEXT
from tests.interop.test_peers import PYTHON
from tests.interop.test_peers import pytestmark as needs_peers

TEXTS = ["The cat sat", "Füße \U0001f600\n\tx", "def f(x):\n    return x  # 123", "  two  spaces "]


def published(folder, name):
    """A tokenizer read from what comes with a model: a tokenizer.json or a SentencePiece model."""
    if name in FOREIGN:
        (folder / "tokenizer.model").write_bytes(FOREIGN[name])
        files = {"tokenizer_config.json": SAID[name]}
    else:
        library, files = next(f for f in FAMILIES if f.__name__ == name)()
        library.save(str(folder / "tokenizer.json"))
    for file, content in files.items():
        (folder / file).write_text(content if isinstance(content, str) else json.dumps(content))
    return tokenizers.load(folder)


def test_symbols_are_told_by_name(tmp_path):
    own = tokenizer_config(tokenizers.train("bpe", 400, TEXT))
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    assert own.items() >= {**names, "add_bos_token": True, "add_prefix_space": False}.items()
    assert own["tokenizer_class"] == "LlamaTokenizer"  # which reads SentencePiece
    llama = tokenizer_config(published(tmp_path, "llama3"))
    assert llama["bos_token"] == "<|begin_of_text|>" and llama["add_bos_token"] and "unk_token" not in llama
    assert llama["tokenizer_class"] == "PreTrainedTokenizerFast"  # which reads a tokenizer.json


@pytest.mark.parametrize("tokenizer", [tokenizers.byte_tokenizer(), tokenizers.char_tokenizer("abc")], ids=["byte", "char"])
def test_for_bytes_and_characters_transformers_has_no_class(tokenizer):
    assert tokenizer_config(tokenizer) == {}


READER = """
import json, sys, transformers
found = {}
for folder in sys.argv[3:]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(text)["input_ids"] for text in json.loads(sys.argv[1])]
    texts = [tokenizer.decode(i, skip_special_tokens=True) for i in ids]
    generation = transformers.GenerationConfig.from_pretrained(folder)
    talks = [
        tokenizer.apply_chat_template(talk, add_generation_prompt=reply, return_dict=False)
        for talk in json.loads(sys.argv[2]) if tokenizer.chat_template for reply in (False, True)
    ]
    found[folder] = ids, texts, [tokenizer.bos_token_id, tokenizer.eos_token_id], generation.eos_token_id, talks
print(json.dumps(found))
"""
NAMES = ("own", *(f.__name__ for f in FAMILIES), *FOREIGN)
TALKS = [
    [("user", "Hi!")],
    [("system", "Be brief."), ("user", " F\u00fc\u00dfe \U0001f600 "), ("assistant", "The cat sat.\n\tIt\n")],
    [("user", "1+1?"), ("assistant", "2"), ("user", "def f(x):\n\treturn x")],
]
# How models with these tokenizers write conversations.
WRITTEN = {"own": "own", "llama3": "llama3", "qwen": "qwen3", "llama2": "llama2", "gpt2": "plain", "gemma": "gemma"}


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """Name -> (our tokenizer, then from transformers: ids of TEXTS, their decoded texts, bos and eos, ids that end generation,
    ids of TALKS without and with a generation prompt)."""
    ours, folders = {}, {}
    for name in NAMES:
        folder = folders[name] = tmp_path_factory.mktemp(name)
        own = name == "own"
        tokenizer = tokenizers.train("bpe", 400, TEXT) if own else published(tmp_path_factory.mktemp(f"{name}-from"), name)
        for file, content in tokenizer_files(tokenizer, WRITTEN.get(name, "")).items():
            (folder / file).write_bytes(content)
        (folder / "config.json").write_text('{"model_type": "llama"}')
        ours[name] = tokenizer
    talks = json.dumps([[{"role": role, "content": text} for role, text in talk] for talk in TALKS])
    command = [PYTHON, "-c", READER, json.dumps(TEXTS), talks, *map(str, folders.values())]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    return {name: (ours[name], *found[str(folders[name])]) for name in NAMES}


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs_peers) for name in NAMES])
def test_transformers_reads_what_is_written(there, name):
    ours, ids, texts, (bos, eos), *_ = there[name]
    assert (bos, eos) == (ours.symbols.bos, ours.symbols.eos[0])
    for text, theirs, back in zip(TEXTS, ids, texts, strict=True):
        if ours.kind == "sentencepiece" and ours.prefix and text.startswith(" "):
            continue  # SentencePiece prepends one more space here, transformers does not
        assert theirs == ours.prompt(text)
        if name in ("own", "gpt2", "llama3", "qwen"):
            assert back == text


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs_peers) for name in WRITTEN])
def test_transformers_writes_conversations_and_ends_replies_as_we_do(there, name):
    ours, *_, ends, talks = there[name]
    template = chat.template(WRITTEN[name])
    assert ends == list(chat.symbols_of_answers(template, ours).eos)
    wanted = [
        chat.encode(template.render(chat.read_messages([{"role": r, "content": t} for r, t in talk]), reply), ours)[0]
        for talk in TALKS
        for reply in (False, True)
    ]
    assert talks == wanted
