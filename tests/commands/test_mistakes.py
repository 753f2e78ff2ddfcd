"""Every user mistake ends a command with one line, the right exit code, nothing written and nothing compiled."""

import errno
import importlib
import json
import shutil
import sys
import types

import jax
import pytest
from etils import epath

from gpt4o_jax import __main__ as entry
from gpt4o_jax.checkpoint import manifest
from gpt4o_jax.data import tokenizer as tokenizers
from gpt4o_jax.errors import ExitCode, storage_error
from tests.commands.conftest import FROM_RUN

USAGE, DATA, STORAGE = ExitCode.USAGE, ExitCode.DATA, ExitCode.STORAGE


@pytest.fixture
def no_compiling(monkeypatch):
    for module in ("model.quantization", "training.loop"):  # they, or Optax, call jax.jit on import, which compiles nothing
        importlib.import_module(f"gpt4o_jax.{module}")

    def refuse(*_, **__):
        raise AssertionError("compiled before the mistake was told")

    monkeypatch.setattr(jax, "jit", refuse)


@pytest.fixture
def copy(run, tmp_path):
    """A copy of the run, to damage."""
    return shutil.copytree(run, tmp_path / "copy")


# ---------------------------------------------------------------- the command line

FLAGS = [
    ("unknown command 'trian' (did you mean train?); commands: train,", "trian"),
    ("unknown flag --promt (did you mean prompt?); see generate --help", "generate", "--workdir=x", "--promt=a"),
    ("--config.seed", "generate", "--workdir=x", "--config.seed=1"),
    ("unexpected argument 'hello'; flags are written --name=value", "generate", "hello"),
    ("unexpected argument '-n'", "generate", "-n", "3"),
    ("--workdir is missing (run folder)", "generate", "--prompt=a"),
    ("--config is missing", "train", "--workdir=x"),
    ("--prompt needs a value", "generate", "--workdir=x", "--prompt"),
    ("--prompt needs a value", "generate", "--prompt", "--workdir=x"),
    ("--seed is given twice", "generate", "--workdir=x", "--seed=1", "--seed=2"),
    ("--config.seed is given twice", "train", "--config=x", "--workdir=x", "--config.seed=1", "--config.seed", "2"),
    ("--seed=one: expected an integer", "generate", "--workdir=x", "--seed=one"),
    ("--seed=-1: expected an integer from 0 to 2147483647", "generate", "--workdir=x", "--seed=-1"),
    ("--temperature=nan: expected a number from 0.0 to 100.0", "generate", "--workdir=x", "--temperature=nan"),
    ("--top_p=1.5: expected a number from 0.0 to 1.0", "generate", "--workdir=x", "--top_p=1.5"),
    ("--repetition_penalty=0: expected a number from 0.01 to 100.0", "generate", "--workdir=x", "--repetition_penalty=0"),
    ("--presence_penalty=3: expected a number from -2.0 to 2.0", "generate", "--workdir=x", "--presence_penalty=3"),
    ("--logit_bias=5: expected ID:BIAS, such as 262:-5", "generate", "--workdir=x", "--logit_bias=5"),
    ("logit_bias of token 5=-200.0: expected a number from -100.0 to", "generate", "--workdir=x", "--logit_bias=5:-200"),
    ("--stop_ids=end: expected a token id", "generate", "--workdir=x", "--stop_ids=end"),
    ("--draft_tokens needs --draft=RUN_DIR or --draft=ngram", "generate", "--workdir=x", "--draft_tokens=3"),
    ("--draft_tokens=17: expected an integer from 1 to 16", "generate", "--workdir=x", "--draft=ngram", "--draft_tokens=17"),
    ("--weights=int7: expected one of float32, bfloat16, int8, int4", "generate", "--workdir=x", "--weights=int7"),
    ("--rows needs --prompts=FILE", "generate", "--workdir=x", "--rows=3"),
    ("--draft and --prompts do not go together", "generate", "--workdir=x", "--prompts=p", "--draft=ngram"),
    ("--length_penalty needs --beams", "generate", "--workdir=x", "--length_penalty=2"),
    ("--top_p does nothing with --beams", "generate", "--workdir=x", "--beams=4", "--top_p=0.5"),
    ("--stop= is empty: end before this string", "generate", "--workdir=x", "--stop="),
    ("--temperature does nothing with --beams", "generate", "--workdir=x", "--beams=4", "--temperature=0.8"),
    ("--seed does nothing with --beams", "generate", "--workdir=x", "--beams=4", "--seed=0"),
    ("--stop does nothing with --beams", "generate", "--workdir=x", "--beams=4", "--stop=."),
    ("--num_samples=5 is more than --beams=4; nearest: --beams=5", "generate", "--workdir=x", "--beams=4", "--num_samples=5"),
    ("--max_new_tokens=0: expected an integer at least 1", "generate", "--workdir=x", "--max_new_tokens=0"),
    ("--stride=0: expected an integer at least 1", "evaluate", "--workdir=x", "--stride=0"),
    ("tokenizer: expected one of train, inspect, got ''", "tokenizer"),
    ("got 'inspekt' (did you mean inspect?)", "tokenizer", "inspekt"),
    ("--kind=word: expected bpe, byte or char", "tokenizer", "train", "--text=x", "--out=y", "--kind=word"),
    ("--vocab_size is for --kind=bpe", "tokenizer", "train", "--text=x", "--out=y", "--kind=byte", "--vocab_size=400"),
    ("--vocab_size=10: expected an integer from 300", "tokenizer", "train", "--text=x", "--out=y", "--vocab_size=10"),
]


