"""The loss counts the assistant's words and end symbols, in every kind of row; broken conversations are reported by place."""

import hashlib
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt4o_jax.config import DataConfig, freeze
from gpt4o_jax.data import conversations, corpus, corpus_report, python_docs, sources, token_cache
from gpt4o_jax.data import tokenizer as tokenizers
from gpt4o_jax.data.batches import make_batch
from gpt4o_jax.data.rows import ROWS
from gpt4o_jax.data.tokenizer import byte_lengths, byte_tokenizer
from gpt4o_jax.errors import ExitCode, RunError
from gpt4o_jax.evaluation import generation
from gpt4o_jax.evaluation.perplexity import cached_documents, holdouts, window_batch, windows
from gpt4o_jax.tasks import chat
from gpt4o_jax.tasks.item import Item
from gpt4o_jax.tasks.readers import READERS
from gpt4o_jax.tasks.worlds import WORLDS
from tests.data import numbered_squad
from tests.data.numbered_squad import SQUAD

T = 96
BYTES = byte_tokenizer()
END = BYTES.special("<|end_of_turn|>")


def turns(i: int) -> list[tuple[str, str]]:
    """One to three exchanges, with or without a system text; all answers are distinct."""
    said = [("system", "count")] if i % 3 == 0 else []
    for n in range(1 + i % 3):
        said += [("user", f"{i}.{n}?" * (1 + i % 2)), ("assistant", f"É{i:03}{n}")]
    return said


TURNS = [turns(i) for i in range(120)]
ANSWERS = [text for said in TURNS for role, text in said if role == "assistant"]


def write(path, talks):
    lines = ({"messages": [{"role": role, "content": text} for role, text in said]} for said in talks)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def made(tmp_path):
    """Knobs -> the config and corpus of TURNS."""
    write(tmp_path / "talks.jsonl", TURNS)

    def make(model=T, **data):
        data = {"source": "conversations", "path": str(tmp_path / "talks.jsonl"), "cache_dir": str(tmp_path / "cache")} | data
        data = {"shingle_bytes": 0, "rows": "first_fit", "holdout_fraction": 0.2} | data
        config = freeze({"model": {"context_length": model}, "tokenizer": {"kind": "byte"}, "data": data})
        return config, corpus.prepare(config)

    return make


def refusal(call, *args, code=ExitCode.DATA) -> str:
    with pytest.raises(RunError) as e:
        call(*args)
    assert e.value.code == code and "\n" not in str(e.value)
    return str(e.value)


# ---------------------------------------------------------------- round trip

BPE = tokenizers.train("bpe", 420, [f"{i} bottles say <|user|> and <|end_of_turn|> in words;\n" * 3 for i in range(40)])
LOOK_ALIKES = st.sampled_from([*tokenizers.SPECIALS, "<0x41>", "\u2581", "\0", " ", "\n", "naïve"])
said = st.lists(st.one_of(LOOK_ALIKES, st.characters(exclude_categories=["Cs"])), max_size=8).map("".join)


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["byte", "bpe"])
@settings(deadline=None, max_examples=60)
@given(turns=st.lists(st.tuples(st.sampled_from(chat.ROLES), said), min_size=1, max_size=5))
def test_turns_come_back_whatever_is_said_in_them(tokenizer, turns):
    messages = tuple(chat.say(role, text) for role, text in turns)
    encode = conversations.encoder(DataConfig(source="conversations", path="x"), tokenizer)
    ids, counts = encode(conversations.Conversation(Item(messages, (), ""), "x.jsonl:1"))
    opens = {tokenizer.special(f"<|{role}|>"): role for role in chat.ROLES}
    end, found = tokenizer.special("<|end_of_turn|>"), []
    assert ids[0] == tokenizer.symbols.bos and not counts[0]
    for i, counted in zip(ids[1:], counts[1:], strict=True):
        if i in opens:
            found.append((opens[i], []))
            assert not counted
        else:
            found[-1][1].append(i)
            assert counted == (found[-1][0] == "assistant")
    assert all(of[-1] == end and end not in of[:-1] for _, of in found)
    assert [(role, tokenizer.decode(of[:-1])) for role, of in found] == [(role, f" {text}") for role, text in turns]


