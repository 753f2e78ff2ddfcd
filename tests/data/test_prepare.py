"""A builder runs in place; only one that needs TensorFlow runs in an environment made for it."""

import json
import sys
from pathlib import Path

import pytest

from gpt4o_jax.data import tfds_builder, tfds_prepare
from gpt4o_jax.errors import ExitCode, RunError, data_error

pytest.importorskip("tensorflow_datasets")

OWN = """
import tensorflow_datasets as tfds


class OwnSongs(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("2.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="short"), tfds.core.BuilderConfig(name="long")]

    def _info(self):
        features = tfds.features.FeaturesDict({{"text": tfds.features.Text()}})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {{"train": self._generate_examples(30), "test": self._generate_examples(3)}}

    def _generate_examples(self, n):
        {line}
        for i in range(n):
            yield i, {{"text": f"{{i}} bottles"}}
"""


@pytest.fixture
def builder_file(tmp_path):
    def write(line="pass") -> Path:
        path = tmp_path / "songs.py"
        path.write_text(OWN.format(line=line))
        return path

    return write


@pytest.fixture
def pythons(monkeypatch):
    """The interpreters that ran the builder; this environment stands in for TensorFlow's, which is not created."""
    used, run = [], tfds_prepare._run

    def record(python, spec, data_dir):
        used.append(python)
        return run(sys.executable, spec, data_dir)

    monkeypatch.setattr(tfds_prepare, "_run", record)
    monkeypatch.setattr(tfds_prepare, "_environment", lambda say: "python with tensorflow")
    return used


def refusal(spec, data_dir, code=ExitCode.DATA) -> str:
    with pytest.raises(RunError) as e:
        tfds_prepare.prepare(str(spec), str(data_dir), lambda _: None)
    assert e.value.code == code
    return str(e.value)


def test_a_builder_of_ones_own_is_prepared_here(builder_file, pythons, tmp_path):
    made = tfds_prepare.prepare(f"{builder_file()}/long", str(tmp_path / "out"), lambda _: None)
    assert made["dataset"] == "own_songs/long/2.0.0" and made["splits"] == {"train": 30, "test": 3} and made["needed"] == ""
    assert pythons == [sys.executable]
    assert json.loads((Path(made["data_dir"]) / "dataset_info.json").read_text())["fileFormat"] == "array_record"


def test_a_builder_that_imports_tensorflow_goes_to_its_environment(builder_file, pythons, tmp_path):
    needy = builder_file("import tensorflow.no_such_part")
    assert "ModuleNotFoundError" in refusal(f"{needy}/long", tmp_path / "out")
    assert pythons == [sys.executable, "python with tensorflow"]


@pytest.mark.parametrize(
    ("line", "fragment"),
    [
        ("raise ValueError('the file is empty')", "ValueError: the file is empty"),
        ("raise ConnectionError('failed to resolve host')", "failed to resolve host; preparing it downloads the original files"),
        ("import no_such_package", "needs the package no_such_package, which requirements-prepare.txt does not name"),
        ("import os; os._exit(9)", "its builder printed no result (exit code 9)"),
    ],
)
def test_builders_that_fail_do_so_in_one_line(builder_file, pythons, tmp_path, line, fragment):
    assert fragment in refusal(f"{builder_file(line)}/short", tmp_path / "out")
    assert pythons == [sys.executable]


@pytest.mark.parametrize(
    ("spec", "fragment"),
    [
        ("no_such_set", "DatasetNotFoundError: Dataset no_such_set not found"),
        ("lm1b/no_such_config", "no_such_config"),
        ("nowhere/x.py", "No such file or directory"),
        (tfds_builder.__file__, "defines 0 builders, expected one"),
    ],
)
def test_what_is_no_builder(pythons, tmp_path, spec, fragment):
    assert fragment in refusal(spec, tmp_path)


def test_two_commands_do_not_make_one_environment_at_the_same_time(builder_file, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    said = []

    def meanwhile(command):
        if not said:
            said.append(None)
            said.append(refusal(f"{builder_file('import tensorflow')}/long", tmp_path / "out", ExitCode.USAGE))
        raise data_error("enough")

    monkeypatch.setattr(tfds_prepare, "_call", meanwhile)
    assert refusal(f"{builder_file('import tensorflow')}/long", tmp_path / "out") == "enough"
    assert "in use by another process" in said[1]


def test_an_environment_that_another_command_has_just_finished_is_not_cleared(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    class Meanwhile(tfds_prepare.Hold):
        def take(self, folder, where=""):
            (folder / "finished").touch()
            return super().take(folder, where)

    monkeypatch.setattr(tfds_prepare, "Hold", Meanwhile)
    monkeypatch.setattr(tfds_prepare, "_call", lambda command: pytest.fail(f"called {command}"))
    assert Path(tfds_prepare._environment(lambda _: None)).is_relative_to(tmp_path / "cache")


def test_an_environment_that_cannot_be_made_is_told_and_not_taken_for_finished(builder_file, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    commands, call = [], tfds_prepare._call

    def fail(command):
        commands.append(command)
        call([sys.executable, "-m", "pip", "--no-such-option"])

    monkeypatch.setattr(tfds_prepare, "_call", fail)
    for _ in range(2):
        message = refusal(f"{builder_file('import tensorflow')}/long", tmp_path / "out")
        assert "no such option: --no-such-option; preparing with TensorFlow needs the network once" in message
    assert [c[1:3] for c in commands] == [["-m", "venv"]] * 2
