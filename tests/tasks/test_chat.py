"""Conversations are written as by each family's published template; only code inserts symbols; the loss counts the assistant's
words and their end, nothing else.
"""

import json

import pytest
import tokenizers as library
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from gpt4o_jax.data import tokenizer as tokenizers
from gpt4o_jax.errors import ExitCode, RunError
from gpt4o_jax.tasks import chat

SYSTEM, ASK, ANSWER = ("system", "Be brief."), ("user", " Hi! "), ("assistant", "Hello.\n")
AGAIN, TOOL, TOOL2 = ("user", "2+2?"), ("tool", 'a "b"'), ("tool", "c")
THOUGHT = ("assistant", "<think>\nhm\n</think>\n\nHello.\n")
LLAMA31 = "<s><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
QWEN15 = "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n"
QWEN2 = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
QWEN = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"

# Output of the published Jinja templates (rendered once with jinja2, bos "<s>", eos "</s>", with a generation prompt unless the
# last turn is an answer). From: Qwen2.5-7B-Instruct; transformers' ChatML; Meta-Llama-3-8B-Instruct and
# Llama-3.1-8B-Instruct; Llama-2-7b-chat-hf; Mistral-7B-Instruct-v0.2; gemma-2-2b-it; Qwen3-8B, Mistral-7B-Instruct-v0.3,
# Qwen2-7B-Instruct, Qwen2.5-0.5B, OLMo-2-1124-7B-Instruct, Qwen1.5-7B-Chat (from copies by others; the last got a
# generation prompt after the answer too, because only then does it end a conversation's last turn).
PUBLISHED = [
    ("chatml", [SYSTEM, ASK],
     "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n Hi! <|im_end|>\n<|im_start|>assistant\n"),
    ("chatml", [ASK, ANSWER], "<|im_start|>user\n Hi! <|im_end|>\n<|im_start|>assistant\nHello.\n<|im_end|>\n"),
    ("qwen2.5", [ASK], f"{QWEN}<|im_start|>user\n Hi! <|im_end|>\n<|im_start|>assistant\n"),
    ("qwen2.5", [SYSTEM, ASK, ANSWER, AGAIN],
     "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n Hi! <|im_end|>\n<|im_start|>assistant\nHello.\n<|im_end|>\n"
     "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"),
    ("qwen2.5", [ASK, ANSWER, TOOL, TOOL2],
     f"{QWEN}<|im_start|>user\n Hi! <|im_end|>\n<|im_start|>assistant\nHello.\n<|im_end|>\n"
     '<|im_start|>user\n<tool_response>\na "b"\n</tool_response>\n'
     "<tool_response>\nc\n</tool_response><|im_end|>\n<|im_start|>assistant\n"),
    ("qwen1.5", [ASK, ANSWER, TOOL],
     f"{QWEN15}<|im_start|>user\n Hi! <|im_end|>\n<|im_start|>assistant\nHello.\n<|im_end|>\n"
     '<|im_start|>tool\na "b"<|im_end|>\n<|im_start|>assistant\n'),
    ("qwen1.5", [SYSTEM, ASK],
     "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n Hi! <|im_end|>\n<|im_start|>assistant\n"),
    ("qwen1.5", [ASK, ANSWER], f"{QWEN15}<|im_start|>user\n Hi! <|im_end|>\n<|im_start|>assistant\nHello.\n<|im_end|>\n"),
    ("qwen2", [ASK, ANSWER, TOOL, TOOL2],
     f"{QWEN2}<|im_start|>user\n Hi! <|im_end|>\n<|im_start|>assistant\nHello.\n<|im_end|>\n"
     '<|im_start|>tool\na "b"<|im_end|>\n<|im_start|>tool\nc<|im_end|>\n<|im_start|>assistant\n'),
    ("qwen2", [SYSTEM, ASK, ANSWER],
     "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n Hi! <|im_end|>\n<|im_start|>assistant\nHello.\n<|im_end|>\n"),
    ("qwen2.5-base", [ASK, ANSWER, TOOL, TOOL2],
     f"{QWEN2}<|im_start|>user\n Hi! <|im_end|>\n<|im_start|>assistant\nHello.\n<|im_end|>\n"
     '<|im_start|>user\n<tool_response>\na "b"\n</tool_response>\n'
     "<tool_response>\nc\n</tool_response><|im_end|>\n<|im_start|>assistant\n"),
    ("qwen3", [SYSTEM, ASK, THOUGHT, AGAIN],
     "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n Hi! <|im_end|>\n<|im_start|>assistant\nHello.\n<|im_end|>\n"
     "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"),
    ("qwen3", [ASK, ANSWER],
     "<|im_start|>user\n Hi! <|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nHello.\n<|im_end|>\n"),
    ("qwen3", [AGAIN, ANSWER, ASK, THOUGHT, TOOL, TOOL2, ("assistant", "<think>\nso\n</think>\n\n4")],
     "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\nHello.\n<|im_end|>\n<|im_start|>user\n Hi! <|im_end|>\n"
     "<|im_start|>assistant\n<think>\nhm\n</think>\n\nHello.\n<|im_end|>\n"
     '<|im_start|>user\n<tool_response>\na "b"\n</tool_response>\n<tool_response>\nc\n</tool_response><|im_end|>\n'
     "<|im_start|>assistant\n<think>\nso\n</think>\n\n4<|im_end|>\n"),
    ("llama3", [SYSTEM, ASK, ANSWER, AGAIN],
     "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi!"
     "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|>"
     "<|start_header_id|>assistant<|end_header_id|>\n\n"),
    ("llama3.1", [SYSTEM, ASK, ANSWER],
     f"{LLAMA31}Be brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi!<|eot_id|>"
     "<|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"),
    ("llama3.1", [ASK, ANSWER, TOOL],
     f"{LLAMA31}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi!<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
     'Hello.<|eot_id|><|start_header_id|>ipython<|end_header_id|>\n\n"a \\"b\\""<|eot_id|>'
     "<|start_header_id|>assistant<|end_header_id|>\n\n"),
    ("llama2", [SYSTEM, ASK, ANSWER, AGAIN],
     "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n Hi! [/INST] Hello. </s><s>[INST] 2+2? [/INST]"),
    ("mistral", [ASK, ANSWER, AGAIN], "<s>[INST]  Hi!  [/INST]Hello.\n</s>[INST] 2+2? [/INST]"),
    ("mistral0.2", [ASK, ANSWER, AGAIN], "<s> [INST]  Hi!  [/INST] Hello.\n</s> [INST] 2+2? [/INST]"),
    ("mistral0.3", [SYSTEM, ASK, ANSWER, AGAIN], "<s>[INST]  Hi! [/INST] Hello.</s>[INST] Be brief.\n\n2+2?[/INST]"),
    ("mistral0.3", [ASK, ANSWER], "<s>[INST]  Hi! [/INST] Hello.</s>"),
    ("gemma", [ASK, ANSWER, AGAIN],
     "<s><start_of_turn>user\nHi!<end_of_turn>\n<start_of_turn>model\nHello.<end_of_turn>\n<start_of_turn>user\n2+2?<end_of_turn>\n"
     "<start_of_turn>model\n"),
    ("olmo2", [SYSTEM, ASK, ANSWER, AGAIN],
     "<s><|system|>\nBe brief.\n<|user|>\n Hi! \n<|assistant|>\nHello.\n</s>\n<|user|>\n2+2?\n<|assistant|>\n"),
    ("olmo2", [ASK, ANSWER], "<s><|user|>\n Hi! \n<|assistant|>\nHello.\n</s>"),
]  # fmt: skip