# ---------------------------------------------------------------- what the loss counts


def counted_texts(batch) -> list[str]:
    """The texts of counted targets; each must finish with an end of turn."""
    found = []
    for targets, weights in zip(batch.targets, batch.weights, strict=True):
        ids = []
        for target, weight in zip(targets.tolist(), weights.tolist(), strict=True):
            if weight and target == END:
                found.append(chat.template("own").said(BYTES.decode(ids)))
                ids = []
            elif weight:
                ids.append(target)
        assert not ids
    return found


def test_the_loss_counts_answers_and_what_ends_them_once_an_epoch(made):
    config, found = made()
    rows = corpus.training_rows(config, found)
    batch = make_batch([rows[i] for i in range(rows.rows_per_epoch)])
    held = [d.item for d in sources.split(sources.load(config.data), config.data)[1]]
    kept = sorted(set(ANSWERS) - {m.text for item in held for m in item.messages if m.role == "assistant"})
    assert held and sorted(counted_texts(batch)) == kept
    counted_bytes = (byte_lengths(BYTES)[batch.targets] * batch.weights).sum()
    assert counted_bytes == sum(len(f" {a}".encode()) for a in kept), "bytes of the tokens that count, and of no others"


@pytest.mark.parametrize("kind", ROWS)
def test_every_kind_of_row_counts_the_same_tokens(made, kind):
    config, found = made(rows=kind)
    rows, cache = corpus.training_rows(config, found), found.members[0].training
    counts = {tuple(cache.tokens[i : i + 9].tolist()): int(cache.counts[i + 8]) for i in range(cache.token_count - 8)}
    batch = make_batch([rows[i] for i in range(40)])
    checked = 0
    for tokens, targets, weights, segments in zip(batch.tokens, batch.targets, batch.weights, batch.segments, strict=True):
        for t in range(8, T - 1):
            if segments[t - 7] == segments[t] == segments[t + 1] != 0:
                checked += 1
                assert weights[t] == counts[(*tokens[t - 7 : t + 1].tolist(), int(targets[t]))]
    assert checked > 1000 and 0 < batch.weights.sum() < batch.weights.size / 2


def test_all_tokens_count_where_that_is_asked_for(made):
    config, found = made(loss_on="all")
    rows = corpus.training_rows(config, found)
    batch = make_batch([rows[i] for i in range(rows.rows_per_epoch)])
    assert batch.weights.sum() == found.members[0].training.token_count - found.members[0].training.documents  # all but <bos>


def test_texts_and_conversations_in_one_batch(made, tmp_path):
    (tmp_path / "x.txt").write_text("\n".join(f"plain text number {i} {i * i}" for i in range(200)))
    path = tmp_path / "talks.jsonl"
    config, found = made(
        source="mixture", path="", separator="\n", mixture=(f"text:{tmp_path}/x.txt=1", f"conversations:{path}=1")
    )
    rows = corpus.training_rows(config, found)
    assert [len(m[0]) for m in rows.members] == [2, 3]
    for i in range(20):
        batch, member = make_batch([rows[i]]), rows.locate(i)[0]
        inside = (batch.segments[:, 1:] == batch.segments[:, :-1]) & (batch.segments[:, 1:] > 0)
        assert (batch.weights[:, :-1] == inside).all() == (member == 0)
    named = holdouts(found)
    assert list(named) == [f"text:{tmp_path}/x.txt", f"conversations:{path}"]
    assert all(named.values())


def test_held_out_answers_are_scored_and_nothing_else(made):
    config, found = made()
    held = [d.item for d in sources.split(sources.load(config.data), config.data)[1]]
    documents = list(cached_documents(found.members[0].holdout, BYTES))
    assert len(documents) == len(held) > 10
    for (ids, counts), item in zip(documents, held, strict=True):
        rows = [(*w, c) for w, (c, *_) in zip(windows(ids, 16, 8), windows(counts, 16, 8), strict=True)]
        batch = window_batch(rows, 16)
        scored = batch.targets[batch.weights > 0].tolist()
        expected = [i for m in item.messages if m.role == "assistant" for i in (*BYTES.encode(f" {m.text}"), END)]
        assert scored == expected


