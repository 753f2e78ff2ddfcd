"""The best checkpoint is kept, patience ends when it should, and a stopped run decides as an uninterrupted one."""

import json

import jax
import pytest
from etils import epath

from gpt4o_jax import origin, parallel, report, run
from gpt4o_jax.checkpoint.store import Store
from gpt4o_jax.config import freeze
from gpt4o_jax.errors import ExitCode, RunError
from gpt4o_jax.training.best import STOPPED, Best
from gpt4o_jax.training.loop import train
from gpt4o_jax.training.metrics import read_metrics

SCORES = {2: 0.1, 4: 0.5, 6: 0.4, 8: 0.3, 10: 0.2, 12: 0.9}  # scores of a run's evaluations, by step


def refusal(call, *args) -> str:
    with pytest.raises(RunError) as e:
        call(*args)
    assert e.value.code == ExitCode.USAGE
    return str(e.value)


@pytest.mark.parametrize(
    ("metric", "values", "best"),
    [
        ("numbers/exact_match", [0.1, 0.3, 0.3, 0.2], 2),
        ("accuracy", [0.1, float("nan"), 0.2], 2),
        ("loss", [3.0, 2.0, 2.5], 1),
        ("world:numbers/bits_per_byte", [1.0, 1.1, 0.9], 2),
        ("speech/wer", [0.5, 0.4, 0.6], 1),
    ],
)
def test_which_is_best(metric, values, best):
    kept = Best(metric, 0)
    better = [kept.take(step, {metric: value}) for step, value in enumerate(values)]
    assert kept.step == best == max(i for i, b in enumerate(better) if b) and not kept.exhausted


def test_a_number_that_evaluations_do_not_have():
    message = refusal(Best("numbers/exact", 0).take, 1, {"loss": 1.0, "numbers/exact_match": 0.5})
    assert "config.checkpoint.best=numbers/exact: no such number" in message and "did you mean numbers/exact_match?" in message


def test_patience_counts_evaluations_without_a_better_one_also_before_a_stop():
    records = [{"kind": "eval", "step": s, "m": v} for s, v in SCORES.items() if s <= 8] + [{"kind": "train", "step": 9}]
    for n in range(len(records)):
        kept = Best("m", 3, records[:n])
        for r in records[n:-1]:
            kept.take(r["step"], r)
        assert (kept.step, kept.value, kept.exhausted) == (4, 0.5, False)
        kept.take(10, {"m": SCORES[10]})
        assert kept.exhausted


def test_patience_does_not_wait_for_equal_ones():
    kept = Best("m", 2)
    for step in (2, 4, 6):
        kept.take(step, {"m": 0.0})
    assert kept.step == 6 and kept.exhausted


def test_patience_goes_on_among_equal_ones_whose_checkpoints_are_gone():
    """Each is saved and replaced by the next; the newest records since when there was no better one."""
    records = [{"kind": "eval", "step": s, "m": 0.0} for s in (2, 4, 6, 8)]
    always = Best("m", 4, records)
    replayed = Best("m", 4, records, [7, 8], always.kept["since"])
    assert vars(always) == vars(replayed) and not replayed.exhausted
    replayed.take(10, {"m": 0.0})
    assert replayed.exhausted


def test_what_has_no_checkpoint_is_not_the_best():
    """As when checkpoint.best was set later; in a run that always had it, the best has a checkpoint."""
    records = [{"kind": "eval", "step": s, "m": v} for s, v in SCORES.items()]
    assert Best("m", 3, records[:-1], [8]).step == 8 and Best("m", 3, records[:-1], [4, 10]).step == 4
    late = Best("m", 3, records, [])
    assert late.kept == {} and not late.exhausted
    assert late.take(14, {"m": 0.0}) and late.kept == {"best": 14, "metric": "m", "since": 0}
    always, replayed = Best("m", 3, records[:4]), Best("m", 3, records[:4], [4, 8])
    assert vars(always) == vars(replayed)


