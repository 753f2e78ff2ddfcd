"""configs/finetune.py on data of each task's kind, from a run of ours and from an imported one, to hold-out scores."""

import dataclasses
import json

import pytest

from gpt4o_jax.checkpoint.store import Store
from gpt4o_jax.commands import config_file
from gpt4o_jax.run import open_run, read_config
from tests.commands.conftest import BASE, FROM_RUN
from tests.data import numbered_squad

FINETUNE = BASE.with_name("finetune.py")
SHORT = {
    "train.length": "4 steps", "train.batch_size": 2, "train.steps_per_dispatch": 2, "optimizer.warmup_steps": 1,
    "eval.every": 2, "eval.task_items": 4, "eval.batch_size": 4, "checkpoint.every": 2, "sample.max_new_tokens": 2,
    "log.tensorboard": "false", "model.compute_dtype": "float32",
}  # fmt: skip


def recipe(task: str, workdir, base, **data) -> list[str]:
    knobs = SHORT | {"init.from": base} | {f"data.{name}": value for name, value in data.items()}
    flags = {f"--config.{name}": value for name, value in knobs.items()}
    return ["train", f"--config={FINETUNE}:{task}", f"--workdir={workdir}", *(f"{k}={v}" for k, v in flags.items())]


def evaluations(workdir) -> list[dict]:
    return [r for r in map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines()) if r["kind"] == "eval"]


@pytest.fixture(scope="module")
def squad(tmp_path_factory):
    return numbered_squad.write(tmp_path_factory.mktemp("squad"))


@pytest.mark.parametrize("source", ["tfds", "jsonl"])
def test_a_dataset_from_a_run_of_ours(squad, train_args, tmp_path, command, source):
    base, workdir = tmp_path / "base", tmp_path / "tuned"
    command(
        *train_args(base, "--config.tokenizer.kind=byte", "--config.model.context_length=96", "--config.train.length=10 steps")
    )
    files = {"source": "jsonl", "path": squad / "x.jsonl", "holdout_path": squad / "v.jsonl"}
    prepared = {"tfds_dir": squad, "path": "numbered_squad:train", "holdout_path": "numbered_squad:validation"}
    _, told = command(*recipe("squad", workdir, base, **(prepared if source == "tfds" else files)))
    assert f"weights from {base} at step 10" in told and open_run(workdir).config.model == open_run(base).config.model
    seen = evaluations(workdir)
    scores = {"holdout/squad_f1", "holdout/squad_em", "holdout/answerable/squad_f1", "holdout/unanswerable/squad_f1"}
    assert [r["step"] for r in seen] == [2, 4] and scores < seen[0].keys()
    best = max(seen, key=lambda r: (r["holdout/squad_f1"], r["step"]))["step"]
    assert Store(workdir / "checkpoints").chosen() == best
    table = command("evaluate", f"--workdir={workdir}", "--tasks=holdout")[0]["tasks"]["holdout"]
    assert {"all", "answerable", "unanswerable"} == table.keys() and {"squad_em", "unanswerable_f1"} < table["all"].keys()


def test_chats_of_ones_own_from_an_imported_run(train_args, tmp_path, command):
    base, out, imported, workdir = (tmp_path / name for name in ("base", "out", "imported", "tuned"))
    talk = lambda i: [
        {"role": "user", "content": f"How many are {i} and 1?"},
        {"role": "assistant", "content": f"They are {i + 1}."},
    ]
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps({"messages": talk(i)}) + "\n" for i in range(40)))
    knobs = {
        "model.mlp": "swiglu", "model.qk_norm": "false", "model.output_init": "scaled", "model.context_length": 48,
        "tokenizer.kind": "bpe", "tokenizer.vocab_size": 330, "train.length": "10 steps", "data.source": "conversations",
        "data.path": chats,
    }  # fmt: skip
    command(*train_args(base, *(f"--config.{name}={value}" for name, value in knobs.items())))
    command("convert", "export", f"--workdir={base}", f"--to={out}")
    command("convert", "import", f"--from={out}", f"--workdir={imported}", "--compute_dtype=float32")
    _, told = command(*recipe("conversations", workdir, imported, path=chats, holdout_fraction=0.3, shingle_bytes=0))
    assert f"weights from {imported} at step 0" in told
    assert open_run(workdir).tokenizer.template == open_run(imported).tokenizer.template == "own"
    seen = evaluations(workdir)
    best = min(seen, key=lambda r: (r["bits_per_byte"], -r["step"]))["step"]
    assert Store(workdir / "checkpoints").chosen() == best and {"holdout/exact_match", "holdout/chrf"} < seen[-1].keys()
    table = command("evaluate", f"--workdir={workdir}", "--tasks=holdout")[0]["tasks"]["holdout"]
    assert table.keys() == {"all"} and table["all"].keys() == {"exact_match", "chrf"}, "no row for items without a slice"


def test_the_type_of_products_is_the_new_run_s_own(run):
    """A run stores what "auto" was on its machine, which says nothing about the next."""
    read = lambda *given: config_file.read(f"{FROM_RUN}:{run}", dict(given)).model
    stored = read_config(run).model
    assert stored.compute_dtype == "float32"
    assert read() == dataclasses.replace(stored, compute_dtype="auto", attention="auto")
    assert read(("model.compute_dtype", "bfloat16")).compute_dtype == "bfloat16"
