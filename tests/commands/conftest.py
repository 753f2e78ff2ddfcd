"""A tiny run, trained once, and helpers that call a command as a user does."""

import contextlib
import json
from pathlib import Path

import jax
import pytest

from gpt4o_jax.__main__ import main

BASE = Path(__file__).parents[2] / "configs" / "base.py"
FROM_RUN = BASE.with_name("from_run.py")
TEXT = "".join(f"{i} green bottles and {i * i} red ones stand on the wall;\n" for i in range(120))


@pytest.fixture(scope="session")
def as_on_a_laptop(tmp_path_factory):
    """A context with one device, because commands use all there are, and its own cache folder."""
    cache, devices = str(tmp_path_factory.mktemp("cache")), jax.devices()

    @contextlib.contextmanager
    def context():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jax, "devices", lambda *_: devices[:1])
            patch.setenv("XDG_CACHE_HOME", cache)
            for name in ("JAX_COMPILATION_CACHE_DIR", "TF_CPP_MIN_LOG_LEVEL"):
                patch.setenv(name, "")  # main() sets those that are missing; undone at the end
            patch.setenv("EPATH_USE_TF", "0")  # likewise
            yield

    return context


@pytest.fixture(autouse=True)
def laptop(as_on_a_laptop):
    with as_on_a_laptop():
        yield


@pytest.fixture
def all_devices(laptop, monkeypatch):
    """The eight fake devices of tests/conftest.py."""
    monkeypatch.setattr(jax, "devices", lambda *_: jax.local_devices())


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "bottles.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="session")
def train_args(text):
    def arguments(workdir, *more: str) -> list[str]:
        """Trains a tiny model on characters for 20 steps. Flags in `more` override the defaults."""
        knobs = {
            "model.n_layers": 1, "model.d_model": 16, "model.n_heads": 2, "model.context_length": 16,
            "model.compute_dtype": "float32", "tokenizer.kind": "char", "data.source": "text", "data.path": text,
            "data.separator": "\n", "data.shingle_bytes": 0, "data.holdout_fraction": 0.2, "train.length": "20 steps",
            "train.batch_size": 4, "checkpoint.every": 10, "log.tensorboard": "false", "sample.max_new_tokens": 3,
            "sample.prompts": "('1 green',)",
        }  # fmt: skip
        flags = {"--config": BASE, "--workdir": workdir} | {f"--config.{k}": v for k, v in knobs.items()}
        flags |= dict(arg.split("=", 1) for arg in more)
        idle = ["data.separator"] if flags["--config.data.source"] not in ("text", "mixture") else []
        idle += ["data.holdout_fraction"] if flags.get("--config.data.holdout_path") else []
        endless = (
            flags["--config.data.source"] == "world" and flags.get("--config.objective.method", "next_token") != "next_token"
        )
        idle += ["data.holdout_fraction"] if endless and flags["--config.data.holdout_fraction"] == 0.2 else []
        of_run = ":" in str(flags["--config"])  # such as from_run.py:RUN, whose tokenizer is the run's
        idle += ["tokenizer.kind"] if of_run or flags.get("--config.tokenizer.path") else []
        for name in idle:  # has no effect once the text or its tokenizer is replaced
            del flags[f"--config.{name}"]
        return ["train", *(f"{name}={value}" for name, value in flags.items())]

    return arguments


@pytest.fixture(scope="session")
def run(train_args, as_on_a_laptop, tmp_path_factory):
    """A finished run; the tests only read it."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    with as_on_a_laptop():
        assert main(train_args(workdir)) == 0
    return workdir


@pytest.fixture
def command(capsys):
    def call(*args) -> tuple[dict, str]:
        """(the JSON object at the end of stdout, stderr) of a command that succeeds."""
        assert main([str(a) for a in args]) == 0
        out, err = capsys.readouterr()
        return json.loads(out.splitlines()[-1]), err

    return call


@pytest.fixture
def refused(capsys):
    def call(code, fragment, *args) -> str:
        """The one-line message of a command that fails as it should."""
        capsys.readouterr()
        assert main([str(a) for a in args]) == code, capsys.readouterr()
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("gpt4o_jax: ") and err.count("\n") == 1 and err.endswith("\n"), (out, err)
        assert fragment in err, err
        return err

    return call
