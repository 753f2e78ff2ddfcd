"""Every kind of source can be trained on, resumed and evaluated through the commands."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gpt4o_jax.checkpoint.store import Store
from gpt4o_jax.config import freeze
from gpt4o_jax.data import lanes
from gpt4o_jax.data.corpus import expected_vocab_size
from gpt4o_jax.errors import ExitCode


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


# ---------------------------------------------------------------- data prepare, data report


def report_args(train_args, action, *more):
    """data ACTION with the config of the tiny run."""
    return ["data", action, *(a for a in train_args("", *more)[1:] if not a.startswith("--workdir"))]


def test_a_report_counts_what_is_there(command, train_args, tmp_path):
    lines = [f"{i} blue bottles stand on the shelf" for i in range(100)]
    (tmp_path / "x.txt").write_text("\n".join([*lines, *lines[:7], " ", "y" * 500]))
    more = (f"--config.data.path={tmp_path}/x.txt", "--config.tokenizer.kind=byte")
    report, log = command(*report_args(train_args, "report", *more))
    (source,) = report["sources"]
    assert source["documents"] == 108 and source["exact_duplicates"] == 7 and source["longest_document_bytes"] == 500
    assert source["bytes"] == sum(map(len, lines + lines[:7])) + 500 == source["kept_bytes"]
    assert source["training_documents"] + source["holdout_documents"] == 108
    assert source["tokens"] == source["bytes"] + 2 * 108, "<bos> and <eos>"
    assert source["bytes_per_token"] == round(source["bytes"] / (source["bytes"] + 2 * 108), 4)
    assert source["share_of_training_tokens"] == source["share_of_rows"] == 1
    assert report["total"] == {k: source[k] for k in report["total"]}
    assert "exact duplicates" in log and "108" in log


def test_a_report_of_a_mixture_adds_up(command, train_args, bottles, text):
    members = f"('text:{text}=0.25', 'jsonl:{bottles}/x.jsonl@body=0.75')"
    more = (
        "--config.data.source=mixture",
        f"--config.data.mixture={members}",
        "--config.data.path=",
        "--config.data.rows=first_fit",
    )
    report, _ = command(*report_args(train_args, "report", *more, "--config.data.shingle_bytes=20"))
    first, second = report["sources"]
    assert first["documents"] == second["documents"] == second["exact_duplicates"] == 120 and first["exact_duplicates"] == 0
    assert (first["share_of_rows"], second["share_of_rows"]) == (0.25, 0.75)
    for key in ("documents", "tokens", "training_tokens", "holdout_documents"):
        assert report["total"][key] == first[key] + second[key]
    for one in (first, second):
        assert one["share_of_training_tokens"] == round(one["training_tokens"] / report["total"]["training_tokens"], 4)
    assert first["share_of_training_tokens"] + second["share_of_training_tokens"] == pytest.approx(1, abs=1e-4)
    for numbers in (first, second, report["total"]):  # one token per character, plus <bos> and <eos> of each document
        ends = 2 * (numbers["training_documents"] + numbers["holdout_documents"])
        assert numbers["bytes_per_token"] == round(numbers["kept_bytes"] / (numbers["kept_bytes"] + ends), 4)
    assert 0.8 < report["rows_fill"] <= 1


def test_what_was_prepared_is_trained_on_without_reading_it_again(command, train_args, bottles, tmp_path):
    more = ("--config.data.source=jsonl", f"--config.data.path={bottles}/x.jsonl", "--config.data.field=body")
    cache = f"--config.data.cache_dir={tmp_path}/cache"
    report, _ = command(*report_args(train_args, "prepare", *more, cache))
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*")}
    command(*train_args(tmp_path / "run", *more, cache))
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*")} == before and len(before) > 6
    assert Store(tmp_path / "run" / "checkpoints").meta(20)["corpus"] == report["corpus"]


@pytest.mark.parametrize(
    ("fragment", "args"),
    [
        ("data: expected one of prepare, report, got ''", []),
        ("got 'prepar' (did you mean prepare?)", ["prepar"]),
        ("expected either --config=FILE or --tfds=NAME/CONFIG", ["prepare"]),
        ("expected either --config=FILE or --tfds=NAME/CONFIG", ["prepare", "--config=x.py", "--tfds=y"]),
        ("--config.seed is for --config=FILE; with --tfds give --data_dir", ["prepare", "--tfds=y", "--config.seed=1"]),
        ("--data_dir is for --tfds; a config has --config.data.tfds_dir", ["prepare", "--config=x.py", "--data_dir=y"]),
        ("--config is missing", ["report"]),
        ("--config=nowhere.py: no such file", ["report", "--config=nowhere.py"]),
    ],
)
def test_wrong_flags(refused, fragment, args):
    refused(ExitCode.USAGE, fragment, "data", *args)


def test_text_that_is_tokenised_as_it_is_read_trains_goes_on_and_is_reported(command, train_args, tmp_path, monkeypatch):
    monkeypatch.setattr(lanes, "CHUNK", 16)
    cache = f"--config.data.cache_dir={tmp_path}/cache"
    knobs = ("--config.data.lanes=3", cache, "--config.train.length=0.3 epochs", "--config.data.prefetch=5")
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    done, log = command(*train_args(straight, *knobs))
    assert "up to 128 training documents, read in lanes" in log and not list((tmp_path / "cache").rglob("*-training"))
    shutil.copytree(straight, stopped)
    shutil.rmtree(stopped / "checkpoints" / str(done["step"]))
    shutil.rmtree(tmp_path / "cache")
    _, log = command(*train_args(stopped, *knobs))
    assert "continuing from step" in log and len(list((stopped / "lanes").iterdir())) == 1
    scores = [command("evaluate", f"--workdir={w}")[0] for w in (straight, stopped)]
    assert scores[0]["loss"] == scores[1]["loss"] and scores[0]["tokens"] == scores[1]["tokens"] > 0
    report, _ = command(*report_args(train_args, "report", *knobs))
    (source,) = report["sources"]
    assert source["documents"] == 120 == source["training_documents"] + source["holdout_documents"]
    assert report["tokens_per_epoch"] == source["training_tokens"] // 16 * 16


def test_the_size_of_a_vocabulary_that_is_known_before_the_text_is_read(run, refused, train_args):
    """What `plan` and `benchmark` use for models whose config leaves it open."""
    size = lambda **knobs: expected_vocab_size(freeze(knobs))
    own = json.loads((run / "config.json").read_text())["model"]["vocab_size"]
    assert size(tokenizer={"vocab_size": 400}) == 400 and size(tokenizer={"kind": "byte"}) == 32 + 256
    assert size(tokenizer={"path": str(run), "vocab_size": 400}) == size(tokenizer={"path": f"{run}/tokenizer.model"}) == own
    assert size(tokenizer={"kind": "char"}, model={"vocab_size": 77}) == 77
    flags = [a for a in train_args("unused") if a.startswith("--config")]
    refused(ExitCode.USAGE, "such as --config.model.vocab_size=96", "benchmark", "train", *flags)