# ---------------------------------------------------------------- in a run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(workdir, steps at which to stop by a signal, config knobs) -> the run, with SCORES as evaluations."""
    folder = tmp_path_factory.mktemp("best")
    (folder / "x.txt").write_text("\n".join(f"{i} green bottles and {i * i} red ones" for i in range(60)))

    def go(name, stops=(), **knobs):
        flat = {
            "model.n_layers": 1, "model.d_model": 16, "model.n_heads": 2, "model.context_length": 16,
            "tokenizer.kind": "char", "data.source": "text", "data.path": str(folder / "x.txt"), "data.separator": "\n",
            "data.shingle_bytes": 0, "data.holdout_fraction": 0.2, "data.cache_dir": str(folder / "cache"),
            "train.length": "12 steps", "train.steps_per_dispatch": 2, "train.batch_size": 2, "eval.every": 2, "log.every": 2,
            "sample.every": 0, "checkpoint.every": 4, "checkpoint.keep_last": 1, "checkpoint.best": "m", "log.tensorboard": False,
        } | knobs  # fmt: skip
        workdir, mesh = epath.Path(folder / name), parallel.make_mesh(devices=jax.devices()[:1])
        config, corpus = run.open_folder(workdir, freeze(flat), mesh)
        seen, wholes = [], []

        class Signal:
            received = None

        def evaluate(model, params, whole):
            step = next(s for s in SCORES if s not in seen) if not whole else seen[-1]
            if whole:
                wholes.append(step)
            else:
                seen.append(step)
            signal.received = "SIGTERM" if step in stops and not whole else None
            return {
                "m": SCORES[step],
                "loss": 1.0,
                "bits_per_byte": 1.0,
                "perplexity": 1.0,
                "accuracy": 0.0,
                "tokens": 1,
                "bytes": 1,
            }

        for stop in (*stops, None):
            signal = Signal()
            seen[:] = [r["step"] for r in read_metrics(workdir) if r["kind"] == "eval"]
            try:
                train(config, workdir, corpus, mesh, evaluate, lambda *_: "", stop=signal)
            except RunError as e:
                assert e.code == ExitCode.SIGNAL and stop is not None
        return workdir, wholes

    return go


def evals(workdir):
    return [(r["step"], r["m"], STOPPED in r) for r in read_metrics(workdir) if r["kind"] == "eval"]


@pytest.mark.parametrize("stops", [(), (4,), (6, 8)])
def test_the_best_checkpoint_stays_and_training_ends_after_so_many_without_a_better_one(trained, stops):
    workdir, wholes = trained(f"patience{len(stops)}", stops, **{"train.patience": 3})
    assert evals(workdir) == [(s, v, s == 10) for s, v in SCORES.items() if s <= 10] and wholes == [10]
    assert Store(workdir / "checkpoints").steps() == [4, 10], "the best one and the last"
    assert run.open_run(workdir).step == 4 and run.open_run(workdir, 10).step == 10
    assert origin.find(str(workdir)).step == 4
    before = sorted(p.name for p in (workdir / "checkpoints").iterdir())
    trained(f"patience{len(stops)}", (), **{"train.patience": 3})  # the same command again: nothing left to do
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == before and wholes == [10]
    assert report.write(workdir)["step"] == 10 and "Not finished" not in (workdir / "report.md").read_text()


def test_without_patience_all_steps_are_done_and_a_later_best_replaces_an_earlier_one(trained):
    workdir, wholes = trained("whole")
    assert [s for s, *_ in evals(workdir)] == list(SCORES) and wholes == [12]
    assert Store(workdir / "checkpoints").steps() == [12] and run.open_run(workdir).step == 12


def test_checkpoints_know_of_the_best_one_or_of_none(trained):
    plain, _ = trained("plain", **{"checkpoint.best": ""})
    manifest = json.loads((plain / "checkpoints" / "12" / "manifest.json").read_text())
    assert "best" not in manifest["meta"] and run.open_run(plain).step == 12


def test_patience_without_something_to_wait_for():
    message = refusal(freeze, {"train": {"patience": 2}})
    assert "config.train.patience=2 waits for a better checkpoint.best" in message
