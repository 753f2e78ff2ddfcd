"""The training loop, top to bottom. One compiled call, a dispatch, runs K = train.steps_per_dispatch optimizer steps."""

import collections
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from gpt4o_jax import parallel
from gpt4o_jax.checkpoint.store import Store
from gpt4o_jax.config import RunConfig
from gpt4o_jax.console import Progress, say
from gpt4o_jax.data.batches import dispatches
from gpt4o_jax.data.corpus import Corpus
from gpt4o_jax.data.tokenizer import byte_lengths
from gpt4o_jax.errors import ExitCode, RunError
from gpt4o_jax.length import in_epochs, row_numbers, tokens_before, total_steps
from gpt4o_jax.model import flops, gpt, lora
from gpt4o_jax.training import guards
from gpt4o_jax.training.best import STOPPED, Best
from gpt4o_jax.training.metrics import Ledger, MetricsWriter, read_metrics
from gpt4o_jax.training.objective import Objective
from gpt4o_jax.training.optimizer import eval_params
from gpt4o_jax.training.peak import peak_flops
from gpt4o_jax.training.program import build
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
    ledger, peers, leads = Ledger(), peers or parallel.Peers(), parallel.is_leader()
    with jax.set_mesh(mesh), ledger.time("init"):
        # ------------------------------------------------------------ model, optimizer, data
        program = build(config, mesh, objective)
        model, optimizer, shardings = program.model, program.optimizer, program.shardings
        K, B, T = config.train.steps_per_dispatch, config.train.batch_size, config.model.context_length
        rows = corpus.rows(config)
        for text in corpus.in_lanes:
            text.take(workdir / "lanes")
        last_step = total_steps(config, rows.tokens_per_epoch if in_epochs(config) else 0)
        warmup = config.optimizer.warmup_steps
        if warmup >= last_step:  # a message, not an error: short trials use the config of a longer run
            reached = f"reaches {last_step / (warmup + 1):.0%} of its peak"
            say(f"the learning rate {reached}: optimizer.warmup_steps={warmup} is not less than the {last_step} steps of the run")
        if config.train.batch_warmup_steps >= last_step:
            warming = f"train.batch_warmup_steps={config.train.batch_warmup_steps}"
            say(f"no batch is whole: {warming} is not less than the {last_step} steps of the run")

        # ------------------------------------------------------------ state: restored or initialised, already sharded
        store = Store(workdir / "checkpoints", config.checkpoint.keep_last, config.checkpoint.keep_every)
        peers.at("the newest checkpoint", times=10)
        start = parallel.share("newest checkpoint", lambda: _newest(store, workdir))
        peers.at("the state", times=10)
        if start is None:
            state = program.fresh(jax.random.key(config.seed))
            if config.lora.rank:
                state = state.replace(base=None)  # frees the memory before the real base weights are loaded
            elif initial_params is not None:
                averaged = state.ema is not None
                state = state.replace(params=None, opt_state=None, ema=None)  # likewise
                params = initial_params(model)
                # Schedule-Free AdamW keeps a second copy of the weights, which must start equal to them.
                opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params)
                ema = jax.tree.map(jnp.copy, params) if averaged else None
                state = state.replace(params=params, opt_state=opt_state, ema=ema)
            elif config.init.model:
                say("init.from is not set: weights start at random, not from a run")
        else:
            state = restore_state(store, start, program.shapes, shardings)
            say(f"continuing from step {start} of {last_step}")
        if config.lora.rank:
            state = state.replace(base=initial_params(model))
        start = start or 0
        if profile and profile[1] <= start:
            raise RunError(f"train: --profile={profile[0]}:{profile[1]}: the run goes on from step {start}; end after it")
        if profile and profile[0] >= last_step:
            raise RunError(f"train: --profile={profile[0]}:{profile[1]}: the run has {last_step} steps; begin before its end")
        peers.at("the records of metrics", times=10)
        recorded = lambda: (
            [r for r in read_metrics(workdir) if r["step"] <= start],
            store.steps(),
            _since(store.meta(start), config.checkpoint.best) if start else None,
        )
        best = Best(config.checkpoint.best, config.train.patience, *parallel.share("records", recorded))
    if start == last_step or best.stopped:
        why = f"no better {best.metric} after step {best.step}" if best.stopped else f"its last step, {last_step}"
        peers.at(None)
        say(f"nothing left to train: {workdir} is at step {start}, {why}")
        return state

    # ------------------------------------------------------------ compile
    peers.at("compiling", times=10)
    with jax.set_mesh(mesh), ledger.time("compile"):
        compiled = program.compile(last_step, byte_lengths(corpus.tokenizer))
        # Without a barrier, processes that compile faster would wait in the first collective, where gloo times out after 30 s.
        parallel.barrier("compiled")
    with ledger.time("init"):
        peak = peak_flops(jax.local_devices()[0], config.model.compute_dtype)
    active = f" ({flops.parameter_count(config.model, active=True):,} active)" if config.model.n_experts else ""
    if config.lora.rank:
        active += f" and {sum(x.size for x in jax.tree.leaves(state.params)):,} of adapters"
    staged = f" as {program.order}" if program.order.stages > 1 else ""
    say(
        f"model {flops.parameter_count(config.model):,} parameters{active}, {config.model.compute_dtype} products, attention by"
        f" {program.attention}, on {mesh.devices.size} {mesh.devices.flat[0].device_kind} device(s){staged};"
        f" {last_step} steps of {B} x {T} tokens; {corpus.size}" + (f", rows {rows.fill:.1%} full" if rows.fill else "")
    )

    # ------------------------------------------------------------ the loop
    logger = _Logger(config, workdir, start, last_step, peak, mesh, ledger)
    trace, step = Trace(profile if leads else None, workdir / "profile"), start
    try:
        with jax.set_mesh(mesh):
            numbers = functools.partial(row_numbers, config.train)
            feed, symbols = config.data, corpus.tokenizer.symbols
            mine = parallel.places(program.batch_sharding, (K, B, T), axis=1)  # each process builds only its own rows
            if objective.batches is None:
                batches = dispatches(rows, start, last_step, K, B, feed.prefetch, numbers, feed.workers, symbols, mine)
            else:
                batches = objective.batches(program, lambda: state, start, last_step)
            while True:
                peers.at("data")
                with ledger.time("data"):
                    step, batch = next(batches)
                    batch = jax.make_array_from_process_local_data(program.batch_sharding, batch, (K, B, T))
                trace.before(step - K + 1, step)
                peers.at(f"step {step}")
                with ledger.time("step"):
                    with jax.profiler.StepTraceAnnotation("train", step_num=step):
                        state, metrics = compiled(state, batch)
                    # Reads the metrics of the previous dispatch, while the device is busy with this one.
                    logger.receive(step, metrics)
                trace.after(step, state)
                store.poll()

                last = step == last_step
                due = lambda every: last or (every and step % every == 0)
                agreed = peers.stop_at(step, K, stop.received if stop is not None else None)
                stopping = agreed is not None and step >= agreed[0]
                improved = False
                if due(config.eval.every) or due(config.sample.every) or due(config.checkpoint.every) or stopping:
                    with ledger.time("step"):
                        logger.flush()
                    averaged = eval_params(config.optimizer, state)
                    params = lora.beside(state.base, averaged, config.lora.scale)
                    if due(config.eval.every):
                        peers.at(f"the evaluation of step {step}", times=10)
                        with ledger.time("eval"):
                            values = evaluate(model, params, last and not best.metric)
                            improved = best.take(step, values)
                            given_up = best.exhausted and not last
                            if given_up:
                                say(f"stopping: no better {best.metric} in {config.train.patience} evaluations")
                            last |= given_up
                            if last and best.metric:  # selection is over: score the whole hold-out, or an unused part
                                values = evaluate(model, params, True) | ({STOPPED: 1} if given_up else {})
                            logger.write("eval", step, values)
                    if due(config.sample.every):
                        peers.at(f"the samples of step {step}", times=10)
                        with ledger.time("sample"):
                            text = sample(model, params)
                            if leads:
                                (workdir / "samples").mkdir(parents=True, exist_ok=True)
                                (workdir / "samples" / f"{step}.txt").write_text(text)
                    wanted = last or stopping or improved
                    if due(config.checkpoint.every) and logger.skipped and not wanted:
                        say(f"no checkpoint at step {step}, which had a non-finite loss: the weights may be the reason")
                    elif wanted or due(config.checkpoint.every):
                        peers.at(f"the checkpoint of step {step}")
                        with ledger.time("checkpoint"):
                            for text in corpus.in_lanes:
                                text.keep(workdir / "lanes", jax.process_index())
                            logger.keep()
                            save_state(store, step, state, averaged, corpus, (kept or {}) | best.kept)
                if stopping and not last:
                    raise RunError(
                        f"stopped by {agreed[1]} at step {step} of {last_step}, saved; run the same command again to continue",
                        ExitCode.SIGNAL,
                    )
                if last:
                    batches.close()
                    break
            peers.at("the last checkpoint")
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