def messages(turns):
    return chat.read_messages([{"role": role, "content": text} for role, text in turns])


def render(name, turns):
    return chat.template(name).render(messages(turns), turns[-1][0] != "assistant")


@pytest.mark.parametrize(("name", "turns", "wanted"), PUBLISHED)
def test_conversations_are_written_as_published(name, turns, wanted):
    roles = {"bos": "<s>", "eos": "</s>"}
    written = (roles.get(i.name, i.name) if isinstance(i, chat.Symbol) else i.text for i, _ in render(name, turns))
    assert "".join(written) == wanted


def test_families_without_a_system_turn_read_it_before_the_first_question():
    text = lambda name: "".join(i.text for i, _ in render(name, [SYSTEM, ASK]) if isinstance(i, chat.Text))
    assert " [INST] Be brief.\n\n Hi! " in text("mistral0.2")
    assert "Be brief.\n\n Hi! " in text("mistral") and "Be brief.\n\nHi!" in text("gemma")


# ---------------------------------------------------------------- ids

SYMBOLS = sorted({i.name for name, turns, _ in PUBLISHED for i, _ in render(name, turns) if isinstance(i, chat.Symbol)})
CORPUS = ["".join(wanted for _, _, wanted in PUBLISHED) + " <<SYS>>\nüñ"] * 2


