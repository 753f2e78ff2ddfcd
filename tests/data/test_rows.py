"""Row i of the run depends on (seed, i) and nothing else; packing loses nothing; resuming is exact at every position."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt4o_jax.data import packing
from gpt4o_jax.data.batches import dispatches, make_batch
from gpt4o_jax.data.rows import ROWS, FirstFitRows, PackedRows, WindowRows, random_bits
from gpt4o_jax.data.token_cache import TokenCache
from gpt4o_jax.data.tokenizer import BOS, EOS, PAD
from gpt4o_jax.errors import ExitCode, RunError


def cache_of(lengths, first: int = 100) -> TokenCache:
    """Documents <bos> first first+1 ... <eos> of these total lengths; all tokens in between are distinct."""
    documents, at = [], first
    for n in lengths:
        documents += [BOS, *range(at, at + n - 2), EOS]
        at += n - 2
    tokens = np.array(documents, np.uint32)
    return TokenCache(tokens, np.cumsum([0, *lengths]).astype(np.int64), len(tokens))


CACHE = cache_of([7, 2, 40, 3, 11, 5, 18, 2, 9])  # 97 tokens: some documents shorter, some longer than a row
PUBLISHED_BITS = [5095610196844313600, 8614008028692990056, 17160774760686499100, 15496799253380648371]
lengths_lists = st.lists(st.integers(2, 30), min_size=1, max_size=12).filter(lambda x: sum(x) > 12)


# ---------------------------------------------------------------- a pure function of (seed, row)


@pytest.mark.parametrize("kind", ROWS)
def test_rows_do_not_depend_on_order_or_object(kind):
    T, n = 8, 60
    in_order = ROWS[kind](CACHE, T, seed=3)
    forward = [in_order[i] for i in range(n)]
    for i in np.random.default_rng(0).permutation(n):
        for row in (in_order[i], ROWS[kind](CACHE, T, seed=3)[int(i)]):
            np.testing.assert_array_equal(row, forward[i])


@pytest.mark.parametrize("kind", ROWS)
def test_rows_have_the_promised_shape_and_type_and_their_seed_matters(kind):
    rows, other = ROWS[kind](CACHE, 8, seed=0), ROWS[kind](CACHE, 8, seed=1)
    for i in range(20):
        tokens, segments = rows[i]
        assert tokens.shape == segments.shape == (9,)
        assert tokens.dtype == segments.dtype == np.int32
        padding = np.count_nonzero(segments == 0)
        assert segments[0] == 1 and set(np.diff(segments[: 9 - padding])) <= {0, 1}
        assert not segments[9 - padding :].any() and not tokens[9 - padding :].any()
        assert kind == "first_fit" or not padding
    assert any((rows[i][0] != other[i][0]).any() for i in range(20))


@pytest.mark.parametrize("kind", ROWS)
def test_the_millionth_row_needs_no_row_before_it(kind):
    rows = ROWS[kind](CACHE, 8, seed=0)
    np.testing.assert_array_equal(rows[10**6], ROWS[kind](CACHE, 8, seed=0)[10**6])
    step, batch = next(dispatches(rows, 10**6, 10**6 + 4, K=2, B=3, prefetch=1))
    assert step == 10**6 + 2
    np.testing.assert_array_equal(batch.tokens[0, 1], rows[3 * 10**6 + 1][0][:-1])


def test_random_bits_are_fixed_for_good_and_look_random():
    """Another NumPy or machine must give the same data order."""
    assert random_bits(0, [0, 1]).tolist() == [random_bits(0, 0).item(), random_bits(0, 1).item()]
    assert [random_bits(s, i).item() for s, i in ((0, 0), (0, 1), (1, 0), (2**31 - 1, 2**40))] == PUBLISHED_BITS
    bits = np.concatenate([random_bits(seed, np.arange(1000)) for seed in range(10)])
    assert len(np.unique(bits)) == len(bits)
    ones = np.unpackbits(bits.view(np.uint8)).mean()
    assert abs(ones - 0.5) < 0.005


# ---------------------------------------------------------------- packed rows


def brute_force(cache: TokenCache, T: int, seed: int, epoch: int):
    """This epoch's documents end to end, cut into rows of T + 1: (tokens, running document number)."""
    order = PackedRows(cache, T, seed)._order(epoch)[0]
    stream = np.concatenate([cache.document(d) for d in order]).astype(np.int32)
    number = np.concatenate([np.full(len(cache.document(d)), i) for i, d in enumerate(order)])
    for begin in range(0, len(stream) - T, T):
        part = number[begin : begin + T + 1]
        yield stream[begin : begin + T + 1], part - part[0] + 1


@settings(deadline=None)
@given(lengths_lists, st.integers(2, 12), st.integers(0, 5), st.integers(0, 3))
def test_packed_rows_are_the_concatenation_cut_into_pieces(lengths, T, seed, epoch):
    cache = cache_of(lengths)
    rows = PackedRows(cache, T, seed)
    expected = list(brute_force(cache, T, seed, epoch))
    assert len(expected) == rows.rows_per_epoch and rows.tokens_per_epoch == len(expected) * T
    for i, row in enumerate(expected):
        np.testing.assert_array_equal(rows[epoch * rows.rows_per_epoch + i], row)