@pytest.mark.parametrize(("fragment", "args"), [(f, a) for f, *a in FLAGS])
def test_wrong_flags(refused, no_compiling, fragment, args):
    refused(USAGE, fragment, *args)


# ---------------------------------------------------------------- train, before anything is written

CONFIGS = [
    (USAGE, "no such file", "--config=nowhere.py"),
    (USAGE, "no such key (did you mean model.d_model?)", "--config.model.d_modle=3"),
    (USAGE, "not an integer", "--config.model.d_model=wide"),
    (USAGE, "expected a number at least 1", "--config.train.batch_size=0"),
    (USAGE, "expected one of gelu", "--config.model.mlp=gleu"),
    (USAGE, "d_model=15 is not a multiple of n_heads=2; nearest: d_model=16", "--config.model.d_model=15"),
    (USAGE, "'25 steps' is not a whole multiple", "--config.train.length=25 steps"),
    (USAGE, "expected 'N steps', 'N tokens' or 'N epochs'", "--config.train.length=soon"),
    (USAGE, "--profile=5: expected FIRST:LAST", "--profile=5"),
    (USAGE, "--profile=9:3: expected FIRST:LAST", "--profile=9:3"),
    (USAGE, "--profile=20:30: the run has 20 steps", "--profile=20:30"),
    (USAGE, "config.mesh (data=3) does not fit 1 device(s)", "--config.mesh.data=3"),
    (USAGE, "model.vocab_size=40 is smaller than the tokenizer's", "--config.model.vocab_size=40"),
    (USAGE, "is 17 tokens with <bos>, but model.context_length=16", "--config.sample.prompts=('green bottles an',)"),
    (USAGE, "model.attention=cudnn is for GPUs, not for a cpu; auto would take blocks", "--config.model.attention=cudnn"),
    (USAGE, "model.attention=splash is for TPUs, not for a cpu", "--config.model.attention=splash"),
    (DATA, "'Z' (U+005A, LATIN CAPITAL LETTER Z) at 3", "--config.sample.prompts=('no Z',)"),
    (DATA, "tokens, but one row of model.context_length=9000 needs 9001", "--config.model.context_length=9000"),
    (DATA, "no such file, folder or glob", "--config.data.path=nowhere.txt"),
    (DATA, "cannot read the tokenizer", "--config.tokenizer.path=nowhere.model"),
    (DATA, "no finished checkpoint there", "--config.init.from=nowhere"),
    (USAGE, "expected the folder of a run after a colon", f"--config={FROM_RUN}"),
    (DATA, "nowhere: no such folder; expected that of a run", f"--config={FROM_RUN}:nowhere"),
]


