"""DPO on packed pairs equals the formula on each pair alone; pairs stay whole, once per epoch; file mistakes are reported.

B rows, T positions, V vocabulary
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt4o_jax import parallel
from gpt4o_jax.config import DataConfig, MeshConfig, ModelConfig, RunConfig, TrainConfig
from gpt4o_jax.data.tokenizer import Symbols, byte_tokenizer
from gpt4o_jax.errors import ExitCode, RunError
from gpt4o_jax.finetuning.logprobs import token_logprobs
from gpt4o_jax.finetuning.pairs import Encoded, PairRows, of_world, prepare, read
from gpt4o_jax.finetuning.preference import dpo_loss, in_order
from gpt4o_jax.model import gpt
from gpt4o_jax.ops.compute import Compute
from gpt4o_jax.tasks.worlds import WORLDS
from gpt4o_jax.training.step import gradients
from tests.parallel.meshes import batch as random_batch

T, V, BETA, NLL = 24, 48, 0.7, 0.3
SIZES = ModelConfig(
    vocab_size=V, context_length=T, n_layers=2, d_model=16, n_heads=4, init_std=0.3, output_init="scaled", logit_softcap=9.0
)
MODEL = gpt.GPT(SIZES, Compute("cpu", "float32"))
CONFIG = RunConfig(model=SIZES, train=TrainConfig(loss_chunk=5))


def answer(random, prompt: list[int]):
    words = random.integers(5, V, random.integers(1, 5)).tolist()
    return prompt + words, [False] * len(prompt) + [True] * len(words)


def pairs(count: int = 7) -> list[Encoded]:
    random, made = np.random.default_rng(0), []
    for _ in range(count):
        prompt = [1, *random.integers(5, V, random.integers(1, 4)).tolist()]
        made.append(Encoded(answer(random, prompt), answer(random, prompt)))
    return made


def parameters(seed: int) -> dict:
    return jax.jit(functools.partial(gpt.init, MODEL))(jax.random.key(seed))


def logprobs(params, texts: list[tuple[list[int], list[bool]]]):
    """Log-probability of each answer, from the logits of its text alone in a row."""
    width = max(len(ids) for ids, _ in texts)
    ids, counts = (jnp.array([text[i] + [0] * (width - len(text[i])) for text in texts]) for i in (0, 1))
    positions = jnp.broadcast_to(jnp.arange(width - 1), ids[:, 1:].shape)
    hidden, _, _ = MODEL.apply({"params": params}, ids[:, :-1], positions, jnp.ones_like(positions))
    of_all = jax.nn.log_softmax(gpt.unembed(MODEL, params, hidden))
    return jnp.sum(jnp.take_along_axis(of_all, ids[:, 1:, None], axis=-1)[..., 0] * counts[:, 1:], axis=1)


def brute_force(params, reference):
    gain = lambda texts: logprobs(params, texts) - logprobs(reference, texts)
    chosen = [pair.chosen for pair in pairs()]
    margins = BETA * (gain(chosen) - gain([pair.rejected for pair in pairs()]))
    nll = -logprobs(params, chosen) / np.array([sum(counts) for _, counts in chosen])
    return jnp.mean(jnp.log(1 + jnp.exp(-margins)) + NLL * nll), (margins, nll)


@pytest.fixture(scope="module")
def rows():
    """A batch of all pairs, several per row, with the reference model's log-probabilities; and the most pairs in a row."""
    made = PairRows(pairs(), T, 0)
    with jax.set_mesh(parallel.make_mesh(devices=jax.devices()[:1])):
        score = jax.jit(lambda p, b: token_logprobs(MODEL, p, b, 5))
        made.reference = np.concatenate([score(parameters(1), b) for b in in_order(made, 2, Symbols())])
    (whole,) = in_order(made, made.rows_per_epoch, Symbols())
    return whole, made.most


def test_packed_pairs_have_the_loss_of_each_alone(one_device, rows):
    """Loss, its parts and the gradient, in one batch and accumulated."""
    batch, most = rows
    assert most > 1 and len(batch.tokens) > 1 and np.isclose(batch.weights.sum(), len(pairs()))
    params, reference = parameters(2), parameters(1)
    (loss, (margins, nll)), wanted = jax.jit(jax.value_and_grad(brute_force, has_aux=True))(params, reference)
    step = lambda p: gradients(MODEL, p, batch, CONFIG, jax.random.key(0), loss=functools.partial(dpo_loss, BETA, NLL, most))
    parts, got, weight = jax.jit(step)(params)
    assert np.isclose(weight, len(pairs()))
    np.testing.assert_allclose(parts["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(parts["preference_margin"], np.mean(margins), rtol=1e-4)
    np.testing.assert_allclose(parts["chosen_nll"], np.mean(nll), rtol=1e-5)
    np.testing.assert_allclose(parts["preference_accuracy"], np.mean(margins > 0), rtol=1e-6)
    assert 0 < parts["preference_accuracy"] < 1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, atol=2e-5 * np.abs(a).max(), rtol=0), wanted, got)


def test_at_the_start_nothing_is_preferred(one_device, rows):
    batch, most = rows
    parts, _, _ = jax.jit(
        lambda p: gradients(MODEL, p, batch, CONFIG, jax.random.key(0), loss=functools.partial(dpo_loss, BETA, 0.0, most))
    )(parameters(1))
    np.testing.assert_allclose(parts["loss"], np.log(2), rtol=1e-6)
    np.testing.assert_allclose(parts["preference_margin"], 0, atol=1e-5)