def test_a_conversation_too_long_loses_its_end_and_one_without_an_answer_in_reach_is_left_out(made, tmp_path):
    talks = [
        [("user", "a" * 10), ("assistant", "b" * 100)],
        [("user", "c" * 100), ("assistant", "d")],
        [("user", "e"), ("assistant", "f")],
    ]
    path = write(tmp_path / "long.jsonl", talks * 20)
    config, found = made(path=str(path), rows="first_fit", holdout_fraction=0.5)
    rows = corpus.training_rows(config, found)
    told = {c for i in range(rows.rows_per_epoch) for c in BYTES.decode(rows[i][0].tolist()) if c.isalpha()}
    trained = {d.item.messages[0].text[0] for d in sources.split(sources.load(config.data), config.data)[0]}
    assert told == {letter for pair in ("ab", "ef") for letter in pair if pair[0] in trained}
    lengths = np.diff(found.members[0].training.offsets)
    (told,) = found.too_long(T)
    assert f"{np.sum(lengths > T + 1)} of {len(lengths)} conversations are longer than model.context_length={T}" in told
    assert f"--config.model.context_length={lengths.max() - 1}" in told and not found.too_long(int(lengths.max()) - 1)
    path = write(tmp_path / "long.jsonl", [[("user", f"{i}" + "c" * 100), ("assistant", "d")] for i in range(40)])
    config, found = made(path=str(path))
    assert f"within its first {T + 1} tokens" in refusal(corpus.training_rows, config, found)


# ---------------------------------------------------------------- worlds


def test_the_hold_out_of_a_world_are_its_held_out_items(made):
    config, found = made(source="world", path="numbers", world_items=300, model=256)
    member, world = found.members[0], WORLDS["numbers"]
    assert (member.training.documents, member.holdout.documents) == (300, 60)
    encode = conversations.encoder(config.data, BYTES)
    items = {False: conversations.WorldItems(world, 60, False), True: sources.apart(config.data)}
    for cache, held_out in ((member.training, False), (member.holdout, True)):
        for i in (0, 7, 59):
            ids, counts = encode(items[held_out][i])
            assert cache.document(i).tolist() == ids and cache.counted(i).tolist() == counts
    report = corpus_report.report(config)["total"]
    assert (report["documents"], report["near_duplicates_dropped"]) == (360, 0)


def test_docstrings_are_withheld_as_their_documents_are(made):
    data = DataConfig(source="world", path="docstrings", world_items=300)
    held = [d for d in python_docs.documents() if sources.is_held(d, data.holdout_fraction)]
    of = lambda items: {d.item.answer for d in items}
    training, apart = of(sources.load(data)), of(sources.apart(data))
    assert apart and not training & apart
    assert all(any(document.startswith(answer) for document in held) for answer in apart)


def test_worlds_are_named_by_their_items(made):
    names = [made(source="world", path=p, world_items=n)[1].name for p, n in (("numbers", 50), ("numbers", 60), ("numbers", 50))]
    assert names[0] == names[2] != names[1]


def test_text_that_repeats_held_out_items_is_dropped_but_no_items_for_their_form(made, tmp_path):
    held = [conversations.Conversation(WORLDS["numbers"].item(0, i, True), f"item {i}") for i in range(10)]
    texts = [str(d) for d in held if len(d) > 60] + [" ".join(str(i * i * j) for j in range(20)) for i in range(3, 43)]
    (tmp_path / "x.txt").write_text("\n\n".join(texts))
    _, found = made(
        source="mixture", path="", separator="\n\n", shingle_bytes=50, world_items=200,
        mixture=(f"text:{tmp_path}/x.txt=1", "world:numbers=1"),
    )  # fmt: skip
    text, world = found.members
    assert world.training.documents == 200
    said = [BYTES.decode(text.training.document(d)) for d in range(text.training.documents)]
    assert said and not any("Translate" in s for s in said)


# ---------------------------------------------------------------- datasets, by a reader


@pytest.fixture(scope="module")
def squad(tmp_path_factory):
    return numbered_squad.write(tmp_path_factory.mktemp("squad"))