@pytest.mark.parametrize(("code", "fragment", "arg"), CONFIGS)
def test_wrong_configs(refused, no_compiling, train_args, tmp_path, code, fragment, arg):
    workdir = tmp_path / "run"
    refused(code, fragment, *train_args(workdir, arg))
    assert not workdir.exists()


def test_a_missing_package(refused, no_compiling, train_args, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    refused(USAGE, "pip install -r requirements-wandb.txt", *train_args(tmp_path / "run", "--config.log.wandb=project"))
    assert not (tmp_path / "run").exists()


def test_not_logged_in_to_wandb(refused, no_compiling, train_args, tmp_path, monkeypatch):
    def login():
        raise RuntimeError("No API key\nconfigured.")

    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(login=login))
    args = train_args(tmp_path / "run", "--config.log.wandb=project")
    refused(USAGE, "config.log.wandb=project: No API key configured; `wandb login`, or set WANDB_MODE=offline", *args)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"", "empty file"),
        (b"\x89PNG\r\n\0\0", "looks binary (a NUL byte at offset 6)"),
        (b"gr\xfcn", "not UTF-8: byte 0xfc at offset 2"),
        (b"one\ntwo\nthree\nfour\nfive\nsix\nseven\neight", "but one row of model.context_length=64 needs 65"),
        (b"one document", "hold-out is empty"),
    ],
)
def test_unreadable_or_too_little_text(refused, no_compiling, train_args, tmp_path, content, fragment):
    (tmp_path / "x.txt").write_bytes(content)
    more = (f"--config.data.path={tmp_path}/x.txt", "--config.tokenizer.kind=byte", "--config.model.context_length=64")
    refused(DATA, fragment, *train_args(tmp_path / "run", *more))
    assert not (tmp_path / "run").exists()


DIVISIONS = [
    ("train.batch_size=4 is not a multiple of 8 (mesh axes data); nearest: train.batch_size=8, or mesh.data one of 1, 2, 4", ""),
    ("(mesh axes data, train.accumulate=2); nearest: train.batch_size=16, or mesh.data one of 1, 2", "train.accumulate=2"),
    ("(mesh axes data * fsdp); nearest: train.batch_size=8, or mesh.data * mesh.fsdp one of 1, 2, 4", "mesh.fsdp=2"),
    (
        "ring needs a context_length of a multiple of 8 (2 * mesh.context), not 12",
        "mesh.preset=context mesh.context=4 model.context_length=12",
    ),
    ("model.n_layers=1 is not a multiple of 8 (mesh axes stage)", "mesh.preset=pipeline mesh.stage=8"),
    ("model.n_heads=2 is not a multiple of 8 (mesh axes tensor)", "mesh.data=1 mesh.tensor=8"),
    ("model.d_model=12 is not a multiple of 8 (mesh axes fsdp)", "mesh.data=1 mesh.fsdp=8 model.d_model=12 train.batch_size=8"),
]


@pytest.mark.parametrize(("fragment", "knobs"), DIVISIONS)
def test_what_does_not_divide_over_the_devices(refused, no_compiling, all_devices, train_args, tmp_path, fragment, knobs):
    refused(USAGE, fragment, *train_args(tmp_path / "run", *(f"--config.{k}" for k in knobs.split())))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("fragment", "knobs"), DIVISIONS)
def test_what_does_not_divide_is_told_by_benchmark_train_too(refused, no_compiling, all_devices, train_args, fragment, knobs):
    args = train_args("", *(f"--config.{k}" for k in knobs.split()), "--config.model.vocab_size=96")
    refused(USAGE, fragment, "benchmark", *(a for a in args if not a.startswith("--workdir")))


