"""A mixture keeps its shares from the first row on, reads each member in order, and keeps every hold-out clean."""

import collections
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt4o_jax import config_mixture
from gpt4o_jax.config import freeze
from gpt4o_jax.data import corpus, mixture
from gpt4o_jax.data.rows import ROWS, MixtureRows, make_rows
from gpt4o_jax.errors import ExitCode, RunError
from tests.data.test_rows import cache_of


class Counting:
    """A member whose row i is i."""

    T, tokens_per_epoch, fill = 1, 10, 1.0

    def __getitem__(self, row):
        return row


weight_lists = st.lists(st.fractions(Fraction(1, 1000), 1000), min_size=1, max_size=5)


def mixed(weights, seed=0) -> MixtureRows:
    return MixtureRows([Counting()] * len(weights), [w / sum(weights) for w in weights], seed)


# ---------------------------------------------------------------- which member gives row i


@settings(deadline=None)
@given(weight_lists, st.integers(0, 5))
def test_each_member_gives_its_rows_in_order_without_gaps_and_its_share_at_every_point(weights, seed):
    rows, counts = mixed(weights, seed), collections.Counter()
    for i in range(300):
        member, row = rows.locate(i)
        assert row == counts[member]
        counts[member] += 1
        for m, w in enumerate(weights):
            assert abs(counts[m] - w / sum(weights) * (i + 1)) < len(weights)


@settings(deadline=None)
@given(weight_lists, st.integers(0, 5), st.integers(0, 10**12))
def test_any_position_is_reached_at_once_and_agrees_with_its_neighbours(weights, seed, start):
    rows = mixed(weights, seed)
    here = [rows.locate(i) for i in range(start, start + 50)]
    for m in range(len(weights)):
        own = [row for member, row in here if member == m]
        assert own == list(range(own[0], own[0] + len(own))) if own else True
        if own:
            assert abs(own[0] - weights[m] / sum(weights) * start) < len(weights) + 50


def test_the_seed_and_nothing_else_moves_the_pattern():
    weights = [Fraction(7), Fraction(2), Fraction(1)]
    patterns = [[mixed(weights, seed).locate(i)[0] for i in range(40)] for seed in (0, 0, 1, 2)]
    assert patterns[0] == patterns[1] and patterns[1] != patterns[2] != patterns[3]


def test_a_batch_holds_every_member_in_its_share():
    rows = mixed([Fraction(6), Fraction(3), Fraction(1)])
    for step in range(200):
        counts = collections.Counter(rows.locate(step * 100 + i)[0] for i in range(100))
        assert all(abs(counts[m] - share) <= 3 for m, share in enumerate((60, 30, 10)))


@pytest.mark.parametrize("kind", ROWS)
def test_rows_are_those_of_the_members(kind):
    caches, shares = [cache_of([9, 30, 12]), cache_of([50, 20], first=10_000)], [Fraction(1, 4), Fraction(3, 4)]
    rows = make_rows(ROWS[kind], caches, shares, 8, seed=3)
    alone = [ROWS[kind](cache, 8, seed=3 + m * 2**31) for m, cache in enumerate(caches)]
    for i in [*range(50), 10**6, 10**9]:
        member, row = rows.locate(i)
        np.testing.assert_array_equal(rows[i], alone[member][row])
    assert rows.tokens_per_epoch == sum(r.tokens_per_epoch for r in alone)
    assert type(make_rows(ROWS[kind], caches[:1], [Fraction(1)], 8, 3)) is ROWS[kind]


# ---------------------------------------------------------------- how it is written

ENTRIES = [
    ("python_docs=0.7", ("python_docs", "", "", Fraction(7, 10))),
    ("text:my texts/=1", ("text", "my texts/", "", Fraction(1))),
    ("text:a=b@c.txt=2e-3", ("text", "a=b@c.txt", "", Fraction(1, 500))),
    ("jsonl:web/**/*.jsonl=3", ("jsonl", "web/**/*.jsonl", "", Fraction(3))),
    ("jsonl:web/x.jsonl@body=3", ("jsonl", "web/x.jsonl", "body", Fraction(3))),
    ("jsonl:at@home/x.jsonl=3", ("jsonl", "at@home/x.jsonl", "", Fraction(3))),
    ("parquet:gs://bucket/x@text=1", ("parquet", "gs://bucket/x", "text", Fraction(1))),
    ("tfds:wiki40b/en:train[:90%]+test=0.1", ("tfds", "wiki40b/en:train[:90%]+test", "", Fraction(1, 10))),
    ("tfds:squad:train@context=.5", ("tfds", "squad:train", "context", Fraction(1, 2))),
]


@pytest.mark.parametrize(("entry", "expected"), ENTRIES)
def test_entries(entry, expected):
    assert tuple(config_mixture.parse(entry)) == expected


MISTAKES = [
    ("python_docs", "has no weight; expected SOURCE:PATH=WEIGHT"),
    ("", "has no weight"),
    ("text:a", "has no weight"),
    ("python_docs=", "weight '', expected a number from 1e-9 to 1e9"),
    ("python_docs=much", "weight 'much', expected a number"),
    ("python_docs=0", "weight '0', expected a number"),
    ("python_docs=-1", "weight '-1', expected a number"),
    ("python_docs=nan", "weight 'nan', expected a number"),
    ("python_docs=inf", "weight 'inf', expected a number"),
    ("python_docs=1e999999999", "expected a number from"),
    ("python_doc=1", "unknown source 'python_doc' (did you mean python_docs?)"),
    ("notes.txt=1", "unknown source 'notes.txt'"),
    ("mixture:x=1", "unknown source 'mixture'"),
    ("python_docs:x=1", "expected python_docs=WEIGHT, without a path"),
    ("text=1", "expected text:PATH=WEIGHT"),
    ("jsonl:=1", "expected jsonl:PATH=WEIGHT"),
    ("tfds:=1", "expected tfds:NAME/CONFIG:SPLIT=WEIGHT"),
    ("jsonl:x@=1", "nothing after @"),
    ("parquet:@text=1", "expected parquet:PATH=WEIGHT"),
]