def test_log_probabilities_and_their_gradient_are_the_same_on_any_mesh():
    """Even when the vocabulary is sharded, so that no device holds all logits of a row."""
    batch, weights = random_batch(True), np.random.default_rng(1).normal(size=(8, 16)).astype(np.float32)

    def compute(mesh):
        with jax.set_mesh(mesh):
            by_axes = parallel.shardings(gpt.logical_axes(MODEL), mesh)
            params = jax.jit(functools.partial(gpt.init, MODEL), out_shardings=by_axes)(jax.random.key(1))
            rows = jax.device_put(batch, jax.sharding.NamedSharding(mesh, parallel.spec(("batch", "seq"))))
            total = lambda p: jnp.sum(weights * token_logprobs(MODEL, p, rows, 5) ** 2)
            return jax.device_get(jax.jit(jax.value_and_grad(total))(params))

    got = compute(parallel.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    wanted = compute(parallel.make_mesh(devices=jax.devices()[:1]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, atol=1e-5 * np.abs(a).max(), rtol=0), wanted, got)


def test_every_pair_is_whole_and_in_each_epoch_once():
    made = PairRows(pairs(30), T, seed=3)
    wanted = sorted((p.chosen[0], p.rejected[0]) for p in pairs(30))
    for epoch in range(2):
        found = []
        for n in range(made.rows_per_epoch):
            tokens, segments, weights, _ = made[epoch * made.rows_per_epoch + n]
            for first in range(1, segments.max() + 1, 2):
                here = [segments == first, segments == first + 1]
                found.append(tuple(tokens[of].tolist() for of in here))
                assert np.isclose(sum(weights[of].sum() for of in here), 1)
        assert sorted(found) == wanted
    orders = [[made[e * made.rows_per_epoch + n][0].tolist() for n in range(made.rows_per_epoch)] for e in range(2)]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])


ASK = '{"messages": [{"role": "user", "content": "a"}], '


@pytest.mark.parametrize(
    ("line", "fragment"),
    [
        ("{", "f:2: not JSON"),
        ("[]", "f:2: messages: expected the turns up to the question"),
        ('{"messages": []}', "f:2: messages: expected the turns"),
        ('{"messages": [{"role": "usr", "content": "a"}]}', "f:2: messages: message 0: role 'usr' (did you mean user?)"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "answers belong in chosen and rejected"),
        (ASK + '"rejected": "b"}', "f:2: chosen: expected a text, got None"),
        (ASK + '"chosen": "b", "rejected": 3}', "f:2: rejected: expected a text, got 3"),
        (
            ASK.replace('"a"', '"a\\ud800"') + '"chosen": "b", "rejected": "c"}',
            "f:2: messages: not valid Unicode: lone",
        ),
        (ASK + '"chosen": "\\ud800", "rejected": "c"}', "f:2: chosen: not valid Unicode: lone surrogate U+D800 at character 0"),
        (ASK + '"chosen": "b", "rejected": "b"}', "f:2: chosen and rejected are the same text"),
    ],
)
def test_a_broken_file_is_told_by_line_and_field(line, fragment):
    good = ASK + '"chosen": "b", "rejected": "c"}'
    with pytest.raises(RunError) as e:
        list(read(f"{good}\n{line}\n", "f"))
    assert fragment in str(e.value) and e.value.code == ExitCode.DATA and "\n" not in str(e.value)


def test_what_a_template_cannot_write_is_told_by_line(tmp_path):
    turns = '{"messages": [{"role": "system", "content": "s"}, {"role": "tool", "content": "a"}], "chosen": "b", "rejected": "c"}'
    file = tmp_path / "pairs.jsonl"
    file.write_text(f'{ASK}"chosen": "b", "rejected": "c"}}\n{turns}\n')
    data = DataConfig(source="conversations", path=str(file), holdout_path=str(file), template="mistral")
    with pytest.raises(RunError) as e:
        prepare(dataclasses.replace(CONFIG, data=data), byte_tokenizer())
    told = f"{file}:2: chat template mistral: message 1 is of role tool, expected user: the two must alternate"
    assert str(e.value) == told and e.value.code == ExitCode.DATA


def test_only_the_last_answer_counts(tmp_path):
    turns = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({"messages": turns, "chosen": "right", "rejected": "wrong"}) + "\n")
    data = DataConfig(source="conversations", path=str(file), holdout_path=str(file))
    sizes = dataclasses.replace(SIZES, context_length=64)
    tokenizer = byte_tokenizer()
    found = prepare(dataclasses.replace(CONFIG, model=sizes, data=data), tokenizer)
    tokens, segments, weights, _ = found.training.at(0)
    said = [tokenizer.decode(tokens[(segments == segment) & (weights > 0)].tolist()) for segment in (1, 2)]
    assert said == [" right", " wrong"]


def test_a_pair_that_its_template_writes_alike_is_refused(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text(f'{ASK}"chosen": "b", "rejected": "c"}}\n{ASK}"chosen": "b", "rejected": "b\\n"}}\n')
    data = DataConfig(source="conversations", path=str(file), holdout_path=str(file), template="llama2")
    with pytest.raises(RunError) as e:
        prepare(dataclasses.replace(CONFIG, data=data), byte_tokenizer())
    assert str(e.value) == f"{file}:2: chosen and rejected are the same in the template llama2; nothing is preferred"


@pytest.mark.parametrize("name", WORLDS)
def test_what_is_rejected_of_a_world_is_wrong_and_close(name):
    world, made = WORLDS[name], list(of_world(WORLDS[name], 60, False))
    assert len(made) > 30 and made == list(of_world(world, 60, False))
    right = {item.prompt: item.references for item in (world.item(0, i, False) for i in range(60))}
    close = [sum(a != b for a, b in zip(p.chosen.split(), p.rejected.split(), strict=False)) for p in made]
    assert all(p.chosen in right[p.prompt] and p.rejected not in right[p.prompt] for p in made)
    assert sum(words == 1 for words in close) > 0.8 * len(close)