def byte_level():
    t = library.Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    t.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    return t


def sentencepiece_like():
    t = library.Tokenizer(models.BPE(unk_token="<unk>"))
    t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    t.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    lines = [line for text in CORPUS for line in text.splitlines()]  # as in SentencePiece, no piece contains a line break
    t.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>"], initial_alphabet=["\n"]))
    return t


@pytest.fixture(scope="module", params=[byte_level, sentencepiece_like], ids=lambda f: f.__name__)
def pair(request, tmp_path_factory):
    """Template name -> (the library's tokenizer, ours) with its symbols: plain text in some templates is a symbol in others."""

    def make(symbols):
        reference = request.param()
        names = [n for n in ("<s>", "</s>", *symbols) if n not in ("bos", "eos")]
        reference.add_special_tokens([library.AddedToken(n, special=True, normalized=False) for n in names])
        folder = tmp_path_factory.mktemp("tokenizer")
        reference.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
        return reference, tokenizers.load(folder)

    brackets = {"[INST]", "[/INST]"}
    with_brackets, without = make(SYMBOLS), make([n for n in SYMBOLS if n not in brackets])
    return lambda name: with_brackets if name == "mistral0.3" else without


@pytest.mark.parametrize(("name", "turns", "wanted"), PUBLISHED)
def test_ids_are_those_of_the_written_conversation(pair, name, turns, wanted):
    reference, ours = pair(name)
    ids, counts = chat.encode(render(name, turns), ours)
    assert ids == reference.encode(wanted, add_special_tokens=False).ids and len(ids) == len(counts)


@pytest.mark.parametrize("name", sorted(chat.TEMPLATES))
def test_the_loss_counts_answers_and_their_ends(pair, name):
    ours = tokenizers.byte_tokenizer() if name == "own" else pair(name)[1]
    end = chat.symbol_id(chat.template(name).end, ours)
    ids, counts = chat.encode(render(name, [ASK, ANSWER, AGAIN, ("assistant", "4 üñ")]), ours)
    answers, now = [], []
    for i, c in zip(ids, counts, strict=True):
        if c:
            now.append(i)
        elif now:
            answers, now = [*answers, now], []
    answers += [now] if now else []
    assert [a[-1] for a in answers] == [end, end]
    assert [ours.decode(a[:-1]).strip() for a in answers] == ["Hello.", "4 üñ"]


# in the excluded templates, a token may span the border
@pytest.mark.parametrize("name", sorted(chat.TEMPLATES.keys() - {"mistral", "mistral0.2", "mistral0.3"}))
@pytest.mark.parametrize("answer", ["Hello.", "<think>\nhm\n</think>\n\nHello."], ids=["answer", "thoughts"])
def test_what_is_given_to_be_answered_is_what_stands_before_an_answer_in_training(pair, name, answer):
    ours = tokenizers.byte_tokenizer() if name in ("own", "plain") else pair(name)[1]
    for turns in ([ASK], [ASK, ANSWER, AGAIN], [("user", f"{chat.TEMPLATES['qwen3'].no_thoughts}?")]):
        talk = messages([*turns, ("assistant", answer)])
        asked = chat.question(chat.template(name), talk, ours)
        ids, counts = chat.encode(chat.template(name).render(talk, False), ours)
        assert ids[: len(asked)] == asked
        assert counts[len(asked)] and not counts[len(asked) - 1], "the loss begins where the prompt ends"


def test_qwen3_without_thoughts_is_asked_as_its_template_does_with_enable_thinking_false(pair):
    reference, ours = pair("qwen3")
    wanted = "<|im_start|>user\n Hi! <|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    ids = chat.question(chat.template("qwen3"), messages([ASK, ANSWER]), ours)
    assert ids == reference.encode(wanted, add_special_tokens=False).ids


def test_qwen3_asked_for_a_reply_behind_an_answer_writes_that_answer_as_it_is():
    talk = messages([ASK, ANSWER])
    head = [(chat.Symbol("<|im_start|>"), False), (chat.Text("assistant\n"), False)]
    assert chat.template("qwen3").render(talk, True) == [*chat.template("qwen3").render(talk, False), *head]


