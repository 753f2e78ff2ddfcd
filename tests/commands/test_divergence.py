"""A run whose loss is no longer finite leaves only checkpoints from which it can be resumed."""

import time

import pytest

from gpt4o_jax.__main__ import main
from gpt4o_jax.checkpoint.store import Store
from gpt4o_jax.errors import ExitCode
from gpt4o_jax.training import guards

STEPS = ("--config.train.steps_per_dispatch=5", "--config.train.length=40 steps", "--config.checkpoint.every=5")


@pytest.fixture
def diverges(capsys):
    def call(*args: str) -> str:
        """stderr of a training run that ends as diverged."""
        assert main([str(a) for a in args]) == ExitCode.DIVERGED
        return capsys.readouterr().err

    return call


def test_a_checkpoint_that_is_being_written_is_finished(train_args, tmp_path, diverges, monkeypatch):
    commit = Store._commit

    def slow(store, *args):
        time.sleep(2)
        commit(store, *args)

    def after_20(skipped, step, limit, workdir):
        check(limit if step > 20 else skipped, step, limit, workdir)

    check = guards.check_divergence
    monkeypatch.setattr(Store, "_commit", slow)
    monkeypatch.setattr(guards, "check_divergence", after_20)
    told = diverges(*train_args(tmp_path / "run", *STEPS)).splitlines()[-1]
    assert told.startswith("gpt4o_jax: diverged: 10 steps in a row up to step 25 ")
    assert Store(tmp_path / "run" / "checkpoints").newest_intact() == 20


def test_weights_that_give_no_finite_loss_do_not_take_the_place_of_better_ones(train_args, tmp_path, diverges):
    """A step of this size leaves weights without a finite norm, and all later steps are skipped."""
    told = diverges(*train_args(tmp_path / "run", *STEPS, "--config.optimizer.peak_lr=1e38"))
    assert "no checkpoint at step 5, which had a non-finite loss" in told
    assert told.splitlines()[-1].startswith("gpt4o_jax: diverged: 14 steps in a row up to step 15 ")
    assert Store(tmp_path / "run" / "checkpoints").steps() == []
