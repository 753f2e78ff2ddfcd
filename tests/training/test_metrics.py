"""metrics.jsonl has each (kind, step) once despite kills; time shares sum to 1; the host reads metrics one dispatch late."""

import json
import sys
import tempfile
import time
import types

import jax
import numpy as np
import pytest
from etils import epath

from gpt4o_jax import parallel
from gpt4o_jax.config import LogConfig, ModelConfig, RunConfig, TrainConfig
from gpt4o_jax.errors import RunError
from gpt4o_jax.training import metrics
from gpt4o_jax.training.logger import Logger
from gpt4o_jax.training.metrics import Ledger, MetricsWriter, read_metrics

QUIET = RunConfig(log=LogConfig(tensorboard=False))


@pytest.fixture
def workdir(tmp_path):
    return epath.Path(tmp_path)


def keys(workdir):
    return [(r["kind"], r["step"]) for r in read_metrics(workdir)]


def write(workdir, resume_step, records):
    writer = MetricsWriter(workdir, resume_step, config=QUIET)
    for kind, step, value in records:
        writer.write(kind, step, {"loss": value})
    writer.close()


def test_a_resumed_writer_keeps_each_step_once(workdir):
    """Killed at step 40 with a checkpoint at step 20: records after 20 are written again."""
    write(workdir, 0, [("train", 10, 1.0), ("train", 20, 2.0), ("eval", 20, 2.5), ("train", 30, 3.0), ("eval", 40, 4.0)])
    write(workdir, 20, [("train", 30, 3.5), ("train", 40, 4.5), ("eval", 40, 4.75)])
    assert keys(workdir) == [("train", 10), ("train", 20), ("eval", 20), ("train", 30), ("train", 40), ("eval", 40)]
    assert [r["loss"] for r in read_metrics(workdir)] == [1.0, 2.0, 2.5, 3.5, 4.5, 4.75]


def test_what_is_not_finite_is_null_in_the_file_and_nan_to_its_readers(workdir):
    MetricsWriter(workdir, 0, QUIET).write("train", 1, {"loss": float("nan"), "grad_norm": float("inf"), "tokens": 3})
    for _ in range(2):  # also after it is rewritten
        line = (workdir / "metrics.jsonl").read_text()
        refuse = lambda constant: pytest.fail(f"{constant} is not JSON")
        assert json.loads(line, parse_constant=refuse) == {
            "kind": "train", "step": 1, "loss": None, "grad_norm": None, "tokens": 3
        }  # fmt: skip
        (record,) = read_metrics(workdir)
        assert np.isnan([record["loss"], record["grad_norm"]]).all() and record["tokens"] == 3
        MetricsWriter(workdir, 1, QUIET).close()


@pytest.mark.parametrize("torn", ['{"kind": "train", "step": 3', '{"kind": "train", "step": 30, "loss": 1.0}', "{"])
def test_a_torn_last_line_is_dropped(workdir, torn):
    """A record counts only with its line break, and the next record never continues it."""
    write(workdir, 0, [("train", 10, 1.0), ("train", 20, 2.0)])
    with open(workdir / "metrics.jsonl", "a") as f:
        f.write(torn)
    assert keys(workdir) == [("train", 10), ("train", 20)]
    write(workdir, 30, [("train", 40, 4.0)])
    assert keys(workdir) == [("train", 10), ("train", 20), ("train", 40)]
    assert [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()] == [10, 20, 40]


def test_no_file_is_no_records(workdir):
    assert read_metrics(workdir) == []


def test_ledger_fractions_sum_to_one():
    ledger = Ledger()
    for kind in ("init", "step", "step", "data"):
        with ledger.time(kind):
            time.sleep(0.01)
            inside = ledger.fractions()
            assert inside[kind] > 0 and sum(inside.values()) == pytest.approx(1)
    with pytest.raises(ValueError), ledger.time("eval"):
        raise ValueError
    time.sleep(0.01)
    shares = ledger.fractions()
    assert set(shares) == {*Ledger.KINDS, "other"} and sum(shares.values()) == pytest.approx(1)
    assert all(0 <= share <= 1 for share in shares.values()) and shares["other"] > 0
    assert ledger.so_far("step") >= 0.02 > 0.0 == ledger.so_far("checkpoint")


def test_time_goes_on_over_a_kill(workdir):
    """Checkpoint at step 20, 100 s into the run; killed at step 30, after 150 s: 50 s were lost."""
    writer = MetricsWriter(workdir, 0, config=QUIET)
    assert writer.spent == {}
    shares = {"goodput/step": 0.75, "goodput/other": 0.25}
    writer.write("train", 20, {"seconds": 100.0, **shares})
    writer.write("eval", 20, {"loss": 1.0})
    writer.write("train", 30, {"seconds": 150.0, **shares})
    writer.close()
    writer = MetricsWriter(workdir, 20, config=QUIET)
    writer.close()
    ledger = Ledger()
    ledger.add(writer.spent)
    assert ledger.total() == pytest.approx(150, abs=1)
    assert [ledger.so_far(kind) for kind in ("step", "lost", "init")] == pytest.approx([75, 50, 0])
    shares = ledger.fractions()
    assert shares["other"] == pytest.approx(25 / 150, abs=0.01) and sum(shares.values()) == pytest.approx(1)


# ---------------------------------------------------------------- Weights & Biases


class FakeWandb(types.ModuleType):
    """Records what it is given."""

    def __init__(self):
        super().__init__("wandb")
        self.runs, self.logged, self.finished = [], [], 0

    def init(self, **how):
        self.runs.append(how)
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


WANDB = RunConfig(log=LogConfig(tensorboard=False, wandb="my project"))


