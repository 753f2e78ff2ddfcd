"""The commands from the outside: what they write and print; stdout ends with one JSON object."""

import json
import math
import os
import re
import shutil
import subprocess
import sys

import jax
import pytest

from gpt4o_jax import __main__ as entry
from gpt4o_jax import origin, parallel
from gpt4o_jax.__main__ import COMMANDS, main
from gpt4o_jax.checkpoint.store import Store
from gpt4o_jax.commands import benchmark, convert, data, evaluate, generate, report, runs, sweep, tokenizer, train, verify
from gpt4o_jax.errors import ExitCode
from gpt4o_jax.ops.weights import Weight
from gpt4o_jax.sampling import text as texts
from tests.commands.conftest import BASE

# ---------------------------------------------------------------- what works


def test_train_leaves_a_complete_run_folder(run, text):
    names = {p.name for p in run.iterdir()}
    wanted = {
        "config.json",
        "tokenizer.model",
        "metrics.jsonl",
        "checkpoints",
        "samples",
        "report.md",
        "loss.png",
        "training.png",
    }
    assert names == wanted
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["10", "20"]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(r["kind"], r["step"]) for r in records] == [("train", 10), ("train", 20), ("eval", 20)]
    assert (run / "samples" / "20.txt").read_text().startswith("[0] 1 green")
    config = json.loads((run / "config.json").read_text())
    assert config["model"]["vocab_size"] == 32 + len(set(text.read_text()) - {"\n"})


