"""Made-up records with SQuAD's features; every fourth question has no answer."""

import json
from pathlib import Path

import numpy as np
import pytest

SQUAD = [
    {
        "id": str(i), "title": "t", "context": f"Passage {i} tells of {i * i} things.", "question": f"How many, in {i}?",
        "answers": {"text": [f"{i * i}", f"{i * i} things"] if i % 4 else [], "answer_start": [17, 17] if i % 4 else []},
    }
    for i in range(40)
]  # fmt: skip


def write(path: Path) -> Path:
    """Writes x.jsonl, x.parquet (v.*: held out) and numbered_squad as TFDS prepares it. Skips the test if TFDS is missing."""
    tfds = pytest.importorskip("tensorflow_datasets")
    import pyarrow as pa
    import pyarrow.parquet as pq

    class NumberedSquad(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            f = tfds.features
            features = {name: f.Text() for name in ("id", "title", "context", "question")}
            features["answers"] = f.Sequence({"text": f.Text(), "answer_start": np.int32})
            return tfds.core.DatasetInfo(builder=self, disable_shuffling=True, features=f.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(0, 30), "validation": self._generate_examples(30, 40)}

        def _generate_examples(self, first, end):
            for i in range(first, end):
                yield i, SQUAD[i]

    (path / "x.jsonl").write_text("".join(json.dumps(r) + "\n" for r in SQUAD[:30]))
    (path / "v.jsonl").write_text("".join(json.dumps(r) + "\n" for r in SQUAD[30:]))
    pq.write_table(pa.Table.from_pylist(SQUAD[:30]), path / "x.parquet", row_group_size=7)
    pq.write_table(pa.Table.from_pylist(SQUAD[30:]), path / "v.parquet")
    tfds.disable_progress_bar()
    NumberedSquad(data_dir=path, file_format="array_record").download_and_prepare()
    return path