@settings(deadline=None)
@given(lengths_lists, st.integers(2, 12), st.integers(0, 5), st.integers(0, 3))
def test_every_token_is_an_input_once_an_epoch_but_for_the_dropped_tail(lengths, T, seed, epoch):
    cache = cache_of(lengths)
    rows = PackedRows(cache, T, seed)
    R = rows.rows_per_epoch
    inputs = np.concatenate([rows[epoch * R + i][0][:-1] for i in range(R)])
    left_out = len(cache.tokens) - len(inputs)
    assert 1 <= left_out <= T
    text = inputs[inputs >= 100]  # each of these occurs once in the corpus
    assert len(np.unique(text)) == len(text)
    assert len(set(cache.tokens[cache.tokens >= 100].tolist()) - set(text.tolist())) <= left_out
    counts = [np.count_nonzero(inputs == symbol) for symbol in (BOS, EOS)]
    assert all(cache.documents - left_out <= c <= cache.documents for c in counts)


def test_epochs_and_seeds_differ_in_order():
    orders = {tuple(PackedRows(CACHE, 8, seed)._order(epoch)[0]) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert all(sorted(o) == list(range(CACHE.documents)) for o in orders)


# ---------------------------------------------------------------- windows


def test_windows_are_contiguous_and_reach_both_ends():
    T = 8
    rows = WindowRows(CACHE, T, seed=0)
    at = {tuple(CACHE.tokens[i : i + T + 1]): i for i in range(len(CACHE.tokens) - T)}
    starts = [at[tuple(rows[i][0])] for i in range(2000)]
    assert set(starts) == set(range(len(CACHE.tokens) - T)), "every window there is, the first and the last too"
    assert all((rows[i][1] == 1).all() for i in range(20))


# ---------------------------------------------------------------- first fit


def brute_first_fit(lengths, capacity):
    free, rows = [], []
    for need in lengths:
        row = next((r for r, room in enumerate(free) if room >= need), len(free))
        free[row:] = [free[row] if row < len(free) else capacity, *free[row + 1 :]]
        free[row] -= need
        rows.append(row)
    return rows, len(free)


@settings(deadline=None)
@given(st.integers(3, 70), st.data())
def test_first_fit_is_first_fit(capacity, data):
    lengths = data.draw(st.lists(st.integers(2, capacity), min_size=1, max_size=60))
    rows, n = packing.first_fit(np.array(lengths), capacity)
    expected, expected_n = brute_first_fit([x for x in lengths if x < capacity], capacity)
    assert n == expected_n + lengths.count(capacity), "a whole row has nothing to search for"
    assert [r for r, x in zip(rows, lengths, strict=True) if x < capacity] == expected
    assert sorted(r for r, x in zip(rows, lengths, strict=True) if x == capacity) == list(range(expected_n, n))


@settings(deadline=None)
@given(lengths_lists, st.integers(2, 12), st.integers(0, 5), st.integers(0, 3))
def test_first_fit_asks_for_every_token_once_an_epoch(lengths, T, seed, epoch):
    cache = cache_of(lengths)
    rows = FirstFitRows(cache, T, seed)
    R = rows.rows_per_epoch
    batch = make_batch([rows[epoch * R + i] for i in range(R)])
    asked = np.sort(batch.targets[batch.weights > 0])
    np.testing.assert_array_equal(asked, np.sort(cache.tokens[cache.tokens != BOS])), "all but <bos>, once"
    assert rows.tokens_per_epoch == R * T
    placed = sum(np.count_nonzero(rows[i][1]) for i in range(R))
    assert rows.fill == pytest.approx(placed / (R * (T + 1)))


@settings(deadline=None)
@given(lengths_lists, st.integers(2, 12), st.integers(0, 5))
def test_first_fit_cuts_only_documents_longer_than_a_row(lengths, T, seed):
    cache = cache_of(lengths)
    rows = FirstFitRows(cache, T, seed)
    begins = {}
    for i in range(rows.rows_per_epoch):
        tokens, segments = rows[i]
        for number in range(1, segments.max() + 1):
            here = tuple(tokens[segments == number])
            begins[here] = begins.get(here, 0) + 1
    expected = {}
    for d in range(cache.documents):
        whole = cache.document(d).tolist()
        for at in range(0, len(whole) - 1, T):
            here = tuple(whole[at : at + T + 1])
            expected[here] = expected.get(here, 0) + 1
    assert begins == expected


def test_first_fit_leaves_little_free_and_shuffles_its_rows_every_epoch():
    lengths = np.maximum(np.random.default_rng(0).lognormal(3, 1, 5000).astype(int), 2)
    rows = FirstFitRows(cache_of(lengths), 128, seed=0)
    assert rows.fill > 0.98
    R = rows.rows_per_epoch
    of = lambda rows, epoch: [tuple(rows[epoch * R + i][0]) for i in range(R)]
    first, second, other = of(rows, 0), of(rows, 1), of(FirstFitRows(rows.cache, 128, seed=1), 0)
    assert first != second and first != other and sorted(first) == sorted(second) == sorted(other)


# ---------------------------------------------------------------- too little text


def test_first_fit_needs_one_document():
    np.testing.assert_array_equal(FirstFitRows(cache_of([3]), 8, 0)[5], [[BOS, 100, EOS] + [0] * 6, [1] * 3 + [0] * 6])
    with pytest.raises(RunError, match="has 0 tokens"):
        FirstFitRows(cache_of([]), 8, 0)


@pytest.mark.parametrize("kind", ["windows", "packed"])
def test_text_for_one_row_is_enough_and_less_is_refused(kind):
    np.testing.assert_array_equal(ROWS[kind](cache_of([9]), 8, 0)[5][0], cache_of([9]).tokens)
    for lengths in ([8], []):
        with pytest.raises(RunError, match=rf"has {sum(lengths)} tokens, but one row of model.context_length=8 needs 9") as e:
            ROWS[kind](cache_of(lengths), 8, 0)
        assert e.value.code == ExitCode.DATA


# ---------------------------------------------------------------- batches


@settings(deadline=None)
@given(lengths_lists, st.integers(2, 12), st.integers(0, 50))
def test_a_batch_keeps_documents_apart(lengths, T, first):
    rows = PackedRows(cache_of(lengths), T, seed=0)
    chosen = [rows[first + i] for i in range(3)]
    batch = make_batch(chosen)
    for b, (tokens, segments) in enumerate(chosen):
        expected_positions, expected_weights = [], []
        for t in range(T):
            begins = t == 0 or segments[t] != segments[t - 1]
            expected_positions.append(0 if begins else expected_positions[-1] + 1)
            expected_weights.append(float(segments[t + 1] == segments[t]))
        np.testing.assert_array_equal(batch.tokens[b], tokens[:-1])
        np.testing.assert_array_equal(batch.targets[b], tokens[1:])
        np.testing.assert_array_equal(batch.segments[b], segments[:-1])
        np.testing.assert_array_equal(batch.positions[b], expected_positions)
        np.testing.assert_array_equal(batch.weights[b], expected_weights)
    assert batch.weights.dtype == np.float32
    assert {a.dtype for a in (batch.tokens, batch.targets, batch.segments, batch.positions)} == {np.dtype(np.int32)}


def test_nobody_predicts_the_beginning_of_a_document():
    for kind in ("windows", "packed"):
        rows = ROWS[kind](CACHE, 8, seed=0)
        batch = make_batch([rows[i] for i in range(50)])
        np.testing.assert_array_equal(batch.weights == 0, batch.targets == BOS)
    rows = FirstFitRows(CACHE, 8, seed=0)  # here a row may also begin in the middle of a document that was cut
    batch = make_batch([rows[i] for i in range(50)])
    assert not batch.weights[(batch.targets == BOS) | (batch.targets == PAD)].any()


# ---------------------------------------------------------------- the stream, and resuming it


def stream(kind, first, last, K=2, B=3, prefetch=2):
    return list(dispatches(ROWS[kind](CACHE, 8, seed=1), first, last, K, B, prefetch))


def assert_same(a, b):
    assert [step for step, _ in a] == [step for step, _ in b]
    for (_, x), (_, y) in zip(a, b, strict=True):
        for name in ("tokens", "targets", "weights", "positions", "segments"):
            np.testing.assert_array_equal(getattr(x, name), getattr(y, name))


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("prefetch", [1, 2, 3, 8, 64])
def test_the_stream_is_every_step_once_in_order(kind, prefetch):
    K, B, last = 2, 3, 24
    rows = ROWS[kind](CACHE, 8, seed=1)
    got = stream(kind, 0, last, K, B, prefetch)
    assert [step for step, _ in got] == list(range(K, last + 1, K))
    tokens = np.concatenate([batch.tokens for _, batch in got])
    assert tokens.shape == (last, B, 8)
    expected = [[rows[s * B + i][0][:-1] for i in range(B)] for s in range(last)]
    np.testing.assert_array_equal(tokens, expected)


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("prefetch", [1, 2, 5])
def test_resuming_anywhere_gives_exactly_the_rest(kind, prefetch):
    whole = stream(kind, 0, 20)
    for done in range(0, 22, 2):
        assert_same(stream(kind, done, 20, prefetch=prefetch), whole[done // 2 :])


def test_steps_are_the_same_however_many_go_into_one_dispatch():
    one, four = (np.concatenate([b.tokens for _, b in stream("packed", 0, 12, K=k)]) for k in (1, 4))
    np.testing.assert_array_equal(one, four)


def test_leaving_the_stream_early_ends_its_thread():
    batches = dispatches(PackedRows(CACHE, 8, 0), 0, 1000, 1, 2, prefetch=4)
    next(batches)
    batches.close()
    assert next(batches, None) is None
