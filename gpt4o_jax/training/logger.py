"""From the metrics of compiled steps to records, progress and messages."""

import collections
import math

import jax
import numpy as np

from gpt4o_jax import parallel
from gpt4o_jax.console import Progress, say
from gpt4o_jax.length import tokens_before
from gpt4o_jax.model import flops
from gpt4o_jax.training import guards
from gpt4o_jax.training.metrics import MetricsWriter

# Metrics of a step that are not parts of the loss. Parts of the loss are averaged over steps by weight; these are not.
_COUNTED = ("weight", "bytes", "grad_norm", "update_norm", "lr_factor", "skipped_steps", "skipped_in_a_row")


class Logger:
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
        record = self._record(step, m)
        self._writer.write("train", step, record)
        note = f"loss {record['loss']:.3f}"
        self._progress.update(record["tokens"], note)
        if not self._progress.on_terminal:
            say(
                f"step {step}/{self._last_step}  {note}  {record[self._measure]:.3f} {self._measure.replace('_', ' ')}"
                f"  {record['tokens_per_second']:,.0f} tokens/s"
            )

    def _record(self, step: int, m: dict[str, np.ndarray]) -> dict:
        """m: metrics [K] of the dispatch that ends at `step`."""
        config, total = self._config, lambda name: float(np.sum(m[name] * m["weight"]))
        weight = max(float(m["weight"].sum()), 1.0)
        tokens = tokens_before(config, step)
        (seen, busy_then), busy_now = self._window, self._ledger.so_far("step", "data")
        self._window = (tokens, busy_now)
        tokens_per_second = (tokens - seen) / max(busy_now - busy_then, 1e-9)
        record = {
            **{name: total(name) / weight for name in m if name not in _COUNTED and not name.startswith("expert")},
            **{name: float(m[name].mean()) for name in m if name.startswith("expert")},  # load of a mixture of experts
            "grad_norm": float(m["grad_norm"].mean()),
            "update_norm": float(m["update_norm"].mean()),
            "learning_rate": float(m["lr_factor"][-1]) * config.optimizer.peak_lr,
            "tokens": tokens,
            "total_steps": self._last_step,
            "seconds": round(self._ledger.total(), 2),
            "skipped_steps": int(m["skipped_steps"][-1]),
        }
        if config.objective.method == "next_token":
            record["bits_per_byte"] = total("loss") / math.log(2) / max(float(m["bytes"].sum()), 1.0)
        record["tokens_per_second"] = tokens_per_second
        if self._peak:
            record["mfu"] = tokens_per_second * self._flops_per_token / self._peak
        return record | {f"goodput/{kind}": round(share, 4) for kind, share in self._ledger.fractions().items()}

    def keep(self) -> None:
        """Flushes the records to disk; called before a checkpoint."""
        if self._writer is not None:
            self._writer.flush()

    def write(self, kind: str, step: int, values: dict) -> None:
        """Writes a record that is not of training, and says it."""
        if self._writer is not None:
            self._writer.write(kind, step, values)
        say(f"{kind} at step {step}: " + "  ".join(f"{k} {v:.4g}" for k, v in values.items()))

    def close(self) -> None:
        self._progress.close()
        if self._writer is not None:
            self._writer.close()