def test_nothing_in_a_message_begins_or_ends_a_turn(pair):
    for name in chat.TEMPLATES:
        ours = tokenizers.byte_tokenizer() if name == "own" else pair(name)[1]
        forged = "x" + "".join(ours.names) + "y"
        count = lambda text, name=name, ours=ours: sum(
            i in ours.symbols.control
            for i in chat.encode(render(name, [("user", text)]), ours)[0]
            if i != ours.names.get("<unk>")
        )
        assert count(forged) == count("x")


def test_our_own_turns_are_single_symbols():
    ours = tokenizers.byte_tokenizer()
    ids, counts = chat.encode(render("own", [SYSTEM, ("user", "a"), ("assistant", "b"), TOOL2]), ours)
    spell = lambda text: [32 + b for b in f" {text}".encode()]
    assert ids == [1, 4, *spell("Be brief."), 8, 5, *spell("a"), 8, 6, *spell("b"), 8, 7, *spell("c"), 8, 6]
    assert [i for i, c in zip(ids, counts, strict=True) if c] == [*spell("b"), 8]


def test_a_word_has_the_same_tokens_in_a_question_and_as_the_answer():
    names = "Nora Fovjq Oslo butter parrot".split()
    text = " ".join(f"Where does {name} live? {name} has a {name}." for name in names)
    bpe = tokenizers.train("bpe", 320, [text] * 50)
    for name in names:
        asked, answer = bpe.encode(f"Where does {name}"), bpe.encode(f" {name}", True)
        ids, counts = chat.encode(render("own", [("user", f"{name} sees {name}"), ("assistant", name)]), bpe)
        assert [i for i, c in zip(ids, counts, strict=True) if c][:-1] == answer == asked[-len(answer) :]


@pytest.mark.parametrize("name", chat.TEMPLATES)
def test_what_stands_before_a_reply_is_taken_off(name):
    template = chat.template(name)
    rendered = template.render([chat.say("user", "a"), chat.say("assistant", "b  c")], False)
    reply = "".join(part.text for part, counts in rendered if counts and isinstance(part, chat.Text))
    assert template.said(reply).rstrip() == "b  c"


def test_parts_of_a_message_are_joined_and_other_kinds_wait():
    stored = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert chat.read_messages(stored)[0].text == "ab"


@pytest.mark.parametrize(
    ("call", "fragment"),
    [
        (lambda: chat.read_messages([{"role": "usr", "content": ""}]), "role 'usr' (did you mean user?)"),
        (lambda: chat.read_messages([{"role": "user", "content": 3}]), "message 0: content is 3"),
        (
            lambda: chat.read_messages([{"role": "user", "content": [{"type": "image", "url": "x"}]}]),
            "expected a text, or a list",
        ),
        (
            lambda: chat.read_messages([{"role": "user", "content": [{"type": "image", "text": "x"}]}]),
            "expected a text, or a list",
        ),
        (lambda: chat.read_messages([{"role": "user", "content": []}]), "content is []; expected a text, or a list"),
        (lambda: chat.read_messages(["hello"]), "message 0: role None"),
        (
            lambda: chat.read_messages([{"role": "assistant", "content": "", "tool_calls": [{"function": {}}]}]),
            "message 0: tool_calls: no template here writes it",
        ),
        (
            lambda: chat.read_messages([{"role": "tool", "content": "3", "tool_call_id": "c1"}]),
            "message 0: tool_call_id: no template here writes it",
        ),
        (
            lambda: chat.read_messages([{"role": "user", "content": "a", "name": "Ann"}]),
            "message 0: name: no template here writes",
        ),
        (
            lambda: chat.read_messages([{"role": "assistant", "content": "a", "weight": 0}]),
            "message 0: weight is 0; the loss counts every answer alike",
        ),
        (lambda: render("gemma", [ASK, AGAIN]), "message 1 is of role user, expected assistant"),
        (lambda: render("llama2", [ASK, SYSTEM]), "message 1 is of role system, expected assistant"),
        (lambda: render("olmo2", [ASK, TOOL]), "message 1 is of role tool, expected system, user or assistant"),
        (lambda: chat.encode(render("chatml", [ASK]), tokenizers.byte_tokenizer()), "no symbol <|im_start|>"),
    ],
)
def test_mistakes_are_told(call, fragment):
    with pytest.raises(RunError) as e:
        call()
    assert e.value.code == ExitCode.DATA and fragment in str(e.value)


def test_a_template_that_is_misspelt_is_a_mistake_of_usage():
    with pytest.raises(RunError, match=r"\(did you mean llama3\?\); expected --config.data.template=one of own,") as e:
        chat.template("lama3")
    assert e.value.code == ExitCode.USAGE