@pytest.mark.parametrize(("entry", "fragment"), MISTAKES)
def test_mistakes_are_told_when_the_config_is_read(entry, fragment):
    with pytest.raises(RunError) as e:
        freeze({"data": {"source": "mixture", "mixture": ("python_docs=1", entry)}})
    assert e.value.code == ExitCode.USAGE and fragment in str(e.value) and f"{entry!r}" in str(e.value)


@pytest.mark.parametrize(
    ("data", "fragment"),
    [
        ({"mixture": ("python_docs=1",)}, "needs data.source=mixture, got data.source=python_docs"),
        ({"source": "mixture"}, "config.data.mixture is empty"),
        ({"source": "mixture", "mixture": ("python_docs=1",), "path": "x"}, "set data.path=''"),
        (
            {"source": "mixture", "mixture": ("text:a=1", "text:b=1", "text:a=2")},
            "'text:a=2' names a member that is there",
        ),
        (
            {"source": "mixture", "mixture": ("jsonl:a=1", "jsonl:a@text=2", "jsonl:a@body=2")},
            "'jsonl:a@text=2' names a member that is there",
        ),
    ],
)
def test_knobs_that_contradict_each_other(data, fragment):
    with pytest.raises(RunError) as e:
        freeze({"data": data})
    assert e.value.code == ExitCode.USAGE and fragment in str(e.value)


# ---------------------------------------------------------------- a corpus of several sources


def sentences(word, n):
    return [f"{word} {i} " + " ".join(str(i * j) for j in range(12)) for i in range(n)]


@pytest.fixture
def files(tmp_path):
    """a.txt and b.txt, one document per line; b repeats all of a's."""
    texts = {"a": sentences("alpha", 200), "b": sentences("beta", 300) + [d + " copied" for d in sentences("alpha", 200)]}
    for name, documents in texts.items():
        (tmp_path / f"{name}.txt").write_text("\n".join(documents))
    return texts


def config_of(tmp_path, *entries, kind="byte", **data):
    knobs = {"cache_dir": str(tmp_path / "cache"), "separator": "\n", "holdout_fraction": 0.2, **data}
    written = tuple(f"text:{tmp_path}/{name}.txt={weight}" for name, weight in entries)
    return freeze({"tokenizer": {"kind": kind}, "data": {"source": "mixture", "mixture": written, **knobs}})


def documents_of(made, cache):
    return [made.tokenizer.decode(cache.document(d)) for d in range(cache.documents)]


def test_members_have_their_own_tokens_and_hold_outs(files, tmp_path):
    made = corpus.prepare(config_of(tmp_path, ("a", 1), ("b", 3), shingle_bytes=0))
    assert [m.share for m in made.members] == [Fraction(1, 4), Fraction(3, 4)]
    for member, name in zip(made.members, "ab", strict=True):
        parts = documents_of(made, member.training), documents_of(made, member.holdout)
        assert sorted(parts[0] + parts[1]) == sorted(files[name]) and len(parts[1]) > 10


def test_no_member_may_be_trained_on_what_another_holds_out(files, tmp_path):
    made = corpus.prepare(config_of(tmp_path, ("a", 1), ("b", 1), shingle_bytes=30, shingle_share=0.5))
    held = {d for m in made.members for d in documents_of(made, m.holdout) if d.startswith("alpha")}
    training = [d for m in made.members for d in documents_of(made, m.training)]
    assert held and not any(d.removesuffix(" copied") in held or f"{d} copied" in held for d in training)
    assert len(training) > 300


def test_the_name_depends_on_members_and_shares_and_the_tokens_are_made_once(files, tmp_path):
    names = [
        corpus.prepare(config_of(tmp_path, *entries, shingle_bytes=0)).name
        for entries in ([("a", 1), ("b", 1)], [("a", 1), ("b", 2)], [("b", 1), ("a", 1)], [("a", 1)], [("a", 2), ("b", 2)])
    ]
    assert len(set(names[:4])) == 4 and names[4] == names[0], "only the ratio counts"
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 4


def test_the_tokenizer_learns_from_all_members_and_reads_all_their_characters(files, tmp_path):
    (tmp_path / "c.txt").write_text("\n".join(f"γάμμα {i}" for i in range(60)))
    made = corpus.prepare(config_of(tmp_path, ("a", 1), ("c", 1), kind="char", shingle_bytes=0))
    assert made.tokenizer.decode(made.tokenizer.encode("alpha γάμμα")) == "alpha γάμμα"


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=30), min_size=1, max_size=4),
    st.data(),
    st.sampled_from([50, 10_000]),
)
def test_the_tokenizer_sees_members_in_the_ratio_of_their_shares(lengths, data, limit):
    parts = [[chr(97 + m) * n for n in part] for m, part in enumerate(lengths)]
    weights = data.draw(st.lists(st.integers(1, 9), min_size=len(parts), max_size=len(parts)))
    shares = [Fraction(w, sum(weights)) for w in weights]
    chosen = list(mixture.fair_text(parts, shares, limit))
    total = min(limit, sum(map(sum, lengths)))
    for m, share in enumerate(shares):
        here = sum(len(d) for d in chosen if d[0] == chr(97 + m))
        assert abs(here - share * total) <= 1
    if len(parts) == 1 and total < limit:
        assert chosen == parts[0], "one source: its text as it is"