@pytest.mark.parametrize("source", ["jsonl", "parquet", "tfds"])
def test_records_of_a_dataset_are_conversations(squad, source):
    paths = (
        [f"{squad}/{name}.{source}" for name in "xv"]
        if source != "tfds"
        else [f"numbered_squad:{s}" for s in ("train", "validation")]
    )
    data = DataConfig(source=source, path=paths[0], holdout_path=paths[1], reader="squad", tfds_dir=str(squad))
    expected = [READERS["squad"](record) for record in SQUAD]
    assert [d.item for d in sources.load(data)] == expected[:30] and [d.item for d in sources.apart(data)] == expected[30:]
    (task,) = generation.tasks(["holdout"], data, 5)
    assert task.items == [item for i, item in enumerate(expected[30:]) if i % 3 < 2][:5] and task.metrics[0] == "squad_f1"


def test_a_member_of_a_mixture_names_its_reader(squad, made):
    members = (
        f"jsonl:{squad}/x.jsonl@reader:squad=1",
        f"parquet:{squad}/x.parquet@question=1",
        f"jsonl:{squad}/v.jsonl@context=2",
    )
    _, found = made(source="mixture", path="", mixture=members, model=96)
    assert [m.data.reader for m in found.members] == ["squad", "", ""]
    assert [m.training.counts is None for m in found.members] == [False, True, True]
    assert found.members[0].name == f"jsonl:{squad}/x.jsonl@reader:squad"


def test_records_that_are_none_of_the_dataset_are_told_by_place_and_field(squad, tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps(SQUAD[0]) + "\n" + json.dumps(SQUAD[1] | {"question": 3}) + "\n")
    data = DataConfig(source="jsonl", path=str(tmp_path / "x.jsonl"), reader="squad")
    assert f"{tmp_path}/x.jsonl:2: question: got 3, expected a text" in refusal(lambda: list(sources.load(data)))
    data = DataConfig(source="parquet", path=f"{squad}/x.parquet", reader="xsum")
    assert "x.parquet: row 0 of row group 0: document: missing" in refusal(lambda: list(sources.load(data)))
    data = DataConfig(source="tfds", path="squad/v1.1:train", reader="squad", tfds_dir=str(tmp_path))
    assert f"python -m gpt4o_jax data prepare --tfds=squad/v1.1 --data_dir={tmp_path}" in refusal(lambda: sources.load(data))


# ---------------------------------------------------------------- where they come from


def test_a_validation_split_may_be_held_out(made, tmp_path):
    path = write(tmp_path / "validation.jsonl", [[("user", "v"), ("assistant", f"w{i}")] for i in range(5)])
    _, found = made(holdout_path=str(path))
    assert found.members[0].training.documents == len(TURNS) and found.members[0].holdout.documents == 5
    other = write(tmp_path / "other.jsonl", [[("user", "v"), ("assistant", "x")]])
    assert made(holdout_path=str(other))[1].name != found.name != made()[1].name


def test_a_conversation_that_repeats_the_validation_split_is_dropped_by_either_way_to_hold_it_out(made, tmp_path):
    talk = lambda i: [("user", f"How many of {i}?"), ("assistant", " ".join(str(i * j) for j in range(30)))]
    path = write(tmp_path / "training.jsonl", [talk(i) for i in range(3, 13)])
    held = write(tmp_path / "validation.jsonl", [talk(7), talk(20)])
    kept = {size: made(path=str(path), holdout_path=str(held), shingle_bytes=size)[1].members[0] for size in (0, 50)}
    assert {size: member.training.documents for size, member in kept.items()} == {0: 10, 50: 9}, "and another cache"
    assert {member.holdout.documents for member in kept.values()} == {2}


def test_an_empty_line_at_the_end_is_no_conversation(made, tmp_path):
    path = write(tmp_path / "validation.jsonl", [[("user", "v"), ("assistant", f"w{i}")] for i in range(5)])
    path.write_text(path.read_text() + "\n")
    assert made(holdout_path=str(path))[1].members[0].holdout.documents == 5


def test_what_a_template_cannot_say_is_told_by_file_and_line(made, tmp_path):
    bad = [("system", "s"), ("user", "a"), ("assistant", "b"), ("assistant", "two in a row")]
    path = write(tmp_path / "x.jsonl", [[("user", f"{i}"), ("assistant", "b")] for i in range(30)] + [bad])
    path.write_text("\n" + path.read_text())  # an empty line counts as a line
    told = refusal(lambda: made(path=str(path), template="mistral", holdout_fraction=0.3))
    assert f"{path}:32: chat template mistral: message 3 is of role assistant, expected user" in told


