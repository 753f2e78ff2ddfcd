"""Every kind of source trains, goes on and is evaluated through the commands."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest


@pytest.fixture
def bottles(text, tmp_path):
    """The documents of the tiny run as JSONL and Parquet."""
    lines = [line for line in text.read_text().split("\n") if line]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"body": line}) + "\n" for line in lines))
    pq.write_table(pa.table({"body": lines}), tmp_path / "x.parquet", row_group_size=50)
    return tmp_path


@pytest.mark.parametrize("source", ["jsonl", "parquet"])
def test_a_source_of_records_trains_as_the_text_does(command, train_args, bottles, run, source, tmp_path):
    workdir = tmp_path / "run"
    knobs = [f"--config.data.source={source}", f"--config.data.path={bottles}/x.{source}", "--config.data.field=body"]
    command(*train_args(workdir, *knobs))
    scores, expected = (command("evaluate", f"--workdir={w}")[0] for w in (workdir, run))
    for key in ("loss", "tokens", "bytes"):
        assert scores[key] == expected[key], "the same documents, hold-out and rows"


@pytest.mark.parametrize("rows", ["packed", "first_fit"])
def test_a_mixture_goes_on_where_it_stopped(command, train_args, bottles, text, rows, tmp_path):
    members = f"('text:{text}=0.25', 'parquet:{bottles}/x.parquet@body=0.75')"
    knobs = [
        "--config.data.source=mixture",
        f"--config.data.mixture={members}",
        f"--config.data.rows={rows}",
        "--config.data.path=",
    ]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    command(*train_args(straight, *knobs))
    shutil.copytree(straight, stopped)
    shutil.rmtree(stopped / "checkpoints" / "20")
    _, log = command(*train_args(stopped, *knobs))
    assert "continuing from step 10 of 20" in log
    scores = [command("evaluate", f"--workdir={w}")[0] for w in (straight, stopped)]
    assert scores[0]["loss"] == scores[1]["loss"] and scores[0]["tokens"] == scores[1]["tokens"] > 0