def _newest(store: Store, workdir: epath.Path) -> int | None:
    """The step to resume from, after removing what a killed process left behind; None: a fresh run."""
    store.clean()
    had_checkpoints = bool(store.steps()) or store.has_corrupt()  # corrupt ones were set aside, now or before
    start = store.newest_intact(say)
    if start is None and had_checkpoints:
        raise RunError(f"{workdir}: no checkpoint of this run is intact; remove the folder to start again", ExitCode.DATA)
    return start


# Metrics of a step that are not parts of the loss. Parts of the loss are averaged over steps by weight; these are not.
_COUNTED = ("weight", "bytes", "grad_norm", "update_norm", "lr_factor", "skipped_steps", "skipped_in_a_row")


def _since(meta: dict, metric: str) -> int | None:
    """Evaluations without a better one up to a checkpoint, by its manifest; None if it chose by another metric."""
    return meta.get("since") if meta.get("metric") == metric else None


class _Logger:
    """Converts device metrics to records of metrics.jsonl, one dispatch late so that the host never waits for the device."""

    def __init__(self, config, workdir, start, last_step, peak, mesh, ledger):
        self._config, self._workdir, self._last_step, self._ledger = config, workdir, last_step, ledger
        self._measure = config.objective.measure
        self._writer = MetricsWriter(workdir, start, config) if parallel.is_leader() else None
        if self._writer is not None:
            ledger.add(self._writer.spent)
        self._progress = Progress(tokens_before(config, last_step), tokens_before(config, start))
        self._flops_per_token = flops.train_flops_per_token(config.model, config.lora.rank > 0)
        # Simulated CPU devices share one machine, and the peak was measured for all of it.
        devices = 1 if mesh.devices.flat[0].platform == "cpu" else mesh.devices.size
        self._peak = peak and peak * devices
        self.skipped = False  # whether the newest step was skipped because of a non-finite loss or gradient
        self._waiting = collections.deque()
        self._window = (tokens_before(config, start), ledger.so_far("step", "data"))

    def receive(self, step: int, metrics: dict) -> None:
        """Queues the metrics of the dispatch just launched, and reads those of the previous one."""
        self._waiting.append((step, metrics))
        while len(self._waiting) > 1:
            self._read(*self._waiting.popleft())

    def flush(self) -> None:
        """Reads all queued metrics; waits for the device."""
        while self._waiting:
            self._read(*self._waiting.popleft())

    def _read(self, step: int, metrics: dict) -> None:
        m = {name: np.asarray(value, np.float64) for name, value in jax.device_get(metrics).items()}
        self.skipped = bool(m["skipped_in_a_row"][-1])
        limit = self._config.train.max_skipped_in_a_row
        guards.check_divergence(int(m["skipped_in_a_row"].max()), step, limit, self._workdir)
        if self._writer is None or (step % self._config.log.every and step != self._last_step):
            return
        total = lambda name: float(np.sum(m[name] * m["weight"]))
        weight = max(float(m["weight"].sum()), 1.0)
        tokens = tokens_before(self._config, step)
        (seen, busy_then), busy_now = self._window, self._ledger.so_far("step", "data")
        self._window = (tokens, busy_now)
        tokens_per_second = (tokens - seen) / max(busy_now - busy_then, 1e-9)
        record = {
            **{name: total(name) / weight for name in m if name not in _COUNTED and not name.startswith("expert")},
            **{name: float(m[name].mean()) for name in m if name.startswith("expert")},  # load of a mixture of experts
            "grad_norm": float(m["grad_norm"].mean()),
            "update_norm": float(m["update_norm"].mean()),
            "learning_rate": float(m["lr_factor"][-1]) * self._config.optimizer.peak_lr,
            "tokens": tokens,
            "total_steps": self._last_step,
            "seconds": round(self._ledger.total(), 2),
            "skipped_steps": int(m["skipped_steps"][-1]),
        }
        if self._config.objective.method == "next_token":
            record["bits_per_byte"] = total("loss") / math.log(2) / max(float(m["bytes"].sum()), 1.0)
        record["tokens_per_second"] = tokens_per_second
        if self._peak:
            record["mfu"] = tokens_per_second * self._flops_per_token / self._peak
        record |= {f"goodput/{kind}": round(share, 4) for kind, share in self._ledger.fractions().items()}
        self._writer.write("train", step, record)
        note = f"loss {record['loss']:.3f}"
        self._progress.update(tokens, note)
        if not self._progress.on_terminal:
            say(
                f"step {step}/{self._last_step}  {note}  {record[self._measure]:.3f} {self._measure.replace('_', ' ')}"
                f"  {record['tokens_per_second']:,.0f} tokens/s"
            )

    def keep(self) -> None:
        """Flushes the records to disk; called before a checkpoint."""
        if self._writer is not None:
            self._writer.flush()

    def write(self, kind: str, step: int, values: dict) -> None:
        if self._writer is not None:
            self._writer.write(kind, step, values)
        say(f"{kind} at step {step}: " + "  ".join(f"{k} {v:.4g}" for k, v in values.items()))

    def close(self) -> None:
        self._progress.close()
        if self._writer is not None:
            self._writer.close()


