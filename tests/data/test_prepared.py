"""Datasets that TFDS prepared as array_record are read without TensorFlow; unreadable ones are refused in one line."""

import subprocess
import sys

import numpy as np
import pytest

from gpt4o_jax.config import DataConfig, freeze
from gpt4o_jax.data import corpus, sources
from gpt4o_jax.errors import ExitCode, RunError

tfds = pytest.importorskip("tensorflow_datasets")
N, TESTS = 2500, 20  # more than two blocks


class BottleSongs(tfds.core.GeneratorBasedBuilder):
    """Texts in a fixed order, with other features."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="green"), tfds.core.BuilderConfig(name="red")]  # noqa: RUF012

    def _info(self):
        features = {"text": tfds.features.Text(), "body": tfds.features.Text(), "label": tfds.features.ClassLabel(num_classes=3)}
        return tfds.core.DatasetInfo(builder=self, disable_shuffling=True, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(N), "test": self._generate_examples(TESTS)}

    def _generate_examples(self, n):
        for i in range(n):
            yield i, {"text": text(i, self.builder_config.name), "body": f"body {i} ☃", "label": i % 3}


def text(i, colour="green"):
    return f"{i} {colour} bottles, and {i * i} more of them on the wall"


def prepare(folder, file_format="array_record"):
    tfds.disable_progress_bar()
    for name in ("green", "red"):
        tfds.builder(f"bottle_songs/{name}", data_dir=folder, file_format=file_format).download_and_prepare()
    return folder


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("tfds"))


def config(path, folder, **knobs):
    return DataConfig(source="tfds", path=path, tfds_dir=str(folder), **knobs)


def refusal(path, folder, **knobs) -> str:
    with pytest.raises(RunError) as e:
        list(sources.load(config(path, folder, **knobs)))
    assert e.value.code == ExitCode.DATA
    return str(e.value)


# ---------------------------------------------------------------- reading what was prepared


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("bottle_songs/green:train", range(N)),
        ("bottle_songs/green:test", range(TESTS)),
        ("bottle_songs/green:1.0.0:test", range(TESTS)),
        ("bottle_songs/green:train[:90%]", range(N * 9 // 10)),
        ("bottle_songs/green:train[90%:]", range(N * 9 // 10, N)),
        ("bottle_songs/green:train[100:1200]", range(100, 1200)),
        ("bottle_songs/green:train[:3]+test[:2]", [0, 1, 2, 0, 1]),
    ],
)
def test_splits_and_parts_of_splits(data_dir, path, expected):
    documents = sources.load(config(path, data_dir))
    assert list(documents) == [text(i) for i in expected]
    for i in np.random.default_rng(0).integers(0, len(expected), 20):
        assert documents[int(i)] == text(expected[i])


def test_configs_and_fields(data_dir):
    assert sources.load(config("bottle_songs/red:train", data_dir))[7] == text(7, "red")
    assert sources.load(config("bottle_songs/red:train", data_dir, field="body"))[7] == "body 7 ☃"


def test_the_builder_is_not_needed_to_read_and_neither_is_tensorflow(data_dir, tmp_path):
    code = (
        "import sys\n"
        "from gpt4o_jax.config import freeze\n"
        "from gpt4o_jax.data import corpus\n"
        f"data = dict(source='tfds', path='bottle_songs/green:train', tfds_dir={str(data_dir)!r}, cache_dir={str(tmp_path)!r})\n"
        "made = corpus.prepare(freeze(dict(tokenizer=dict(kind='byte'), data=data | dict(shingle_bytes=0))))\n"
        "print(made.members[0].training.documents + made.members[0].holdout.documents, 'tensorflow' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(N), "False"]


def test_the_corpus_is_named_by_dataset_split_field_and_content(data_dir, tmp_path):
    def name(path, folder=data_dir, **knobs):
        data = {"source": "tfds", "path": path, "tfds_dir": str(folder), "cache_dir": str(tmp_path / "cache"), "shingle_bytes": 0}
        return corpus.prepare(freeze({"tokenizer": {"kind": "byte"}, "data": data | knobs})).name

    paths = [f"bottle_songs/{s}" for s in ("green:train", "red:train", "green:test[:50%]", "green:train[:50%]")]
    names = [name(p, holdout_fraction=0.3) for p in paths] + [name(paths[0], holdout_fraction=0.3, field="body")]
    assert len(set(names)) == len(names)
    again = prepare(tmp_path / "again")
    assert name(paths[0], again, holdout_fraction=0.3) == names[0], "the folder does not matter"


def test_a_dataset_that_tfds_mocks(tmp_path):
    with tfds.testing.mock_data(num_examples=5):
        documents = sources.load(config("lm1b:train", tmp_path))
        assert len(documents) == 5 and all(isinstance(d, str) and d for d in documents)


# ---------------------------------------------------------------- what cannot be read


@pytest.mark.parametrize(
    ("path", "fragment"),
    [
        ("bottle_songs/green", "expected NAME/CONFIG:SPLIT, for example lm1b:train"),
        ("bottle_songs/green:1.0.0", "expected NAME/CONFIG:SPLIT"),
        (":train", "expected NAME/CONFIG:SPLIT"),
        ("bottle songs:train", "expected NAME/CONFIG:SPLIT"),
        ("bottle_songs/green:train[:90%", "expected NAME/CONFIG:SPLIT"),
        ("bottle_songs/green:trian", "Unknown split 'trian'. Should be one of ['train', 'test']"),
        ("bottle_songs/green:train[:900%]", "percent slice boundaries"),
        ("bottle_songs/green:train[x:y]", "train[x:y]"),
        ("bottle_songs/green:train[:0]", "Paths sequence can not be of 0 length"),
        ("bottle_songs/green:train[5:2]", "no text found in"),
        ("lm1b:train", "it is not prepared; run `python -m gpt4o_jax data prepare --tfds=lm1b --data_dir="),
        ("lm1bb:train", "holds no such dataset, and TFDS knows none (did you mean lm1b?); run `python -m gpt4o_jax data"),
        ("zzqqxx/en:train[:1%]", "holds no such dataset, and TFDS knows none; run"),
    ],
)
def test_paths_that_lead_nowhere(data_dir, path, fragment):
    message = refusal(path, data_dir)
    assert f"{path}" in message and fragment in message and len(message) < 500


def test_features_that_are_no_text(data_dir):
    assert "no feature 'txt' (there are text, body, label); set data.field" in refusal(
        "bottle_songs/red:test", data_dir, field="txt"
    )
    message = refusal("bottle_songs/red:test", data_dir, field="label")
    assert "record 0: 'label' is of type int64, expected text" in message or "of type int," in message


@pytest.mark.parametrize("share", [0.2, 0.5, 0.95])
def test_a_truncated_record_file(tmp_path, share):
    folder = prepare(tmp_path)
    (path,) = (folder / "bottle_songs" / "green" / "1.0.0").glob("*train*")
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    message = refusal("bottle_songs/green:train", folder)
    assert "bottle_songs/green:train" in message and "damaged" in message


def test_a_record_file_that_is_gone(tmp_path):
    folder = prepare(tmp_path)
    (path,) = (folder / "bottle_songs" / "green" / "1.0.0").glob("*train*")
    path.unlink()
    assert "bottle_songs/green:train" in refusal("bottle_songs/green:train", folder)
