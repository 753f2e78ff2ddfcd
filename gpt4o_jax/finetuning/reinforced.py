"""Group relative policy optimisation (GRPO) on the items of a world, with rewards that a program can check.

Each dispatch begins with samples from the newest weights, `objective.group` per prompt, scored by the world's first metric; each
of its K steps learns from B of them. What dispatch s samples depends only on (weights, seed, s).

Source: Shao et al. 2024, arXiv:2402.03300, equations 3 and 4 (outcome supervision).

K steps, B rows, T positions
"""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from gpt4o_jax.config import RunConfig
from gpt4o_jax.console import say as tell
from gpt4o_jax.data import conversations, sources
from gpt4o_jax.data import tokenizer as tokenizers
from gpt4o_jax.data.batches import Batch, make_batch, stack
from gpt4o_jax.data.rows import random_bits
from gpt4o_jax.data.tokenizer import Tokenizer
from gpt4o_jax.errors import data_error
from gpt4o_jax.evaluation import generation
from gpt4o_jax.finetuning.logprobs import learned_logprobs, scorer
from gpt4o_jax.model import lora
from gpt4o_jax.model.gpt import GPT
from gpt4o_jax.ops.compute import Compute
from gpt4o_jax.sampling.generate import Completion, generate
from gpt4o_jax.sampling.settings import Sampling
from gpt4o_jax.tasks import chat, metrics
from gpt4o_jax.tasks.item import Item
from gpt4o_jax.tasks.worlds import World
from gpt4o_jax.training.objective import Objective

# Plus config.seed, so never the seed of fine-tuning (conversations.SEED): its questions come again only by chance, or where a
# world has only so many (docstrings).
_SEEDS = 1 << 32
_FAR = 1_000_003  # stride from a question to its replacements; prime, so that of few items each comes up
BESIDE = ("old", "reference", "advantage", "reward")  # values per target in Batch.beside; the first two are log-probabilities


# ---------------------------------------------------------------- the objective


def grpo_loss(clip: float, beta: float, model: GPT, params, batch: Batch, t, key):
    """As Objective.loss, summed over answers: each has the same weight, whatever its length."""
    logp_BT, more, of_experts = learned_logprobs(model, params, batch, t, key)
    b, weights = batch.beside, batch.weights
    parts = per_token(jnp.where(weights > 0, logp_BT, b["old"]), b["old"], b["reference"], b["advantage"], clip, beta)
    sums = {name: jnp.sum(weights * x_BT) for name, x_BT in (parts | {"reward": b["reward"]}).items()}
    return sums["loss"] + more, sums | of_experts


def per_token(logp, old, reference, advantage, clip: float, beta: float) -> dict[str, jax.Array]:
    """Per token: "loss", which is -min(ratio A, clipped ratio A) + beta KL; "kl" to the reference, never negative: exp(d) - d - 1
    with d = log reference - log p (Schulman's k3); and "clipped", 1 where clipping stops the gradient. Shapes as logp's.
    """
    ratio = jnp.exp(logp - old)
    held = jnp.clip(ratio, 1 - clip, 1 + clip)
    d = reference - logp
    kl = jnp.exp(d) - d - 1
    gain = jnp.minimum(ratio * advantage, held * advantage)
    return {"loss": beta * kl - gain, "kl": kl, "clipped": (held * advantage < ratio * advantage).astype(jnp.float32)}


def advantages(rewards: np.ndarray) -> np.ndarray:
    """Rewards [groups, group] minus their group's mean, divided by its standard deviation; 0 if all are equal. float64."""
    rewards = rewards.astype(np.float64)  # in float32, the mean of equal rewards may be rounded
    spread = rewards.std(axis=1, keepdims=True)
    return (rewards - rewards.mean(axis=1, keepdims=True)) / np.maximum(spread, 1e-6)


# ---------------------------------------------------------------- prompts, answers and their rewards


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The training loop's corpus, for the questions of a world."""

    name: str
    tokenizer: Tokenizer
    world: World
    template: chat.Template
    in_lanes: tuple = ()
    fill: float | None = None  # unknown: rows do not exist before they are sampled
    tokens_per_epoch: int = 0

    @property
    def size(self) -> str:
        return f"questions of the world {self.world.name}"

    def rows(self, config: RunConfig) -> "Prompts":
        return self

    def drawn(self, seed: int, number: int, T: int) -> tuple[Item, list[int]]:
        """Question `number` of a run and its ids; replaced by another question if it leaves no room in T for an answer.

        `prepare` has checked that some do leave room.
        """
        for n in itertools.count():
            item = self.world.item(_SEEDS + seed, number + n * _FAR, False)
            ids = self.ids(item)
            if len(ids) < T:
                return item, ids

    def ids(self, item: Item) -> list[int]:
        return chat.question(self.template, item.messages, self.tokenizer)

    def rewards(self, texts: Sequence[str], items: Sequence[Item]) -> np.ndarray:
        """From 0 to 1, each by the world's first metric that can score the item."""
        by = [next(name for name in self.world.metrics if metrics.can_score(name, item)) for item in items]
        scores = np.zeros(len(items), np.float32)
        for name in dict.fromkeys(by):
            mine = [i for i, other in enumerate(by) if other == name]
            scores[mine] = metrics.each(name, [texts[i] for i in mine], [items[i] for i in mine])
        return scores / 100