def test_where_no_conversation_is_held_out_what_mends_it_is_told(made, tmp_path):
    path = write(tmp_path / "x.jsonl", [[("user", "a"), ("assistant", "b")]] * 9)
    place = int.from_bytes(hashlib.sha256(b"a\nb").digest()[:8], "big") / 2**64  # all nine fall on the same side
    for share, told in ((place - 0.01, "hold-out is empty"), (place + 0.01, "hold-out took every one")):
        message = refusal(lambda share=share: made(path=str(path), holdout_fraction=share))
        assert told in message and "data.holdout_path" in message and "separator" not in message and "tail" not in message


def test_a_cache_is_opened_again_as_it_was_and_damage_is_told(made, tmp_path):
    (first,), (again,) = made()[1].members, made()[1].members
    np.testing.assert_array_equal(first.training.counts, again.training.counts)
    (folder,) = (p for p in (tmp_path / "cache" / "tokens").iterdir() if p.name.endswith("training"))
    (folder / "counts.bin").write_bytes(b"")
    assert "damaged token cache" in refusal(token_cache.open_cache, folder)


def test_conversations_are_told_apart_by_how_they_are_written_and_counted(made):
    names = {made(**knobs)[1].name for knobs in ({}, {"template": "plain"}, {"loss_on": "all"}, {"template": "own"})}
    assert len(names) == 4


GOOD = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
BROKEN = [
    ("{", ":2: not JSON"),
    ("[]", ":2: a JSON list, expected an object with the key 'messages'"),
    ("{}", ":2: messages: expected a list of turns, got None (there are no keys)"),
    ('{"text": "x"}', "(there are 'text')"),
    ('{"messages": []}', ":2: messages: expected a list of turns, got []"),
    ('{"messages": ["x"]}', ":2: messages: message 0: role None"),
    ('{"messages": [{"role": "usr", "content": "x"}]}', ":2: messages: message 0: role 'usr' (did you mean user?)"),
    ('{"messages": [{"role": "user", "content": 3}]}', ":2: messages: message 0: content is 3; expected a text"),
    (json.dumps({"messages": GOOD[:1]}), ":2: messages: the last is of role user, expected assistant"),
    (json.dumps({"messages": GOOD[:1], "chosen": "a", "rejected": "b"}), "is learned; chosen and rejected make preference pairs"),
    (json.dumps({"messages": GOOD, "references": []}), ":2: references: expected a list of texts, got []"),
    (json.dumps({"messages": GOOD, "references": [1]}), ":2: references: expected a list of texts"),
    (json.dumps({"messages": GOOD, "slice": 1}), ":2: slice: expected a text, got 1"),
    (json.dumps({"messages": GOOD, "slice": "all"}), ":2: slice: 'all' is the row of all items"),
    ('{"messages": [{"role": "assistant", "content": "\\ud800"}]}', ":2: message 0: content: not valid Unicode: lone surr"),
    (
        '{"messages": [{"role": "assistant", "content": "a"}], "references": ["\\ud800"]}',
        ":2: references: not valid Unicode: lone surr",
    ),
    (json.dumps({"messages": GOOD, "tools": [{"name": "f"}]}), ":2: tools: no template here writes them; put them into a system"),
]


@pytest.mark.parametrize(("line", "fragment"), BROKEN)
def test_broken_conversations_are_told_by_file_line_and_field(tmp_path, line, fragment):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"messages": GOOD}) + "\n" + line + "\n")
    message = refusal(lambda: list(sources.load(DataConfig(source="conversations", path=str(path)))))
    assert str(path) in message and fragment in message


def test_in_every_template_the_end_of_a_turn_is_learned(made, tmp_path):
    """Even for an empty turn; with plain turns, the end is the end of the text."""
    path = write(tmp_path / "silent.jsonl", [[("user", f"{i}"), ("assistant", "")] for i in range(40)])
    for template, end in (("own", END), ("plain", BYTES.symbols.eos[0])):
        cache = made(path=str(path), template=template)[1].members[0].training
        assert {int(i) for i, c in zip(cache.tokens, cache.counts, strict=True) if c} <= {end, *BYTES.encode(" ")}
        assert np.sum(cache.tokens[cache.counts > 0] == end) == cache.documents


