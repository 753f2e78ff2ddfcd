"""GRPO is its formula, token by token; samples become rows that record what was sampled and its advantage.

B rows, T positions, V vocabulary
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt4o_jax import parallel
from gpt4o_jax.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from gpt4o_jax.config_finetune import ObjectiveConfig
from gpt4o_jax.data import conversations
from gpt4o_jax.data import tokenizer as tokenizers
from gpt4o_jax.data.batches import Batch
from gpt4o_jax.errors import RunError
from gpt4o_jax.finetuning import reinforced
from gpt4o_jax.finetuning.logprobs import token_logprobs
from gpt4o_jax.model import gpt
from gpt4o_jax.ops.compute import Compute
from gpt4o_jax.sampling.generate import Completion, extend
from gpt4o_jax.sampling.logits import Chosen
from gpt4o_jax.tasks.worlds import WORLDS
from gpt4o_jax.training.step import gradients
from tests.parallel.meshes import batch as random_batch

V, T = 48, 16
SIZES = ModelConfig(vocab_size=V, context_length=T, n_layers=1, d_model=16, n_heads=4, init_std=0.3, output_init="scaled")
MODEL = gpt.GPT(SIZES, Compute("cpu", "float32"))
CONFIG = RunConfig(model=SIZES, train=TrainConfig(loss_chunk=5))
CLIP, BETA = 0.2, 0.3
LOGS = st.floats(-3, 0)


@settings(deadline=None)
@given(LOGS, LOGS, LOGS, st.floats(-2, 2), st.floats(0.05, 0.5), st.floats(0, 1))
def test_a_token_has_the_loss_of_the_formula(new, old, reference, advantage, clip, beta):
    """By cases: an advantage is followed until the ratio has moved by the clip in its direction."""
    ratio = math.exp(new - old)
    gain = advantage * (min(ratio, 1 + clip) if advantage > 0 else max(ratio, 1 - clip))
    p, q = math.exp(new), math.exp(reference)
    kl = q / p - math.log(q / p) - 1
    got = reinforced.per_token(*map(jnp.float32, (new, old, reference, advantage)), clip, beta)
    np.testing.assert_allclose(got["loss"], beta * kl - gain, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got["kl"], kl, rtol=1e-4, atol=1e-5)
    assert got["kl"] >= -1e-6


def test_the_estimate_of_kl_is_right_on_average():
    """Over samples of p, using the probabilities of both."""
    p, q = np.array([0.5, 0.3, 0.2], np.float32), np.array([0.2, 0.2, 0.6], np.float32)
    zero = np.zeros(3, np.float32)
    kl = reinforced.per_token(np.log(p), np.log(p), np.log(q), zero, CLIP, 1.0)["kl"]
    np.testing.assert_allclose(np.sum(p * kl), np.sum(p * np.log(p / q)), rtol=1e-5)


def test_where_the_ratio_is_beyond_the_clip_nothing_pulls():
    slope = jax.grad(lambda new, advantage: reinforced.per_token(new, 0.0, 0.0, advantage, CLIP, 0.0)["loss"])
    assert slope(0.5, 1.0) == 0 and slope(-0.5, -1.0) == 0  # reached the clip
    assert slope(0.5, -1.0) > 0 and slope(-0.5, 1.0) < 0  # moved the wrong way: pulled back
    np.testing.assert_allclose(slope(0.0, 2.0), -2.0)


@settings(deadline=None)
@given(st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=4, max_size=4), min_size=1, max_size=4))
def test_advantages_are_normalised_by_group(rewards):
    got = reinforced.advantages(np.array(rewards))
    for row, group in zip(got, rewards, strict=True):
        mean = sum(group) / 4
        spread = math.sqrt(sum((r - mean) ** 2 for r in group) / 4)
        np.testing.assert_allclose(row, [(r - mean) / spread if spread else 0.0 for r in group], atol=1e-6)


@pytest.mark.parametrize("reward", [1 / 3, 0.1, 0.7])
@pytest.mark.parametrize("group", [3, 7, 11])
def test_equal_rewards_are_no_advantage(reward, group):
    assert not reinforced.advantages(np.full((2, group), reward, np.float32)).any()


def test_an_answer_keeps_the_symbol_that_ended_it():
    for end in (7, 9, None):
        tokens, _, weights = reinforced.answer_row([1, 2], Completion([5], [0.0], "eos" if end else "length", end), 6)
        assert tokens.tolist() == [1, 2, 5, end or 0, 0, 0, 0] and np.count_nonzero(weights) == 1 + (end is not None)


def test_of_several_ends_a_rollout_learns_the_one_that_was_sampled(one_device, sampled, monkeypatch):
    """As published models have them: an end of text, an end of the turn, perhaps more."""
    config, prompts, model = sampled
    several = dataclasses.replace(prompts.tokenizer.symbols, eos=(2, 3, prompts.tokenizer.special("<|end_of_turn|>")))
    monkeypatch.setattr(prompts.tokenizer, "symbols", several)
    found, sample = [], reinforced.generate
    monkeypatch.setattr(reinforced, "generate", lambda *args, **more: found.extend(sample(*args, **more)) or found)
    params = jax.jit(functools.partial(gpt.init, model))(jax.random.key(0))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=60))
    batch = reinforced.rollout(config, prompts, model, params, params, step=0)
    assert {c.end for c in found} == {None, *several.eos}
    for c, targets, weights in zip(found, *(x.reshape(-1, 128) for x in (batch.targets, batch.weights)), strict=True):
        assert targets[weights > 0].tolist() == c.ids + [c.end] * (c.end is not None)


@pytest.mark.parametrize("end", [7, 9])
def test_what_ends_a_row_is_the_token_drawn(end):
    row, drawn = Completion([], [], ""), Chosen([5, end, 6], [-1.0] * 3, [[]] * 3, [[]] * 3)
    extend(row, 0, [True] * 3, drawn, 10, (7, 9), (), lambda *_: None, lambda *_: None)
    assert (row.ids, row.finished, row.end) == ([5], "eos", end)


def test_questions_are_others_than_those_of_fine_tuning(sampled):
    _, prompts, _ = sampled
    tuned = {prompts.world.item(conversations.SEED, i, False).prompt for i in range(200)}
    drawn = [prompts.drawn(conversations.SEED, i, 128)[0].prompt for i in range(200)]
    assert sum(prompt in tuned for prompt in drawn) < 20, "only by chance"


def test_the_first_gradient_is_that_of_the_policy(one_device):
    """At the start: the sum over answers of the mean over their tokens of -A grad log p, plus beta times that of the KL."""
    rows = random_batch(False)
    lengths = rows.weights.astype(bool).sum(axis=1, keepdims=True)
    weights = (rows.weights > 0) / np.maximum(lengths, 1)
    params, other = (jax.jit(functools.partial(gpt.init, MODEL))(jax.random.key(seed)) for seed in (1, 2))
    logp = lambda p: token_logprobs(MODEL, p, rows, 5)
    old, reference = jax.jit(logp)(params), jax.jit(logp)(other)
    advantage = np.broadcast_to(np.random.default_rng(0).normal(size=(len(lengths), 1)), rows.tokens.shape).astype(np.float32)
    beside = dict(zip(reinforced.BESIDE, (old, reference, advantage, advantage), strict=True))
    batch = Batch(rows.tokens, rows.targets, weights.astype(np.float32), rows.positions, rows.segments, beside)
    loss = functools.partial(reinforced.grpo_loss, CLIP, BETA)
    parts, got, weight = jax.jit(lambda p: gradients(MODEL, p, batch, CONFIG, jax.random.key(0), loss=loss))(params)
    assert np.isclose(weight, len(lengths))

    def brute_force(p):
        d = reference - logp(p)
        per_token = BETA * (jnp.exp(d) - d - 1) - advantage * logp(p)
        return sum(jnp.sum(jnp.where(w > 0, x, 0)) / n[0] for w, x, n in zip(weights, per_token, lengths, strict=True)) / len(
            lengths
        )

    wanted = jax.jit(jax.grad(brute_force))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, atol=2e-5 * np.abs(a).max(), rtol=0), wanted, got)
    np.testing.assert_allclose(parts["loss"], BETA * parts["kl"] - np.mean(advantage[:, 0]), rtol=1e-4)
    assert parts["kl"] > 0 and parts["clipped"] == 0


@pytest.fixture(scope="module")
def sampled():
    """(config, prompts, model, parameters) of a character model on the numbers world."""
    text = "Translate into English German French Spanish: 0123456789 abcdefghijklmnopqrstuvwxyzäöüßéèáíóúñ-,"
    tokenizer = tokenizers.train("char", 300, [text])
    sizes = ModelConfig(vocab_size=tokenizer.vocab_size, context_length=128, n_layers=1, d_model=16, n_heads=2, init_std=0.3)
    train = TrainConfig(batch_size=6, steps_per_dispatch=2, loss_chunk=64)
    objective = ObjectiveConfig(method="grpo", group=3, answer_tokens=9)
    config = RunConfig(seed=4, model=sizes, train=train, data=DataConfig(source="world", path="numbers"), objective=objective)
    model = gpt.GPT(sizes, Compute("cpu", "float32"))
    return config, reinforced.prepare(config, tokenizer), model


def test_a_rollout_says_what_was_sampled_and_what_it_was_worth(one_device, sampled):
    config, prompts, model = sampled
    params = jax.jit(functools.partial(gpt.init, model))(jax.random.key(0))
    batch = reinforced.rollout(config, prompts, model, params, params, step=8)
    again = reinforced.rollout(config, prompts, model, params, params, step=8)
    jax.tree.map(np.testing.assert_array_equal, batch, again)
    assert batch.tokens.shape == (2, 6, 128)
    np.testing.assert_allclose(batch.weights.sum(axis=-1), 1, rtol=1e-6)
    items = [prompts.world.item(reinforced._SEEDS + 4, 8 * 2 + i, False) for i in range(4)]
    for row in range(12):
        k, b = divmod(row, 6)
        item, counted = items[row // 3], batch.weights[k, b] > 0
        ids = prompts.ids(item)
        np.testing.assert_array_equal(batch.tokens[k, b, : len(ids)], ids)
        assert np.flatnonzero(counted)[0] == len(ids) - 1 and counted.sum() <= 10
        text = prompts.tokenizer.decode([i for i in batch.targets[k, b][counted].tolist() if i not in ends(prompts)])
        assert np.all(batch.beside["reward"][k, b][counted] == float(text.strip() in item.references))
    for name in ("old", "reference"):
        assert np.all(batch.beside[name][batch.weights > 0] < 0)
    np.testing.assert_array_equal(batch.beside["old"], batch.beside["reference"])
    other = reinforced.rollout(config, prompts, model, params, params, step=10)
    assert np.any(other.tokens != batch.tokens)


def test_questions_that_do_not_fit_are_left_out_and_told(one_device, sampled, capsys):
    config, prompts, model = sampled
    lengths = sorted(len(prompts.ids(prompts.world.item(reinforced._SEEDS + 4, i, False))) for i in range(64))
    T = lengths[20] + 1
    short = dataclasses.replace(config, model=dataclasses.replace(config.model, context_length=T))
    found = reinforced.prepare(short, prompts.tokenizer)
    assert f"of the first 64 questions leave no room for an answer in model.context_length={T}" in capsys.readouterr().err
    model = gpt.GPT(short.model, model.compute)
    params = jax.jit(functools.partial(gpt.init, model))(jax.random.key(0))
    batch = reinforced.rollout(short, found, model, params, params, step=0)
    np.testing.assert_allclose(batch.weights.sum(axis=-1), 1, rtol=1e-6)
    first = [i for i in range(4) if len(prompts.ids(prompts.world.item(reinforced._SEEDS + 4, i, False))) < T]
    assert len(first) < 4 and all(found.drawn(4, i, T)[0] == prompts.world.item(reinforced._SEEDS + 4, i, False) for i in first)
    few = dataclasses.replace(config, model=dataclasses.replace(config.model, context_length=lengths[0]))
    with pytest.raises(RunError) as e:
        reinforced.prepare(few, prompts.tokenizer)
    assert f"they are {lengths[0]} to {lengths[-1]} tokens; use a model of a longer context" in str(e.value)


def test_the_last_evaluation_asks_what_chose_no_checkpoint(one_device, sampled, monkeypatch):
    config, prompts, model = sampled
    asked = []
    monkeypatch.setattr(reinforced.generation, "answer", lambda *a: asked.append(a[4]) or [item.answer for item in a[4]])
    _, evaluate = reinforced.begin(config, prompts, None, parallel.make_mesh(devices=jax.devices()[:1]), lambda model: {})
    assert [evaluate(model, {}, whole)["reward"] for whole in (False, True)] == [1, 1]
    during, at_last = asked
    assert during == conversations.held_out(prompts.world, config.objective.held_out, choosing=True)
    assert at_last == conversations.held_out(prompts.world, config.objective.held_out, choosing=False), "as `evaluate` asks"
    assert len(during) == len(at_last) == 200 and not {i.prompt for i in during} & {i.prompt for i in at_last}


def ends(prompts):
    return {*prompts.tokenizer.symbols.eos, prompts.tokenizer.special("<|end_of_turn|>")}


def test_items_of_a_world_are_rewarded_by_what_can_score_them():
    """For tools: calls by their JSON, sentences by exact match, whatever the answer is."""
    world = WORLDS["tools"]
    items = [world.item(0, i, False) for i in range(2)]
    prompts = reinforced.Prompts("", None, world, None)
    assert [item.slice for item in items] == ["call", "answer"]
    assert prompts.rewards([item.answer for item in items], items).tolist() == [1, 1]
    assert prompts.rewards(["5", "5"], items).tolist() == [0, 0]