def prepare(config: RunConfig, tokenizer: Tokenizer | None = None) -> Prompts:
    """The prompts of a run. tokenizer: the run's own, if it already has one. Raises RunError."""
    tokenizer = tokenizer or tokenizers.load(epath.Path(config.tokenizer.path or config.init.from_))
    world = sources.world(config.data.path, config.data.holdout_fraction)
    name = conversations.template_name(config.data, tokenizer)
    template = chat.template_for(name, tokenizer)
    made, T = [world.item(_SEEDS + config.seed, i, False) for i in range(64)], config.model.context_length
    digest = hashlib.sha256("\0".join((tokenizer.digest, name, world.name, repr(made))).encode()).hexdigest()[:16]
    prompts = Prompts(digest, tokenizer, world, template)
    lengths = [len(prompts.ids(item)) for item in made]
    fitting = sum(length < T for length in lengths)
    if not fitting:
        raise data_error(
            f"config.data.path={config.data.path}: none of its first {len(made)} questions leaves room for an answer in"
            f" model.context_length={T}: they are {min(lengths)} to {max(lengths)} tokens; use a model of a longer context"
        )
    if fitting < len(made):
        tell(
            f"{len(made) - fitting} of the first {len(made)} questions leave no room for an answer in model.context_length={T}"
            f" (up to {max(lengths)} tokens): others take the place of such questions"
        )
    return prompts


def answer_row(prompt: list[int], c: Completion, T: int):
    """(tokens, segments, weights [T + 1] each) of a prompt, its answer and the token that ended it; weights sum to 1."""
    ids = [*prompt, *c.ids, *([] if c.end is None else [c.end])][: T + 1]
    tokens, segments = np.zeros((2, T + 1), np.int32)
    tokens[: len(ids)], segments[: len(ids)] = ids, 1
    weights = np.zeros(T + 1, np.float32)
    weights[len(prompt) : len(ids)] = 1 / (len(ids) - len(prompt))
    return tokens, segments, weights


# ---------------------------------------------------------------- a run


def begin(config: RunConfig, prompts: Prompts, folder: epath.Path, mesh: jax.sharding.Mesh, reference: Callable):
    """(Objective, evaluate(model, params, whole) -> scores on held-out items by name) of a run. whole: on items that no earlier
    evaluation used, as all those that choose a checkpoint are used each time.

    reference(model): the weights the run starts from, kept for the KL term; with LoRA they are the base anyway. Nothing is saved
    in `folder`: each dispatch samples new answers.
    """
    c, t = config.objective, config.train
    loss = functools.partial(grpo_loss, c.clip, c.beta)
    with jax.set_mesh(mesh):
        model = GPT(config.model, Compute.on(mesh, config.model.compute_dtype))
        fixed = None if config.lora.rank or not c.beta else reference(model)

    def batches(program, state: Callable, start: int, last_step: int):
        for step in range(start, last_step, t.steps_per_dispatch):
            now = state()
            params = lora.beside(now.base, now.params, config.lora.scale)
            yield step + t.steps_per_dispatch, rollout(config, prompts, program.model, params, now.base or fixed or params, step)

    def evaluate(model: GPT, params, whole: bool) -> dict:
        return scores(config, prompts, model, params, choosing=not whole)

    return Objective(loss, BESIDE, batches), evaluate


def scores(config: RunConfig, prompts: Prompts, model: GPT, params, choosing: bool) -> dict:
    """Mean reward of greedy answers to held-out items, overall and by slice. Needs the mesh set.

    choosing: on items that choose a checkpoint during training, else on those of the last evaluation.
    """
    items = conversations.held_out(prompts.world, config.objective.held_out, choosing)
    texts = generation.answer(model, params, prompts.tokenizer, prompts.template, items, config.eval.batch_size)
    rewards = prompts.rewards(texts, items)
    rows = {item.slice: [r for r, i in zip(rewards, items, strict=True) if i.slice == item.slice] for item in items}
    return {"reward": float(rewards.mean()), **{f"reward/{row}": float(np.mean(r)) for row, r in rows.items()}}


def rollout(config: RunConfig, prompts: Prompts, model: GPT, params, reference, step: int) -> Batch:
    """Batch [K, B, T] of the answers of `params` to the questions of the dispatch that begins at `step`."""
    c, t, T = config.objective, config.train, config.model.context_length
    K, B = t.steps_per_dispatch, t.batch_size
    each = B // c.group
    items, ids = zip(*(prompts.drawn(config.seed, step * each + i, T) for i in range(K * each)), strict=True)
    seed = int(random_bits(config.seed, step) >> np.uint64(33))
    symbols, end = prompts.tokenizer.symbols, chat.symbol_id(prompts.template.end, prompts.tokenizer)
    sampling = Sampling(stop_ids=(end,))
    size = dict(vocab_size=prompts.tokenizer.vocab_size, symbols=symbols, num_samples=c.group)
    found = generate(model, params, ids, c.answer_tokens, sampling, seed, **size)
    texts = [prompts.template.said(prompts.tokenizer.decode(f.ids)) for f in found]
    rewards = prompts.rewards(texts, [item for item in items for _ in range(c.group)])
    rows = [answer_row(ids[i // c.group], f, T) for i, f in enumerate(found)]
    gains = advantages(rewards.reshape(-1, c.group)).reshape(-1)
    score, made = scorer(model, t.loss_chunk), []
    for k in range(K):
        mine = slice(k * B, (k + 1) * B)
        batch = make_batch([row[:2] for row in rows[mine]], symbols)
        weights = batch.weights * np.stack([row[2][1:] for row in rows[mine]])
        batch = dataclasses.replace(batch, weights=weights)
        whole = lambda x_B: np.where(weights > 0, x_B[:, None], 0).astype(np.float32)
        old, fixed = (jax.device_get(score(p, batch)) for p in (params, reference))
        beside = (old, fixed, whole(gains[mine]), whole(rewards[mine]))
        made.append(dataclasses.replace(batch, beside=dict(zip(BESIDE, beside, strict=True))))
    return stack(made)
