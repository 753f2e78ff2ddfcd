"""The training loop: what comes before the first step, the steps, and what is done between them.

One compiled call, a dispatch, runs K = train.steps_per_dispatch optimizer steps. Metrics: logger.py; the state's checkpoints:
checkpoints.py.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from etils import epath

from gpt4o_jax import parallel
from gpt4o_jax.checkpoint.store import Store
from gpt4o_jax.config import RunConfig
from gpt4o_jax.console import say
from gpt4o_jax.data.batches import dispatches
from gpt4o_jax.data.corpus import Corpus
from gpt4o_jax.data.tokenizer import byte_lengths
from gpt4o_jax.errors import ExitCode, RunError
from gpt4o_jax.length import in_epochs, row_numbers, total_steps
from gpt4o_jax.model import flops, gpt, lora
from gpt4o_jax.training import guards
from gpt4o_jax.training.best import STOPPED, Best
from gpt4o_jax.training.checkpoints import newest_step, restore_state, save_state
from gpt4o_jax.training.logger import Logger
from gpt4o_jax.training.metrics import Ledger, read_metrics
from gpt4o_jax.training.objective import Objective
from gpt4o_jax.training.optimizer import eval_params
from gpt4o_jax.training.peak import peak_flops
from gpt4o_jax.training.program import Program, build
from gpt4o_jax.training.state import TrainState
from gpt4o_jax.training.tracing import Trace


def train(
    config: RunConfig,
    workdir: epath.Path,
    corpus: Corpus,
    mesh: jax.sharding.Mesh,
    evaluate: Callable[[gpt.GPT, dict, bool], dict],
    sample: Callable[[gpt.GPT, dict], str],
    initial_params: Callable[[gpt.GPT], dict] | None = None,
    profile: tuple[int, int] | None = None,
    stop: guards.StopSignal | None = None,
    peers: parallel.Peers | None = None,
    kept: dict | None = None,
    objective: Objective = Objective(),
) -> TrainState:
    """Trains from the newest intact checkpoint in `workdir`, or from step 0, to the end of the run.

    config: with model.vocab_size and compute_dtype resolved.
    corpus: a Corpus, or the objective's substitute with the same name, tokenizer, size, in_lanes and rows().
    evaluate(model, params, whole) -> metrics, and sample(model, params) -> text: called every eval.every and sample.every steps
    and at the end; whole: evaluate the entire hold-out.
    initial_params(model): initial weights of a fresh run; with LoRA the frozen base weights, needed at every start.
    profile: (first, last): trace the dispatches that contain steps first + 1 to last.
    stop: after it has received a signal, the current dispatch is finished and saved; with `peers`, on all processes at the same
    step.
    kept: additional entries for the checkpoints' manifests.
    Returns the final state. Raises RunError with the exit codes usage (2: a profile outside the run), data (3: no intact
    checkpoint, or one of another config), diverged (4), storage (5), stopped by a signal (75), peer lost (76).
    """
    ledger, peers = Ledger(), peers or parallel.Peers()
    with jax.set_mesh(mesh), ledger.time("init"):
        program = build(config, mesh, objective)
        rows = corpus.rows(config)
        for text in corpus.in_lanes:
            text.take(workdir / "lanes")
        last_step = total_steps(config, rows.tokens_per_epoch if in_epochs(config) else 0)
        _warn_if_short(config, last_step)

        store = Store(workdir / "checkpoints", config.checkpoint.keep_last, config.checkpoint.keep_every)
        peers.at("the newest checkpoint", times=10)
        start = parallel.share("newest checkpoint", lambda: newest_step(store, workdir))
        peers.at("the state", times=10)
        if start is None:
            start, state = 0, _first_state(program, initial_params)
        else:
            state = restore_state(store, start, program.shapes, program.shardings)
            say(f"continuing from step {start} of {last_step}")
        if config.lora.rank:
            state = state.replace(base=initial_params(program.model))
        _check_profile(profile, start, last_step)
        peers.at("the records of metrics", times=10)
        best = _best_so_far(config, workdir, store, start)
    if start == last_step or best.stopped:
        why = f"no better {best.metric} after step {best.step}" if best.stopped else f"its last step, {last_step}"
        peers.at(None)
        say(f"nothing left to train: {workdir} is at step {start}, {why}")
        return state

    peers.at("compiling", times=10)
    with jax.set_mesh(mesh), ledger.time("compile"):
        compiled = program.compile(last_step, byte_lengths(corpus.tokenizer))
        # Without a barrier, processes that compile faster would wait in the first collective, where gloo times out after 30 s.
        parallel.barrier("compiled")
    with ledger.time("init"):
        peak = peak_flops(jax.local_devices()[0], config.model.compute_dtype)
    say(f"{_description(program, state)}; {_length(config, last_step)}; {corpus.size}{_fill(rows)}")

    logger = Logger(config, workdir, start, last_step, peak, mesh, ledger)
    between = _BetweenDispatches(
        program=program,
        workdir=workdir,
        last_step=last_step,
        corpus=corpus,
        evaluate=evaluate,
        sample=sample,
        store=store,
        logger=logger,
        best=best,
        ledger=ledger,
        peers=peers,
        kept=kept or {},
    )
    trace, step = Trace(profile if parallel.is_leader() else None, workdir / "profile"), start
    K = config.train.steps_per_dispatch
    shape = (K, config.train.batch_size, config.model.context_length)
    try:
        with jax.set_mesh(mesh):
            if objective.batches is None:
                batches = _batches(program, corpus, rows, start, last_step, shape)
            else:
                batches = objective.batches(program, lambda: state, start, last_step)
            last = False
            while not last:
                peers.at("data")
                with ledger.time("data"):
                    step, batch = next(batches)
                    batch = jax.make_array_from_process_local_data(program.batch_sharding, batch, shape)
                trace.before(step - K + 1, step)
                peers.at(f"step {step}")
                with ledger.time("step"):
                    with jax.profiler.StepTraceAnnotation("train", step_num=step):
                        state, metrics = compiled(state, batch)
                    # Reads the metrics of the previous dispatch, while the device is busy with this one.
                    logger.receive(step, metrics)
                trace.after(step, state)
                store.poll()

                agreed = peers.stop_at(step, K, stop.received if stop is not None else None)
                stopping = agreed is not None and step >= agreed[0]
                last = between.do_due(step, state, stopping)  # evaluation, samples, checkpoint
                if stopping and not last:
                    raise RunError(
                        f"stopped by {agreed[1]} at step {step} of {last_step}, saved; run the same command again to continue",
                        ExitCode.SIGNAL,
                    )
            batches.close()
            peers.at("the last checkpoint", times=10)
            with ledger.time("checkpoint"):
                store.close()
    except RunError as e:
        if e.code != ExitCode.PEER_LOST:  # otherwise closing would wait for the lost process
            with ledger.time("checkpoint"):
                store.close()  # finishes the checkpoint being written
        raise
    finally:
        peers.at(None)
        logger.close()
        trace.end(step)
    return state


@dataclasses.dataclass
class _BetweenDispatches:
    """Evaluation, samples and checkpoints. Fields: as the arguments and local variables of `train`."""

    program: Program
    workdir: epath.Path
    last_step: int
    corpus: Corpus
    evaluate: Callable[[gpt.GPT, dict, bool], dict]
    sample: Callable[[gpt.GPT, dict], str]
    store: Store
    logger: Logger
    best: Best
    ledger: Ledger
    peers: parallel.Peers
    kept: dict

    def do_due(self, step: int, state: TrainState, stopping: bool) -> bool:
        """Does what is due at a step; stopping: save in any case. Returns whether the run ends here."""
        config, last = self.program.config, step == self.last_step
        due = lambda every: last or (every and step % every == 0)
        if not (due(config.eval.every) or due(config.sample.every) or due(config.checkpoint.every) or stopping):
            return False
        with self.ledger.time("step"):
            self.logger.flush()
        averaged = eval_params(config.optimizer, state)
        params = lora.beside(state.base, averaged, config.lora.scale)
        improved = False
        if due(config.eval.every):
            self.peers.at(f"the evaluation of step {step}", times=10)
            with self.ledger.time("eval"):
                improved, last = self._evaluate(step, params, last)  # after early stopping, everything below is due
        if due(config.sample.every):
            self.peers.at(f"the samples of step {step}", times=10)
            with self.ledger.time("sample"):
                self._sample(step, params)
        wanted = last or stopping or improved
        if due(config.checkpoint.every) and self.logger.skipped and not wanted:
            say(f"no checkpoint at step {step}, which had a non-finite loss: the weights may be the reason")
        elif wanted or due(config.checkpoint.every):
            self.peers.at(f"the checkpoint of step {step}", times=10)
            with self.ledger.time("checkpoint"):
                self._save(step, state, averaged)
        return last

    def _evaluate(self, step: int, params: dict, last: bool) -> tuple[bool, bool]:
        """Returns whether the weights are the best so far, and whether the run ends: `last`, or early stopping."""
        best = self.best
        values = self.evaluate(self.program.model, params, last and not best.metric)
        improved = best.take(step, values)
        given_up = best.exhausted and not last
        if given_up:
            say(f"stopping: no better {best.metric} in {self.program.config.train.patience} evaluations")
        last |= given_up
        if last and best.metric:  # selection is over: score the whole hold-out, or an unused part
            values = self.evaluate(self.program.model, params, True) | ({STOPPED: 1} if given_up else {})
        self.logger.write("eval", step, values)
        return improved, last

    def _sample(self, step: int, params: dict) -> None:
        text = self.sample(self.program.model, params)
        if parallel.is_leader():
            folder = self.workdir / "samples"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{step}.txt").write_text(text)

    def _save(self, step: int, state: TrainState, averaged: dict) -> None:
        for text in self.corpus.in_lanes:
            text.keep(self.workdir / "lanes", jax.process_index())
        self.logger.keep()
        save_state(self.store, step, state, averaged, self.corpus, self.kept | self.best.kept)


# ---------------------------------------------------------------- before the first step


def _first_state(program: Program, initial_params: Callable[[gpt.GPT], dict] | None) -> TrainState:
    """The state of step 0: random weights or those of `initial_params`, made in their shards; LoRA's `base` stays None."""
    config = program.config
    state = program.fresh(jax.random.key(config.seed))
    if config.lora.rank:
        return state.replace(base=None)  # frees the memory before the real base weights are loaded
    if initial_params is None:
        if config.init.model:
            say("init.from is not set: weights start at random, not from a run")
        return state
    averaged = state.ema is not None
    state = state.replace(params=None, opt_state=None, ema=None)  # frees it before the given weights are loaded
    params = initial_params(program.model)
    # Schedule-Free AdamW keeps a second copy of the weights, which must start equal to them.
    opt_state = jax.jit(program.optimizer.init, out_shardings=program.shardings.opt_state)(params)
    return state.replace(params=params, opt_state=opt_state, ema=jax.tree.map(jnp.copy, params) if averaged else None)