# ---------------------------------------------------------------- checkpoints of a TrainState


def save_state(store: Store, step: int, state: TrainState, averaged, corpus: Corpus, kept: dict | None = None) -> None:
    """Saves the trained part of the state as separately restorable items. averaged: the weights for evaluation (eval_params)."""
    items = {"params": state.params, "opt_state": state.opt_state, "counters": _counters(state)}
    if averaged is not state.params:
        items["ema"] = averaged
    store.save(step, items, {"step": step, "corpus": corpus.name, "tokenizer": corpus.tokenizer.digest, **(kept or {})})


def restore_state(store: Store, step: int, shapes: TrainState, shardings: TrainState) -> TrainState:
    """Restores what `save_state` saved, each device reading only its shards; LoRA's `base` stays None.

    Raises RunError if the checkpoint has other leaves, shapes or dtypes.
    """
    like = _with_shardings(shapes, shardings)
    like = like.replace(rng=jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=shardings.rng))
    counters = store.restore(step, "counters", _counters(like, wrap=False))
    return TrainState(
        step=counters["step"],
        params=store.restore(step, "params", like.params),
        opt_state=store.restore(step, "opt_state", like.opt_state),
        ema=None if like.ema is None else store.restore(step, "ema", like.ema),
        rng=jax.random.wrap_key_data(counters["rng"]),
        skipped_steps=counters["skipped_steps"],
        skipped_in_a_row=counters["skipped_in_a_row"],
    )


def _counters(state: TrainState, wrap: bool = True) -> dict:
    names = ("step", "skipped_steps", "skipped_in_a_row")
    return {n: getattr(state, n) for n in names} | {"rng": jax.random.key_data(state.rng) if wrap else state.rng}


def _with_shardings(shapes, shardings):
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