def test_train_again_changes_nothing_and_says_the_same(run, train_args, command):
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    result, _ = command(*train_args(run))
    assert result["step"] == 20 and result["tokens"] == 20 * 4 * 16
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_a_relative_workdir_is_below_the_current_folder(train_args, tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command(*train_args("runs/x", "--config.train.length=10 steps"))
    assert sorted(p.name for p in (tmp_path / "runs/x/checkpoints").iterdir()) == ["10"]
    command(*train_args("runs/y", "--config.train.length=10 steps", "--config.init.from=runs/x"))
    for args in (("evaluate",), ("generate", "--prompt=1 green", "--max_new_tokens=2"), ("verify",), ("report",)):
        assert command(*args, "--workdir=runs/x")[0]["workdir"] == "runs/x"


def test_what_a_diverged_run_is_told_to_do_works(run, train_args, tmp_path, command, refused):
    lower = "--config.optimizer.peak_lr=1e-4"
    refused(ExitCode.USAGE, "this run has optimizer.peak_lr=0.001", *train_args(run, lower))
    _, told = command(*train_args(tmp_path / "new", lower, f"--config.init.from={run}"))
    assert f"weights from {run} at step 20" in told


@pytest.mark.parametrize(("asked", "taken"), [("auto", "blocks"), ("reference", "reference")])
def test_train_says_once_who_computes_attention_and_how_far_a_warm_up_comes(train_args, tmp_path, command, asked, taken):
    knobs = (f"--config.model.attention={asked}", "--config.train.length=2 steps", "--config.train.steps_per_dispatch=1")
    _, told = command(*train_args(tmp_path / "run", *knobs, "--config.optimizer.warmup_steps=3", "--config.eval.max_tokens=1"))
    assert told.count("attention by") == told.count(f"attention by {taken}, on 1 cpu device(s)") == 1
    assert told.count("reaches 50% of its peak: optimizer.warmup_steps=3 is not less than the 2 steps of the run") == 1


def test_train_gives_the_same_loss_on_two_meshes_of_eight_devices(train_args, tmp_path, command, all_devices):
    meshes = {"dp": {"data": 8}, "all": {"data": 2, "fsdp": 2, "tensor": 2}}
    losses = []
    for name, sizes in meshes.items():
        mesh = [f"--config.mesh.{axis}={size}" for axis, size in sizes.items()]
        knobs = ("--config.model.vocab_size=96", "--config.train.batch_size=8")
        losses.append(command(*train_args(tmp_path / name, *mesh, *knobs))[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_evaluate_on_the_hold_out_gives_the_numbers_of_training(run, command):
    result, _ = command("evaluate", f"--workdir={run}")
    final = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    for name in ("loss", "perplexity", "bits_per_byte", "accuracy", "tokens", "bytes"):
        assert result[name] == pytest.approx(final[name], rel=1e-6), name
    assert result["step"] == 20 and result["text"] == "holdout"


def test_training_in_stages_tells_of_its_bubble_and_where_it_is(train_args, command, all_devices, monkeypatch, tmp_path):
    places = []
    monkeypatch.setattr(parallel.Peers, "at", lambda self, what, times=1: places.append((what, times)))
    mesh = ["stage=2", "data=4", "pipeline_microbatches=2"]
    more = ["--config.model.n_layers=2", "--config.train.batch_size=8", "--config.train.length=10 steps"]
    _, err = command(*train_args(tmp_path / "run", *more, *(f"--config.mesh.{size}" for size in mesh)))
    assert "device(s) as a pipeline of 2 stages, 2 micro-batches, bubble 33.3%;" in err, err
    assert places[:3] == [("the run folder", 36), ("the start of training", 10), ("the newest checkpoint", 10)]


@pytest.mark.parametrize("mesh", [{"tensor": -1}, {"stage": -1}, {"fsdp": -1}])
def test_a_run_opens_on_more_devices_than_its_model_divides_over(run, command, all_devices, tmp_path, mesh):
    """On a larger machine, when the run's mesh asks for all of its devices."""
    workdir = shutil.copytree(run, tmp_path / "run")
    config = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps(config | {"mesh": config["mesh"] | mesh}))
    final = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert command("evaluate", f"--workdir={workdir}")[0]["loss"] == pytest.approx(final["loss"], rel=1e-5)


def test_evaluate_on_a_text_counts_its_bytes(run, command, tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("99 green bottles and 9801 red ones stand on the wall;")
    result, _ = command("evaluate", "--workdir", run, "--text", path, "--step=10", "--stride=4")
    assert result["bytes"] == result["tokens"] == len(path.read_text()) and result["step"] == 10


def test_evaluate_says_what_fewer_bits_cost(run, command):
    exact, _ = command("evaluate", f"--workdir={run}", "--kv_cache=float32")
    assert abs(exact["as_generated"]["loss_added"]) < 1e-5
    for kinds in ({"weights": "int8"}, {"kv_cache": "int8"}, {"weights": "int8", "kv_cache": "int8"}):
        result, _ = command("evaluate", f"--workdir={run}", *(f"--{name}={kind}" for name, kind in kinds.items()))
        again = result["as_generated"]
        assert again.items() >= kinds.items() and abs(again["loss_added"]) < 0.02
        assert again["loss"] not in (result["loss"], exact["as_generated"]["loss"])
        assert again["loss"] - result["loss"] == again["loss_added"]
        assert again["bits_per_byte"] - result["bits_per_byte"] == again["bits_per_byte_added"]


@pytest.mark.parametrize("name", ["generate", "evaluate"])
@pytest.mark.parametrize("flag", ["--weights=int5", "--kv_cache=int4"])
def test_kinds_that_there_are_not_are_named(run, capsys, flag, name):
    assert main([name, f"--workdir={run}", flag]) == ExitCode.USAGE
    assert "expected one of float32, bfloat16, int8" in capsys.readouterr().err


def test_a_run_that_named_its_hardware_s_attention_is_evaluated_anywhere(run, command, tmp_path):
    elsewhere = shutil.copytree(run, tmp_path / "run")
    config = json.loads((elsewhere / "config.json").read_text())
    config["model"]["attention"] = "splash"
    (elsewhere / "config.json").write_text(json.dumps(config))
    assert command("evaluate", f"--workdir={elsewhere}")[0]["loss"] == command("evaluate", f"--workdir={run}")[0]["loss"]


def test_greedy_generation_is_the_same_each_time_and_is_streamed(run, command):
    args = ("generate", f"--workdir={run}", "--prompt=1 green", "--temperature=0", "--max_new_tokens=5")
    (first, err), (second, _) = command(*args), command(*args, "--seed=9")
    sample = first["samples"][0]
    assert first["samples"] == second["samples"] and len(first["samples"]) == 1
    assert 0 < len(sample["text"]) == sample["tokens"] <= 5 and sample["logprob"] < 0
    assert err == "1 green" + sample["text"] + "\n"


def test_several_samples_differ_and_depend_on_the_seed(run, command):
    args = ("generate", f"--workdir={run}", "--prompt=1", "--num_samples=6", "--max_new_tokens=8", "--top_k=20", "--top_p=0.99")
    one, again, other = (command(*args, f"--seed={seed}")[0]["samples"] for seed in (0, 0, 1))
    assert len(one) == 6 and len({s["text"] for s in one}) > 1
    assert one == again != other


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_many_prompts_are_continued_as_each_alone(run, command, tmp_path, suffix):
    prompts, path = ["1 green", "13 green ", "2"], tmp_path / f"prompts.{suffix}"
    path.write_text("\n".join(json.dumps({"prompt": p}) if suffix == "jsonl" else p for p in prompts) + "\n\n")
    args = ("--max_new_tokens=6", "--num_samples=2", "--seed=4", "--stop=z", "--presence_penalty=1")
    together, err = command("generate", f"--workdir={run}", f"--prompts={path}", "--rows=2", *args)
    assert [r["prompt"] for r in together["results"]] == prompts
    for r in together["results"]:
        alone, told = command("generate", f"--workdir={run}", f"--prompt={r['prompt']}", *args)
        for got, wanted in zip(r["samples"], alone["samples"], strict=True):
            assert got == wanted | {"logprob": pytest.approx(wanted["logprob"], rel=1e-4)}
        assert told in err


def test_prompts_that_do_not_fit_are_named(run, refused, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "1"}\n{"promt": "2"}\n')
    args = ("generate", f"--workdir={run}", f"--prompts={path}")
    refused(ExitCode.DATA, "prompts.jsonl:2: expected a JSON object with prompt, such as", *args)
    path.write_text('{"prompt": "1"}\n{"prompt": "1 green bottles and 1"}\n')
    refused(ExitCode.USAGE, "prompts[1]: prompt of 22 tokens does not fit", *args)
    path.write_text('{"prompt": "1"}\n{"prompt": "2 \u03a9"}\n')
    refused(ExitCode.DATA, "prompts[1]: character 'Ω'", *args)
    path.write_bytes(b"\xef\xbb\xbf")  # a byte order mark is not text
    refused(ExitCode.DATA, "prompts.jsonl: empty file", *args)
    refused(ExitCode.DATA, "nowhere: cannot read", "generate", f"--workdir={run}", "--prompts=nowhere")


def test_generation_ends_before_a_stop_string(run, command):
    args = ("generate", f"--workdir={run}", "--prompt=1", "--max_new_tokens=14", "--seed=3", "--temperature=2")
    text = command(*args)[0]["samples"][0]["text"]
    stop = text[4:6]
    result, err = command(*args, "--stop", stop, "--stop=not to be found")
    sample = result["samples"][0] | {"text": "", "logprob": 0}
    assert sample == {"text": "", "tokens": 6, "passes": 6, "finished": "stop", "logprob": 0}
    assert result["samples"][0]["text"] == text[: text.index(stop)] and err == f"1{text[: text.index(stop)]}\n"


def test_generation_tells_what_the_model_said_of_every_token(run, command):
    args = ("generate", f"--workdir={run}", "--prompt=1", "--max_new_tokens=6", "--temperature=0", "--repetition_penalty=1.3")
    sample = command(*args, "--frequency_penalty=0.5", "--logit_bias=40:-3", "--top_logprobs=2")[0]["samples"][0]
    assert len(sample["logprobs"]) == sample["tokens"] and "".join(t["text"] for t in sample["logprobs"]) == sample["text"]
    assert all(t["top"][0]["logprob"] >= max(t["logprob"], t["top"][1]["logprob"]) for t in sample["logprobs"])
    first = sample["logprobs"][0]["id"]
    ended = command(*args, "--frequency_penalty=0.5", "--logit_bias=40:-3", f"--stop_ids={first}")[0]["samples"][0]
    assert (ended["tokens"], ended["finished"]) == (0, "stop")


def test_drafts_give_the_same_greedy_text_in_fewer_passes(run, command):
    args = ("generate", f"--workdir={run}", "--prompt=1", "--max_new_tokens=10", "--temperature=0")
    plain = command(*args)[0]["samples"][0]
    for draft in ("ngram", run):
        fast = command(*args, f"--draft={draft}", "--draft_tokens=3")[0]["samples"][0]
        assert (fast["text"], fast["finished"]) == (plain["text"], plain["finished"])
        assert fast["passes"] <= plain["passes"]
    assert fast["passes"] == 1 + -(-(plain["passes"] - 1) // 4)


def test_a_draft_has_the_precision_that_is_asked_for_too(run, command, monkeypatch):
    drafts, complete = [], texts.complete
    monkeypatch.setattr(texts, "complete", lambda *args: drafts.append(args[-1]) or complete(*args))
    command(
        "generate", f"--workdir={run}", "--prompt=1", "--max_new_tokens=4", f"--draft={run}", "--weights=int8", "--kv_cache=int8"
    )
    assert drafts[0].model.compute.kv_cache == "int8"
    assert any(isinstance(w, Weight) for w in jax.tree.leaves(drafts[0].params, is_leaf=lambda w: isinstance(w, Weight)))


def test_beams_give_texts_from_the_best_one_on(run, command):
    args = ("generate", f"--workdir={run}", "--prompt=1", "--max_new_tokens=4", "--beams=5", "--num_samples=3")
    result, err = command(*args, "--length_penalty=0.5")
    scores = [s["score"] for s in result["samples"]]
    assert len(scores) == 3 and scores == sorted(scores, reverse=True) and err.count("--- ") == 3


def test_generation_stops_at_the_end_of_the_context(run, command):
    result, _ = command("generate", f"--workdir={run}", "--prompt=1 green", "--max_new_tokens=1000", "--temperature=5")
    assert result["samples"][0]["tokens"] <= 16 - len("1 green") - 1


@pytest.mark.parametrize("kind", ["bpe", "byte", "char"])
def test_a_trained_tokenizer_can_be_inspected(text, tmp_path, command, kind):
    out = tmp_path / "t.model"
    size = ["--vocab_size=320"] if kind == "bpe" else []
    made, _ = command("tokenizer", "train", f"--text={text}", f"--out={out}", f"--kind={kind}", *size)
    seen, err = command("tokenizer", "inspect", f"--tokenizer={out}", "--text=12 green")
    assert (seen["digest"], seen["vocab_size"], seen["kind"]) == (made["digest"], made["vocab_size"], kind)
    assert made["bytes"] == len(text.read_text()) and made["bytes_per_token"] == made["bytes"] / made["tokens"]
    assert len(seen["ids"]) == err.count("|") + 1


def test_verify_counts_the_files_of_every_checkpoint(run, command):
    result, _ = command("verify", f"--workdir={run}")
    assert set(result["checkpoints"]) == {"10", "20"} and all(n > 3 for n in result["checkpoints"].values())


def test_a_run_can_start_from_the_weights_of_another(run, train_args, tmp_path, command):
    more = (f"--config.init.from={run}", f"--config.tokenizer.path={run}/tokenizer.model", "--config.train.length=10 steps")
    result, err = command(*train_args(tmp_path / "tuned", *more))
    assert result["step"] == 10 and f"weights from {run} at step 20" in err


@pytest.mark.parametrize("adapters", [False, True])
def test_all_processes_take_the_weights_that_the_leader_chose(run, train_args, tmp_path, command, capsys, monkeypatch, adapters):
    """Here process 0 chose step 10; step 20 was saved before this process looked."""
    chosen, share = origin.Origin(run, Store(run / "checkpoints"), 10).reference, parallel.share
    told = lambda name, make, *how: chosen if name == "initial weights" else share(name, make, *how)
    monkeypatch.setattr(parallel, "share", told)
    more = [f"--config.init.from={run}", f"--config.tokenizer.path={run}/tokenizer.model", "--config.train.length=10 steps"]
    more += ["--config.lora.rank=2"] if adapters else []
    _, err = command(*train_args(tmp_path / "tuned", *more))
    assert f"weights from {run} at step 10" in err
    found, chosen["digest"] = chosen["digest"][:12], "0" * 64
    assert main(train_args(tmp_path / "other", *more)) == ExitCode.DATA
    assert f"sees the weights 000000000000, this one {found}; give a folder" in capsys.readouterr().err


def test_benchmark_times_the_training_step(train_args, command):
    flags = [a for a in train_args("unused", "--config.model.vocab_size=96") if a.startswith("--config")]
    result, _ = command("benchmark", "train", "--dispatches=2", *flags)
    assert result["tokens_per_second"] > 0 and result["achieved_gflops"] > 0 and result["read_gigabytes_per_second"] > 0
    assert 0 < result["mfu"] < 1 and result["peak_bytes"] > 1e6 and math.isfinite(result["loss"])
    assert result["attention"] == "blocks"


def test_benchmark_times_generation(train_args, command):
    flags = [a for a in train_args("unused", "--config.model.vocab_size=96") if a.startswith("--config")]
    small = ("--prompt_tokens=3", "--new_tokens=4", "--repeats=1", "--weights=int4", "--kv_cache=int8")
    result, _ = command("benchmark", "generate", *small, *flags)
    assert result["tokens_per_second"] > 0 and result["prompt_tokens_per_second"] > 0 and result["weight_bytes"] > 0


def test_every_path_may_begin_with_the_home_folder(train_args, text, tmp_path, command, monkeypatch):
    """No shell expands the ~ in --flag=~/x."""
    monkeypatch.setenv("HOME", str(tmp_path))
    lines = text.read_text().splitlines()
    (tmp_path / "x.txt").write_text("\n".join(lines[:90]))
    (tmp_path / "held.txt").write_text("\n".join(lines[90:]))
    for name in ("base.py", "from_run.py"):
        shutil.copy(BASE.with_name(name), tmp_path / name)
    of_home = ("--config.data.path=~/x.txt", "--config.data.holdout_path=~/held.txt", "--config.data.cache_dir=~/cache")
    of_home += ("--config.tokenizer.kind=byte",)
    command(*train_args("~/run", "--config=~/base.py", *of_home))
    assert (tmp_path / "run" / "report.md").exists() and (tmp_path / "cache").exists()
    command(*train_args("~/next", "--config=~/from_run.py:~/run", *of_home))
    assert command("evaluate", "--workdir=~/next", "--text=~/held.txt")[0]["tokens"] > 0
    (tmp_path / "questions.jsonl").write_text('{"question": "1 green", "choices": [" red", " wall"], "answer": 0}\n')
    assert command("evaluate", "--workdir=~/next", "--choice=~/questions.jsonl")[0]["questions"] == 1
    (tmp_path / "prompts.txt").write_text("1 green\n")
    assert command("generate", "--workdir=~/next", "--prompts=~/prompts.txt", "--max_new_tokens=1")[0]
    assert command("tokenizer", "inspect", "--tokenizer=~/run", "--text=1 green")[0]["ids"]


# ---------------------------------------------------------------- help


def test_the_last_line_is_json_whatever_the_numbers(monkeypatch, command, tmp_path):
    """Python writes NaN and Infinity, which only its own JSON reader accepts."""
    nan, inf = float("nan"), float("inf")
    monkeypatch.setattr("gpt4o_jax.commands.runs.main", lambda *_: {"a": nan, "b": [1.5, -inf], "c": {"d": (inf, "x", 3)}})
    assert command("runs", tmp_path)[0] == {"a": None, "b": [1.5, None], "c": {"d": [None, "x", 3]}}


def test_a_bare_call_lists_the_commands(capsys):
    assert main([]) == ExitCode.USAGE and main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(out.count(f"\n  {c} ") == 2 for c in COMMANDS)


HELP = {
    "train": train,
    "evaluate": evaluate,
    "generate": generate,
    "report": report,
    "runs": runs,
    "sweep": sweep,
    "verify": verify,
}
HELP |= {f"benchmark {action}": benchmark for action in benchmark.FLAGS}
HELP |= {f"tokenizer {action}": tokenizer for action in tokenizer.FLAGS}
HELP |= {f"convert {action}": convert for action in convert.FLAGS}
HELP |= {f"data {action}": data for action in data.FLAGS}


@pytest.mark.parametrize("name", HELP)
def test_help_names_every_flag_and_knob(name, capsys):
    command, *action = name.split()
    assert main([*name.split(), "--help"]) == 0
    out = capsys.readouterr().out
    flags = HELP[name].FLAGS[action[0]] if action else HELP[name].FLAGS
    title, about = out.splitlines()[0].split(": ", 1)
    assert not action or (title.endswith(name) and "; " not in about), "of an action only its own part"
    assert all(re.search(rf"{flag.name.upper() if flag.positional else '--' + flag.name} +\S", out) for flag in flags)
    assert ("optimizer.peak_lr" in out) == (command in ("train", "sweep", "benchmark", "data"))
    assert main([command, "--help"]) == 0


def test_a_reader_that_has_read_enough_is_no_error():
    command = f"set -o pipefail; '{sys.executable}' -m gpt4o_jax train --help | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=BASE.parents[1])
    assert (done.returncode, done.stderr) in ((141, ""), (0, ""))


def test_a_process_starts_itself_anew_once_and_only_where_nothing_was_set(monkeypatch):
    begun = []
    monkeypatch.setattr("os.execv", lambda *a: begun.append(a))
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=1")
    entry._in_large_pages()
    assert not begun
    monkeypatch.delenv("GLIBC_TUNABLES")
    entry._in_large_pages()
    entry._in_large_pages()
    assert begun == [(sys.executable, [sys.executable, *sys.orig_argv[1:]])]


def test_tensorflow_is_not_imported_for_object_stores_where_it_is_installed(tmp_path, monkeypatch):
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("EPATH_USE_TF", raising=False)
    script = "from etils import epath; print(type(epath.Path('s3://bucket/run')._backend).__name__)"
    for before, backend in (
        ("", "_TfBackend"),
        ("from gpt4o_jax.__main__ import _prepare_jax as go; go(); ", "_FileSystemSpecBackend"),
    ):
        done = subprocess.run([sys.executable, "-c", before + script], capture_output=True, text=True, cwd=BASE.parents[1])
        assert done.stdout.strip() == backend, done.stderr