def _best_so_far(config: RunConfig, workdir: epath.Path, store: Store, start: int) -> Best:
    """As the leading process finds it in the records and checkpoints up to the step `start`."""

    def recorded() -> tuple:
        records = [r for r in read_metrics(workdir) if r["step"] <= start]
        meta = store.meta(start) if start else {}
        since = meta.get("since") if meta.get("metric") == config.checkpoint.best else None  # None: chose by another metric
        return records, store.steps(), since

    return Best(config.checkpoint.best, config.train.patience, *parallel.share("records", recorded))


def _batches(program: Program, corpus: Corpus, rows, start: int, last_step: int, shape: tuple[int, int, int]):
    """Yields (step after the dispatch, the part of Batch [K, B, T] that this process needs)."""
    config, feed = program.config, program.config.data
    numbers = functools.partial(row_numbers, config.train)
    mine = parallel.places(program.batch_sharding, shape, axis=1)  # each process builds only its own rows
    return dispatches(rows, start, last_step, *shape[:2], feed.prefetch, numbers, feed.workers, corpus.tokenizer.symbols, mine)


def _warn_if_short(config: RunConfig, last_step: int) -> None:
    """Messages, not errors: short trials use the config of a longer run."""
    warmup, warming = config.optimizer.warmup_steps, config.train.batch_warmup_steps
    if warmup >= last_step:
        reached = f"reaches {last_step / (warmup + 1):.0%} of its peak"
        say(f"the learning rate {reached}: optimizer.warmup_steps={warmup} is not less than the {last_step} steps of the run")
    if warming >= last_step:
        say(f"no batch is whole: train.batch_warmup_steps={warming} is not less than the {last_step} steps of the run")


