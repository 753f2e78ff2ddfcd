"""Direct preference optimisation (DPO), against cached log-probabilities of a reference model.

Source: Rafailov et al. 2023, arXiv:2305.18290, equation 7. The loss only separates the two answers, so both may become unlikely;
a share of the preferred answer's cross-entropy prevents that (Pang et al. 2024, arXiv:2404.19733, equation 1).

B rows, T positions, P pairs in a row, S = 2P segments
"""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from gpt4o_jax.config import RunConfig
from gpt4o_jax.console import say
from gpt4o_jax.data.batches import Batch, dispatches
from gpt4o_jax.data.tokenizer import Symbols
from gpt4o_jax.finetuning.logprobs import learned_logprobs, scorer, token_logprobs
from gpt4o_jax.finetuning.pairs import PairCorpus, PairRows, pair_batch, prepare, scored_at_last
from gpt4o_jax.length import row_numbers
from gpt4o_jax.model.gpt import GPT
from gpt4o_jax.ops.compute import Compute, precision
from gpt4o_jax.training.objective import Objective

__all__ = ["begin", "prepare"]


def dpo_loss(beta: float, nll: float, pairs: int, model: GPT, params, batch: Batch, t, key):
    """As Objective.loss: -log sigmoid(margin) + nll * chosen_nll, summed over pairs. pairs: the most in a row."""
    logp_BT, more, of_experts = learned_logprobs(model, params, batch, t, key)
    total, parts = sums(beta, nll, pairs, logp_BT, batch)
    return total + more, parts | of_experts