CONFIGS = [
    ({"reader": "squad"}, "data.reader=squad is for data.source=jsonl, parquet or tfds, got python_docs"),
    ({"source": "mixture", "mixture": ("python_docs=1",), "reader": "squad"}, "write @reader:NAME behind the path of a member"),
    ({"template": "own"}, "data.template=own does nothing without conversations"),
    ({"loss_on": "all"}, "data.loss_on=all does nothing without conversations"),
    ({"source": "world"}, "data.source=world needs it: --config.data.path=NAME"),
    ({"source": "world", "path": "numbers", "lanes": 2, "shingle_bytes": 0}, "lanes read texts, and world gives conversations"),
    ({"source": "conversations", "path": "x", "holdout": "tail", "shingle_bytes": 0}, "data.holdout=tail cuts documents"),
    ({"source": "world", "path": "numbers", "holdout_path": "x"}, "data.source=world has hold-outs of its own"),
    (
        {"source": "text", "path": "x", "holdout_path": "y", "holdout": "tail", "shingle_bytes": 0},
        "takes the place of data.holdout=tail",
    ),
    (
        {"source": "text", "path": "x", "holdout_path": "y", "lanes": 2, "shingle_bytes": 0},
        "data.holdout_path=y needs the whole text",
    ),
]


@pytest.mark.parametrize(("data", "fragment"), CONFIGS)
def test_knobs_that_do_not_go_together(data, fragment):
    assert fragment in refusal(freeze, {"data": data}, code=ExitCode.USAGE)


@pytest.mark.parametrize(
    ("knobs", "fragment"),
    [
        ({"source": "world", "path": "nubmers"}, "world 'nubmers' does not exist (did you mean numbers?)"),
        ({"source": "jsonl", "path": "x", "reader": "sqad"}, "config.data.reader='sqad' does not exist (did you mean squad?)"),
    ],
)
def test_names_that_do_not_exist(knobs, fragment):
    assert fragment in refusal(
        conversations.taker if "reader" in knobs else sources.load, DataConfig(**knobs), code=ExitCode.USAGE
    )


def test_a_run_talks_as_it_was_trained():
    trained = lambda **knobs: conversations.trained_template(freeze({"data": knobs}).data, BYTES)
    assert trained() == "" and trained(source="world", path="numbers") == "own"
    assert trained(source="mixture", mixture=("python_docs=1", "world:numbers=1"), template="plain") == "plain"


def test_a_template_that_the_tokenizer_cannot_write(made):
    told = refusal(lambda: made(template="llama3"))
    assert "chat template llama3 writes <|start_header_id|>" in told and "take --config.data.template=own or llama2" in told
    assert "chat template 'lama3' (did you mean llama3?)" in refusal(lambda: made(template="lama3"), code=ExitCode.USAGE)


def test_tokens_are_named_by_the_turns_of_the_tokenizers_model(made):
    """Two published tokenizers with the same pieces but different chat templates."""
    config, found = made()
    again = byte_tokenizer()
    again.template = "plain"
    other = corpus.prepare(config, again)
    assert other.name != found.name
    assert other.members[0].training.token_count < found.members[0].training.token_count, "plain has no symbols of turns"
    said = made(template="own")[0]
    assert corpus.prepare(said, again).name == corpus.prepare(said, BYTES).name, "where the template is said, it is that one"


def test_a_tokenizer_learns_words_as_turns_write_them(made):
    config, _ = made()
    documents = conversations.AsWritten(sources.load(config.data))
    assert documents[3] == "\n".join(f" {text}" for _, text in TURNS[3]) and len(documents) == len(TURNS)


def test_of_a_world_few_held_out_items_are_counted():
    data = DataConfig(source="world", path="numbers", world_items=100_000)
    assert len(sources.apart(data)) == sources.HELD_ITEMS < len(sources.load(data))
    docstrings = sources.apart(DataConfig(source="world", path="docstrings", world_items=100_000))
    assert len({d.item.answer for d in docstrings}) == len(docstrings)