def _check_profile(profile: tuple[int, int] | None, start: int, last_step: int) -> None:
    if profile and profile[1] <= start:
        raise RunError(f"train: --profile={profile[0]}:{profile[1]}: the run goes on from step {start}; end after it")
    if profile and profile[0] >= last_step:
        raise RunError(f"train: --profile={profile[0]}:{profile[1]}: the run has {last_step} steps; begin before its end")


def _description(program: Program, state: TrainState) -> str:
    m, devices = program.config.model, program.mesh.devices
    active = f" ({flops.parameter_count(m, active=True):,} active)" if m.n_experts else ""
    adapters = f" and {sum(x.size for x in jax.tree.leaves(state.params)):,} of adapters" if program.config.lora.rank else ""
    staged = f" as {program.order}" if program.order.stages > 1 else ""
    return (
        f"model {flops.parameter_count(m):,} parameters{active}{adapters}, {m.compute_dtype} products, attention by"
        f" {program.attention}, on {devices.size} {devices.flat[0].device_kind} device(s){staged}"
    )


def _length(config: RunConfig, last_step: int) -> str:
    return f"{last_step} steps of {config.train.batch_size} x {config.model.context_length} tokens"


def _fill(rows) -> str:
    return f", rows {rows.fill:.1%} full" if rows.fill else ""