@pytest.mark.parametrize(("fragment", "knobs"), [case for case in DIVISIONS if case[0].startswith("model.")])
def test_a_model_that_does_not_divide_is_told_by_benchmark_generate(
    refused, no_compiling, all_devices, train_args, fragment, knobs
):
    args = train_args("", *(f"--config.{k}" for k in knobs.split()), "--config.model.vocab_size=96")
    sizes = ("--prompt_tokens=4", "--new_tokens=4")
    refused(USAGE, fragment, "benchmark", "generate", *(a for a in args[1:] if not a.startswith("--workdir")), *sizes)


def test_run_folders_that_cannot_be(refused, no_compiling, train_args, tmp_path):
    (tmp_path / "file").write_text("x")
    refused(USAGE, "a file, expected a folder", *train_args(tmp_path / "file"))
    refused(STORAGE, "cannot write (Not a directory)", *train_args(tmp_path / "file" / "run"))
    refused(USAGE, "not empty and no run folder", *train_args(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# ---------------------------------------------------------------- train, continuing a run


@pytest.mark.parametrize(
    ("code", "fragment", "arg"),
    [
        (USAGE, "this run has model.d_model=16, the command asks for 32", "--config.model.d_model=32"),
        (USAGE, "this run has train.length='20 steps', the command asks for '40 steps'", "--config.train.length=40 steps"),
        (USAGE, "this run has tokenizer.kind='char'", "--config.tokenizer.kind=byte"),
    ],
)
def test_a_changed_config_on_resume(refused, no_compiling, train_args, run, code, fragment, arg):
    refused(code, fragment, *train_args(run, arg))


def test_other_text_on_resume(refused, no_compiling, train_args, run, text, tmp_path):
    (tmp_path / "other.txt").write_text(text.read_text().replace("green", "nereg"))
    other = f"--config.data.path={tmp_path}/other.txt"
    refused(DATA, "the run was trained on corpus", *train_args(run, other))


def test_weights_of_a_run_with_another_tokenizer(refused, no_compiling, train_args, run, tmp_path):
    more = (f"--config.init.from={run}", "--config.tokenizer.kind=byte")
    refused(DATA, f"add --config.tokenizer.path={run}", *train_args(tmp_path / "tuned", *more))
    assert not (tmp_path / "tuned").exists()


def test_weights_of_a_model_of_another_size(refused, no_compiling, train_args, run, tmp_path):
    more = (f"--config.init.from={run}", f"--config.tokenizer.path={run}/tokenizer.model", "--config.model.d_ff=48")
    refused(DATA, "in the checkpoint but", *train_args(tmp_path / "tuned", *more))
    assert not (tmp_path / "tuned").exists()


def test_attention_that_this_device_has_not_on_resume(refused, no_compiling, train_args, copy):
    """The stored config asks for what another machine had."""
    before = sorted(copy.rglob("*"))
    config = json.loads((copy / "config.json").read_text())
    config["model"]["attention"] = "cudnn"
    (copy / "config.json").write_text(json.dumps(config))
    refused(USAGE, "model.attention=cudnn is for GPUs", *train_args(copy, "--config.model.attention=cudnn"))
    assert sorted(copy.rglob("*")) == before


# ---------------------------------------------------------------- run folders that are missing, foreign or damaged


def other_tokenizer(folder):
    tokenizers.char_tokenizer("abc").save(folder / "tokenizer.model")


def larger_tokenizer(folder):
    tokenizers.byte_tokenizer().save(folder / "tokenizer.model")


def truncate_weights(folder):
    files = [p for p in (folder / "checkpoints" / "20" / "params").rglob("*") if p.is_file()]
    largest = max(files, key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])


def config_json(text):
    return lambda folder: (folder / "config.json").write_text(text)


DAMAGE = {
    "gone": (shutil.rmtree, "no such folder; expected that of a run, as `train` and `convert import` write it"),
    "foreign": (lambda f: (f / "config.json").unlink(), "not a run folder (no config.json)"),
    "config cut off": (config_json('{"seed": '), "config.json: damaged (not JSON)"),
    "config binary": (lambda f: (f / "config.json").write_bytes(b"\xff\0"), "config.json: damaged (not JSON)"),
    "config a list": (config_json("[]"), "config.json: config: got [], expected knobs by name"),
    "config of another program": (config_json('{"learning_rate": 1}'), "config.json: config key 'learning_rate' does not exist"),
    "config of Hugging Face": (
        config_json('{"model_type": "gpt2"}'),
        "a Hugging Face folder; make a run of it first: convert import",
    ),
    "config empty": (config_json("{}"), "model.vocab_size is not set"),
    "no tokenizer": (lambda f: (f / "tokenizer.model").unlink(), "no tokenizer there"),
    "damaged tokenizer": (lambda f: (f / "tokenizer.model").write_text("{"), "damaged tokenizer file"),
    "another tokenizer": (other_tokenizer, "is not the one that checkpoint 20 was trained with"),
    "larger tokenizer": (larger_tokenizer, "the tokenizer has 288 pieces, but the model only"),
    "no checkpoints": (lambda f: shutil.rmtree(f / "checkpoints"), "no finished checkpoint yet"),
    "checkpoints is a file": (
        lambda f: (shutil.rmtree(f / "checkpoints"), (f / "checkpoints").touch()),
        "no finished checkpoint",
    ),
    "weights cut off": (truncate_weights, "is damaged (its SHA-256 differs"),
    "manifest damaged": (lambda f: (f / "checkpoints" / "20" / manifest.NAME).write_text("{}"), "manifest.json: damaged"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_run_folders(refused, no_compiling, copy, kind):
    damage, fragment = DAMAGE[kind]
    damage(copy)
    refused(DATA, fragment, "generate", f"--workdir={copy}", "--prompt=1")
    refused(DATA, fragment, "evaluate", f"--workdir={copy}")


@pytest.mark.parametrize("kind", ["gone", "foreign", "config cut off", "weights cut off", "manifest damaged"])
def test_verify_finds_damage(copy, kind, capsys):
    damage, fragment = DAMAGE[kind]
    damage(copy)
    assert entry.main(["verify", f"--workdir={copy}"]) == DATA
    *progress, last = capsys.readouterr().err.splitlines()
    assert all("files as written" in line for line in progress)
    assert last.startswith("gpt4o_jax: ") and fragment in last


def test_a_config_that_does_not_fit_the_weights(refused, copy):
    config = json.loads((copy / "config.json").read_text())
    config["model"]["d_ff"] = 48
    (copy / "config.json").write_text(json.dumps(config))
    refused(DATA, "in the checkpoint but", "generate", f"--workdir={copy}", "--prompt=1")


def test_a_text_that_is_no_longer_there(refused, no_compiling, copy):
    config = json.loads((copy / "config.json").read_text())
    config["data"]["path"] = "gone.txt"
    (copy / "config.json").write_text(json.dumps(config))
    refused(DATA, "gone.txt: no such file", "evaluate", f"--workdir={copy}")


# ---------------------------------------------------------------- using a run, and tokenizers


def test_what_a_run_cannot_do(refused, run, tmp_path):
    here = f"--workdir={run}"
    refused(USAGE, "prompt of 17 tokens does not fit", "generate", here, "--prompt=green bottles an")
    refused(DATA, "'Z' (U+005A", "generate", here, "--prompt=Zoo")
    refused(DATA, "lone surrogate U+DC80 at character 1", "generate", here, "--prompt=1\udc80")
    refused(DATA, "stop string '\\udcff': not UTF-8 (lone surrogate U+DCFF at character 0)", "generate", here, "--stop=\udcff")
    refused(DATA, "no checkpoint of step 15; there are 10, 20", "generate", here, "--step=15")
    refused(USAGE, "--stride=17: at most the model's context_length=16", "evaluate", here, "--stride=17")
    refused(DATA, "no such file, folder or glob", "evaluate", here, "--text=nowhere.txt")
    (tmp_path / "binary").write_bytes(b"a\0")
    refused(DATA, "looks binary", "evaluate", here, f"--text={tmp_path}/binary")
    (tmp_path / "other.txt").write_text("Zoo")
    refused(DATA, "is not among the", "evaluate", here, f"--text={tmp_path}/other.txt")


def test_tokenizers_that_cannot_be(refused, run, text, tmp_path):
    out = tmp_path / "t.model"
    refused(DATA, "no such file", "tokenizer", "train", "--text=nowhere", f"--out={out}")
    refused(STORAGE, "cannot write (Is a directory)", "tokenizer", "train", f"--text={text}", f"--out={tmp_path}", "--kind=char")
    refused(STORAGE, "cannot write (No such file", "tokenizer", "train", f"--text={text}", f"--out={out}/x", "--kind=byte")
    refused(DATA, "cannot read the tokenizer", "tokenizer", "inspect", f"--tokenizer={out}", "--text=x")
    refused(DATA, "not a SentencePiece model", "tokenizer", "inspect", f"--tokenizer={text}", "--text=x")
    refused(DATA, "is not among the", "tokenizer", "inspect", f"--tokenizer={run}", "--text=Zoo")
    assert not out.exists()


# ---------------------------------------------------------------- the world outside


def test_a_full_disk_is_one_line_even_where_no_file_is_named(refused, monkeypatch, copy):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("gpt4o_jax.run.open_run", full)
    refused(STORAGE, "No space left on device", "generate", f"--workdir={copy}")


def test_debug_shows_the_traceback(run):
    with pytest.raises(entry.RunError, match="no checkpoint of step 15"):
        entry.main(["generate", f"--workdir={run}", "--step=15", "--debug"])


def test_an_object_store_whose_package_is_missing(refused, no_compiling, train_args, monkeypatch):
    from etils.epath import backend

    def fs(self, path):
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr(type(backend.fsspec_backend), "fs", fs)
    told = "gs://bucket/run: this kind of storage needs another package (Please install gcsfs): pip install gcsfs"
    refused(USAGE, told, *train_args("gs://bucket/run"))
    for command in ("generate", "evaluate", "chat", "report", "verify"):
        refused(USAGE, told, command, "--workdir=gs://bucket/run")
    refused(USAGE, told, "runs", "gs://bucket/run")
    refused(USAGE, told, *train_args("x", "--config.init.from=gs://bucket/run"))


class NotLoggedIn(Exception):
    """An exception class that no other package knows, like those of object-store libraries."""


@pytest.mark.parametrize("error", [OSError("no route"), NotLoggedIn("no credentials"), PermissionError("Forbidden")])
def test_an_object_store_that_cannot_be_reached(run, refused, no_compiling, train_args, tmp_path, monkeypatch, error):
    from etils.epath import backend

    def fs(self, path):
        raise error

    monkeypatch.setattr(type(backend.fsspec_backend), "fs", fs)
    for at in ("gs://bucket/run", "s3://bucket/run"):
        told = f"{at}: cannot be reached ({error}); check the address, the network and who you are logged in as"
        for command in ("report", "verify"):
            refused(STORAGE, told, command, f"--workdir={at}")
        refused(STORAGE, told, "runs", at)
        refused(STORAGE, told, "evaluate", f"--workdir={run}", f"--text={at}")
        refused(STORAGE, told, *train_args(tmp_path / "new", f"--config.tokenizer.path={at}"))
        refused(STORAGE, told, *train_args(tmp_path / "new", "--config.data.source=jsonl", f"--config.data.path={at}"))
        if at.startswith("gs"):
            refused(STORAGE, told, *train_args(at))
            refused(STORAGE, told, *train_args(tmp_path / "new", f"--config.init.from={at}"))
            for command in ("generate", "evaluate", "chat"):
                refused(STORAGE, told, command, f"--workdir={at}")
    assert not (tmp_path / "new").exists()


def test_an_object_store_that_never_answers(refused, monkeypatch):
    import threading

    from etils.epath import backend

    end = threading.Event()
    monkeypatch.setattr(type(backend.fsspec_backend), "stat", lambda self, path: end.wait(60))
    monkeypatch.setattr("gpt4o_jax.paths._SECONDS", 0.1)
    refused(STORAGE, "gs://bucket/run: cannot be reached (no answer within 0 s)", "report", "--workdir=gs://bucket/run")
    end.set()


def test_what_is_no_fault_of_the_storage_stays_a_bug():
    """Local paths go through the backends of etils too."""
    with pytest.raises(ValueError) as bug:
        epath.Path("a\0b").read_text()
    assert storage_error(bug.value) is None


def test_an_object_store_that_is_lost_later(refused, monkeypatch):
    """After its first answer: the origin of a library's exception identifies both the storage error and the path."""
    from etils.epath import backend

    class Cloud:
        def info(self, path):
            return {"type": "directory"}

        def exists(self, path):
            raise NotLoggedIn("expired\nin two lines")

    monkeypatch.setattr(type(backend.fsspec_backend), "fs", lambda self, path: Cloud())
    told = "gs://bucket/run/config.json: cannot be reached (expired in two lines); check"
    for command in ("report", "verify", "generate"):
        refused(STORAGE, "cannot be reached (expired in two lines); check", command, "--workdir=gs://bucket/run")
    with monkeypatch.context() as patch:
        patch.setattr("gpt4o_jax.run.read_config", lambda workdir: (workdir / "config.json").exists())
        refused(STORAGE, told, "verify", "--workdir=gs://bucket/run")
    with pytest.raises(NotLoggedIn):
        entry.main(["report", "--workdir=gs://bucket/run", "--debug"])


@pytest.mark.parametrize("scheme", ["s3", "az", "hf"])
def test_a_storage_that_takes_no_checkpoints(refused, no_compiling, train_args, tmp_path, scheme):
    """Refused up front: Orbax would fail only at the first checkpoint, and TensorBoard would write into a local folder `az:`."""
    at = f"{scheme}://bucket/run"
    told = f"={at}: no checkpoints at {scheme}://; expected a folder of this machine or at gs://"
    refused(USAGE, f"--workdir{told}", *train_args(at))
    for command in ("generate", "evaluate", "chat"):
        refused(USAGE, f"--workdir{told}", command, f"--workdir={at}")
    refused(USAGE, f"config.init.from{told}", *train_args(tmp_path / "new", f"--config.init.from={at}"))


def test_an_address_of_no_storage_known_here(refused, no_compiling, train_args):
    told = "foo://b/r: foo:// is not a known storage scheme; there are gs://, s3://, az://, hf://"
    refused(USAGE, told, *train_args("foo://b/r"))
    refused(USAGE, told, "report", "--workdir=foo://b/r")


def test_object_stores_where_only_this_machine_will_do(refused, no_compiling, train_args, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = "gs://b/c: an object store; expected a path of this machine"
    refused(USAGE, f"config.data.cache_dir={told}", *train_args("run", "--config.data.cache_dir=gs://b/c"))
    refused(USAGE, f"--workdir={told}", "sweep", "--sweep=x.py", "--workdir=gs://b/c")
    refused(USAGE, f"--workdir={told}", "convert", "import", "--from=x", "--workdir=gs://b/c")
    refused(USAGE, f"--from={told}", "convert", "import", "--from=gs://b/c", "--workdir=x")
    refused(USAGE, f"--to={told}", "convert", "merge", "--workdir=x", "--to=gs://b/c")
    assert not any(tmp_path.iterdir())
