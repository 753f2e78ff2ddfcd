"""The same documents in every kind of source."""

import json

import pytest

TEXTS = [f"{i} bottles " + "and another one " * (i % 11) for i in range(150)]  # some shorter, some longer than a row of 32 bytes


@pytest.fixture(scope="session")
def texts():
    return TEXTS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """TEXTS as *.txt (one document per line), x.jsonl, x.parquet and tfds/numbered_texts; questions about them as chats.jsonl."""
    tfds = pytest.importorskip("tensorflow_datasets")
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path_factory.mktemp("sources")
    for i in range(3):
        (path / f"{i}.txt").write_text("\n".join(TEXTS[50 * i : 50 * i + 50]))
    (path / "x.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    turns = lambda i, t: [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": t[:40]}]
    (path / "chats.jsonl").write_text("".join(json.dumps({"messages": turns(i, t)}) + "\n" for i, t in enumerate(TEXTS)))
    pq.write_table(pa.table({"text": TEXTS}), path / "x.parquet", row_group_size=13)
    tfds.disable_progress_bar()
    _builder(tfds)(data_dir=path / "tfds", file_format="array_record").download_and_prepare()
    return path


def _builder(tfds):
    class NumberedTexts(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, disable_shuffling=True, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, text in enumerate(TEXTS):
                yield i, {"text": text}

    return NumberedTexts