def test_wandb_gets_every_record_of_one_run_across_restarts(workdir, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", fake := FakeWandb())
    for resume in (0, 10):
        writer = MetricsWriter(workdir, resume, WANDB)
        writer.write("train", resume + 10, {"loss": 1.5})
        writer.write("eval", resume + 10, {"loss": 2.5})
        writer.close()
    first, second = fake.runs
    assert first == second and first["project"] == "my project" and first["resume"] == "allow"
    assert first["config"]["log.wandb"] == "my project" and first["dir"] == str(workdir)
    assert fake.logged == [(step, {f"{kind}/loss": v}) for step in (10, 20) for kind, v in (("train", 1.5), ("eval", 2.5))]
    assert fake.finished == 2 and [r["step"] for r in read_metrics(workdir)] == [10, 10, 20, 20]


def test_wandb_that_cannot_start_is_one_line(workdir, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", fake := FakeWandb())
    monkeypatch.setattr(fake, "init", lambda **_: 1 / 0)
    with pytest.raises(RunError, match="division by zero; `wandb login`, or set"):
        MetricsWriter(workdir, 0, WANDB)


def test_wandb_is_not_imported_unasked(workdir, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    MetricsWriter(workdir, 0, QUIET).close()
    with pytest.raises(RunError, match="pip install -r requirements-wandb"):
        MetricsWriter(workdir, 0, WANDB)


# ---------------------------------------------------------------- one dispatch late


class Metric:
    """An array of K values that the device has not computed yet: records when its values are read."""

    def __init__(self, log, step, values):
        self._log, self._step, self._values = log, step, values

    def __array__(self, dtype=None, copy=None):
        self._log.append(self._step)
        return np.asarray(self._values, dtype)


NAMES = ("loss", "weight", "bytes", "grad_norm", "update_norm", "lr_factor", "skipped_steps", "skipped_in_a_row")


@pytest.fixture
def logger(workdir):
    config = RunConfig(
        model=ModelConfig(vocab_size=40, d_model=16, n_heads=2, context_length=8),
        train=TrainConfig(steps_per_dispatch=2, max_skipped_in_a_row=3),
        log=LogConfig(every=2, tensorboard=False),
    )
    made = Logger(config, workdir, 0, 8, None, parallel.make_mesh(devices=jax.devices()[:1]), Ledger())
    yield made
    made.close()


def dispatch(log, step, **changes):
    return {name: Metric(log, step, [changes.get(name, 1.0)] * 2) for name in NAMES}


def test_metrics_are_read_after_the_next_dispatch_is_sent(logger, workdir):
    log = []
    logger.receive(2, dispatch(log, 2))
    assert log == [], "the device is still at work on step 2: reading would wait for it"
    logger.receive(4, dispatch(log, 4, loss=2.0))
    assert set(log) == {2} and keys(workdir) == [("train", 2)]
    logger.receive(6, dispatch(log, 6))
    assert set(log) == {2, 4} and keys(workdir) == [("train", 2), ("train", 4)]
    logger.flush()
    assert set(log) == {2, 4, 6} and len(log) == 3 * len(NAMES), "each value is read once"
    assert [r["loss"] for r in read_metrics(workdir)] == [1.0, 2.0, 1.0]


def test_divergence_is_told_with_its_exit_code_and_what_works_then(logger, workdir):
    log = []
    logger.receive(2, dispatch(log, 2, skipped_in_a_row=2))
    logger.receive(4, dispatch(log, 4, skipped_in_a_row=3))
    with pytest.raises(RunError, match="3 steps in a row") as e:
        logger.flush()
    assert e.value.code == 4
    assert "a new --workdir with a lower optimizer.peak_lr" in str(e.value) and f"--config.init.from={workdir} " in str(e.value)


def test_where_nothing_can_be_appended_records_are_written_whole(workdir, monkeypatch):
    """As on gs://: at a checkpoint and at the end."""
    monkeypatch.setattr(metrics, "_can_append", lambda workdir: False)
    writer = MetricsWriter(workdir, 0, QUIET)
    writer.write("train", 10, {"loss": 2.0})
    assert read_metrics(workdir) == []
    writer.flush()
    writer.write("train", 20, {"loss": 1.0})
    assert [r["step"] for r in read_metrics(workdir)] == [10]
    writer.close()
    again = MetricsWriter(workdir, 10, QUIET)
    again.write("train", 20, {"loss": 1.5})
    again.close()
    assert [(r["step"], r["loss"]) for r in read_metrics(workdir)] == [(10, 2.0), (20, 1.5)]


def test_where_nothing_can_be_appended_events_are_copied(workdir, monkeypatch):
    """TensorBoard's own gs:// writer fails with a traceback, after two minutes, if the storage is lost."""
    monkeypatch.setattr(metrics, "_can_append", lambda workdir: False)
    writer = MetricsWriter(workdir, 0, RunConfig())
    writer.write("train", 10, {"loss": 2.0})
    assert not (workdir / "tensorboard").exists()
    writer.flush()
    [events] = (workdir / "tensorboard").iterdir()
    writer.write("eval", 20, {"bits": 1.0})
    writer.close()
    assert [events] == list((workdir / "tensorboard").iterdir())
    assert all(name in events.read_bytes() for name in (b"train/loss", b"eval/bits"))


def test_nothing_is_left_here_of_a_storage_that_is_lost(workdir, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "_can_append", lambda workdir: False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "here"))
    (tmp_path / "here").mkdir()
    writer = MetricsWriter(workdir, 0, RunConfig())
    writer.write("train", 10, {"loss": 2.0})

    def lost(*_):
        raise OSError("no route")

    monkeypatch.setattr(type(workdir), "write_text", lost)
    with pytest.raises(OSError, match="no route"):
        writer.close()
    assert not any((tmp_path / "here").iterdir())