def margins(beta: float, pairs: int, logp_BT: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """(margin of each pair; its weight, 0 if there is no pair), [B, P] each.

    The margin is beta times the gain of log p(chosen) - log p(rejected) over the reference.
    """
    gain_BT = jnp.where(batch.weights > 0, logp_BT - batch.beside["reference"], 0.0)
    gain_BS, weight_BS = _by_answer(pairs, batch, gain_BT), _by_answer(pairs, batch, batch.weights)
    return beta * (gain_BS[:, 0::2] - gain_BS[:, 1::2]), weight_BS[:, 0::2] + weight_BS[:, 1::2]


def chosen_nll(pairs: int, logp_BT: jax.Array, batch: Batch) -> jax.Array:
    """-log p of each preferred answer, per token, [B, P]; 0 if there is no pair."""
    learned_BT = (batch.weights > 0).astype(jnp.float32)
    logp_BS, tokens_BS = _by_answer(pairs, batch, learned_BT * logp_BT), _by_answer(pairs, batch, learned_BT)
    return -logp_BS[:, 0::2] / jnp.maximum(tokens_BS[:, 0::2], 1)


def _by_answer(pairs: int, batch: Batch, x_BT: jax.Array) -> jax.Array:
    """Sums over the answers of a row, [B, S]: chosen, rejected, chosen, ..."""
    is_of_BTS = (batch.segments[..., None] == 1 + jnp.arange(2 * pairs)).astype(jnp.float32)
    return jnp.einsum("BT,BTS->BS", x_BT, is_of_BTS, precision=precision(jnp.float32))


def sums(beta: float, nll: float, pairs: int, logp_BT: jax.Array, batch: Batch) -> tuple[jax.Array, dict]:
    """(loss, its parts by name), weighted sums over pairs."""
    margin_BP, weight_BP = margins(beta, pairs, logp_BT, batch)
    of_chosen = jnp.sum(weight_BP * chosen_nll(pairs, logp_BT, batch))
    total = nll * of_chosen - jnp.sum(weight_BP * jax.nn.log_sigmoid(margin_BP))
    parts = {"preference_accuracy": margin_BP > 0, "preference_margin": margin_BP}
    return total, {"loss": total, "chosen_nll": of_chosen} | {name: jnp.sum(weight_BP * x) for name, x in parts.items()}


def begin(config: RunConfig, corpus: PairCorpus, folder: epath.Path, mesh: jax.sharding.Mesh, reference: Callable):
    """(Objective, evaluate(model, params, whole) -> scores of the held-out pairs by name) of a run.

    reference(model): the weights the run starts from. Their log-probabilities are cached in `folder`, which must be reserved for
    this, so that the weights are needed only once.
    """
    c, t, symbols = config.objective, config.train, corpus.tokenizer.symbols
    _know_reference(config, corpus, folder, mesh, reference)

    def batches(program, state, start: int, last_step: int):
        sizes, numbers = (t.steps_per_dispatch, t.batch_size), functools.partial(row_numbers, t)
        feed = (config.data.prefetch, numbers, config.data.workers, symbols)
        return dispatches(corpus.training, start, last_step, *sizes, *feed, make=pair_batch)

    evaluate = functools.partial(scores, config, corpus.held_out, symbols)
    return Objective(functools.partial(dpo_loss, c.beta, c.nll, corpus.training.most), ("reference",), batches), evaluate


def scores(config: RunConfig, rows: PairRows, symbols: Symbols, model: GPT, params, whole: bool) -> dict:
    """Metrics of a model on pairs whose reference is known, by name. whole: on all of them, else on eval.max_tokens tokens."""
    most = None if whole else max(1, config.eval.max_tokens // rows.T)
    score = _scorer(config.objective.beta, config.objective.nll, rows.most, model, config.train.loss_chunk)
    found = [jax.device_get(score(params, batch)) for batch in in_order(rows, config.eval.batch_size, symbols, most)]
    total = {name: float(sum(part[name] for part in found)) for name in found[0]}
    pairs = total.pop("pairs")
    return {name: value / pairs for name, value in total.items()} | {"pairs": round(pairs)}


@functools.lru_cache(maxsize=4)
def _scorer(beta: float, nll: float, pairs: int, model: GPT, chunk: int):
    def of_batch(params, batch):
        logp_BT = token_logprobs(model, params, batch, chunk)
        return sums(beta, nll, pairs, logp_BT, batch)[1] | {"pairs": jnp.sum(batch.weights)}

    return jax.jit(of_batch)


def last_scores(config: RunConfig, corpus: PairCorpus, model: GPT, params, reference) -> dict:
    """`scores` on the held-out pairs of the last evaluation (pairs.scored_at_last). Needs the mesh set.

    reference: the weights that the run started from.
    """
    rows, symbols = scored_at_last(config, corpus), corpus.tokenizer.symbols
    rows.reference = _said(config, rows, symbols, model, reference)
    return scores(config, rows, symbols, model, params, whole=True)


def in_order(rows: PairRows, B: int, symbols: Symbols, most: int | None = None) -> Iterator[Batch]:
    """Batches [B, T] of the first `most` rows (None: all), the last one padded with empty rows."""
    count = min(rows.rows_per_epoch, most or rows.rows_per_epoch)
    empty = (np.zeros(rows.T + 1, np.int32),) * 2
    for first in range(0, count, B):
        yield pair_batch([rows.at(r) if r < count else empty for r in range(first, first + B)], symbols)


def _know_reference(config, corpus: PairCorpus, folder: epath.Path, mesh, reference: Callable) -> None:
    """Fills in the reference's log-probability of every target: read from `folder`, or computed and saved there."""
    params = None
    for name, rows in (("training", corpus.training), ("holdout", corpus.held_out)):
        path = folder / f"{corpus.name}-{name}.npy"  # named after the pairs: a run that has not begun may get others
        if not path.exists():
            say(f"log-probabilities of the reference, {rows.count:,} {name} pairs")
            with jax.set_mesh(mesh):
                model = GPT(config.model, Compute.on(mesh, config.model.compute_dtype))
                params = reference(model) if params is None else params
                said = _said(config, rows, corpus.tokenizer.symbols, model, params)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.with_suffix(".tmp").open("wb") as f:
                np.save(f, said)
            path.with_suffix(".tmp").replace(path)
        with path.open("rb") as f:
            rows.reference = np.load(f, allow_pickle=False)


def _said(config, rows: PairRows, symbols: Symbols, model: GPT, params) -> np.ndarray:
    """Log-probabilities of the targets of all rows, [rows, T]."""
    score = scorer(model, config.train.loss_chunk)
    parts = [jax.device_get(score(params, batch)) for batch in in_order(rows, config.train.batch_size, symbols)]
    return np.concatenate(parts)[: rows.rows_per_epoch]
