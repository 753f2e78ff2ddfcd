"""Every file in configs/, with every argument it accepts, is described, valid and able to train."""

import ast
import dataclasses
import math
import re
from pathlib import Path

import jax
import pytest
from etils import epath

from gpt4o_jax import parallel, run
from gpt4o_jax.commands import config_file, sweep
from gpt4o_jax.data.sources import WORLD_NAMES
from gpt4o_jax.data.tokenizer import RESERVED
from gpt4o_jax.errors import ExitCode, RunError
from gpt4o_jax.length import total_steps
from gpt4o_jax.model import flops, gpt
from gpt4o_jax.model.families import ARTICLE, GEMMA2, GEMMA3, GPT2, GPT4O, LLAMA, MISTRAL, MIXTRAL, OLMO2, QWEN2, QWEN3
from gpt4o_jax.ops.compute import Compute
from gpt4o_jax.training.loop import train
from gpt4o_jax.training.metrics import read_metrics
from gpt4o_jax.training.optimizer import decay_mask
from gpt4o_jax.training.schedules import schedule_factor

CONFIGS = Path(__file__).parents[1] / "configs"
FAMILIES = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "gemma2": GEMMA2,
    "gemma3": GEMMA3,
    "mistral": MISTRAL,
    "mixtral": MIXTRAL,
    "olmo2": OLMO2,
}
DATASETS = (
    "squad",
    "wmt14_translate/de-en",
    "wmt16_translate/ro-en",
    "cnn_dailymail",
    "xsum",
    "samsum",
    "billsum",
)
ARGUMENTS = {name: tuple(sizes) for name, sizes in FAMILIES.items()} | {
    "gpt4o": tuple(GPT4O),
    "shakespeare": ("char_cpu", "char_cpu_fast", "char_gpu"),
    "finetune": (*WORLD_NAMES, "conversations", *DATASETS),
    "applications": ("pretrain", "tune", "without_text"),
}
FILES = sorted(CONFIGS.glob("*.py"))
SWEEPS = sorted((CONFIGS / "ablations").glob("*.py"))
# These take a run folder: tests/commands/test_commands.py and test_finetune.py train with them.
OF_RUNS = ("from_run", "preference", "reinforced")
SPECS = [
    f"{path.name}:{a}" if a else path.name for path in FILES if path.stem not in OF_RUNS for a in ARGUMENTS.get(path.stem, ("",))
]
# Shrunk, all sizes of a published family are one model, so the smallest stands for all; likewise the fine-tuning tasks.
ONE = {*FAMILIES, "finetune"}
STEPPED = [spec for spec in SPECS if (stem := spec.split(".py")[0]) not in ONE or spec.endswith(f":{ARGUMENTS[stem][0]}")]
NOMINAL = {"nano": 4e6, "moe_nano": 10e6, "tiny": 25e6, "small": 124e6, "medium": 350e6, "large": 1.3e9, "xl": 8e9, "xxl": 70e9}


def read(spec: str, **overrides: str):
    given = {name.replace("__", "."): value for name, value in overrides.items()}
    return config_file.read(
        str(CONFIGS / spec), ({"data.path": "unused.txt"} if re.search("shakespeare|:conv", spec) else {}) | given
    )


def shrunk(spec: str, text: Path):
    """The config at a size that compiles in seconds; its structure is unchanged."""
    model = read(spec).model
    return read(
        spec,
        data__source="text",
        data__path=str(text),
        data__mixture="()",
        data__reader="",
        data__holdout_path="",
        data__loss_on="answers",
        data__cache_dir=str(text.parent / "cache"),
        data__separator="\n\n",
        data__holdout_fraction="0.3",
        data__shingle_bytes="0",
        tokenizer__kind="char",
        sample__prompts="('',)",
        model__vocab_size="None",
        model__n_layers=str(max(2, len(model.period))),
        model__scan_unroll=str(2 if len(model.period) == 1 else 1),
        model__d_model="32",
        model__n_heads="4",
        model__n_kv_heads="None" if model.n_kv_heads is None else "2",
        **({} if model.expert_d_ff and model.moe_every == 1 else {"model__d_ff": "64"}),  # unused if all layers have experts
        model__n_experts="4" if model.n_experts else "0",
        model__experts_per_token="2",
        model__expert_d_ff="None" if model.expert_d_ff is None else "32",
        model__window="None" if model.window is None else "8",
        model__context_length="16",
        train__batch_size="4",
        train__accumulate="2" if read(spec).train.accumulate > 1 else "1",
        train__steps_per_dispatch="1",
        train__length="1 steps",
        train__patience="0",
        eval__stride="None",
        checkpoint__best="",
        log__tensorboard="false",
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "input.txt"
    path.write_text("\n\n".join(f"Document {i} tells of {i * i} things and of {i} more." for i in range(40)))
    return path


@pytest.mark.parametrize("path", FILES + SWEEPS, ids=lambda p: p.name)
def test_file_says_what_it_is_and_stays_short(path):
    source = path.read_text()
    assert len(source.splitlines()) < 60
    header = ast.get_docstring(ast.parse(source))
    if path.stem != "base":  # the defaults: nothing to run
        for word in ("Hardware:", "Time:", "Expected:", "Command:"):
            assert word in header
        assert f"={path.relative_to(CONFIGS.parent)}" in header
    for argument in ARGUMENTS.get(path.stem, ()) if path.parent == CONFIGS else ():
        assert re.search(rf"(?<![\w.-]){re.escape(argument)}(?![\w-]|\.\w)", header), argument


@pytest.mark.parametrize("spec", SPECS)
def test_config_is_valid(spec):
    config = read(spec)
    assert total_steps(config, tokens_per_epoch=1_000_000) > 0  # its length is a whole number of dispatches


@pytest.mark.parametrize("spec", STEPPED)
def test_config_trains_a_step_shrunk(spec, text, tmp_path):
    config = shrunk(spec, text)
    mesh = parallel.make_mesh(config.mesh, jax.devices()[:1])
    workdir = epath.Path(tmp_path / "run")
    config, corpus = run.open_folder(workdir, config, mesh)
    state = train(config, workdir, corpus, mesh, lambda *_: {"loss": 0.0}, lambda *_: "")
    assert int(state.step) == 1 and int(state.skipped_steps) == 0
    (record,) = (r for r in read_metrics(workdir) if r["kind"] == "train")
    assert record["loss"] == pytest.approx(math.log(corpus.tokenizer.vocab_size), rel=0.1)  # knows nothing yet
    assert record["update_norm"] > 0


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: p.stem)
def test_sweep_varies_what_its_base_leaves_alone(path, tmp_path):
    """Every variant is valid, differs from all others, and trains on the same number of tokens."""
    jobs = sweep.plan(str(path), tmp_path, 1, {})
    assert jobs[0].config == config_file.read(str(path), {}), "the base comes first"
    assert len({job.config for job in jobs}) == len(jobs) > 1
    assert len({total_steps(job.config, 1) * job.config.train.batch_size * job.config.model.context_length for job in jobs}) == 1


@pytest.mark.parametrize(
    "spec",
    ["gpt4o.py:smal", "shakespeare.py:char", "article.py:big", "finetune.py:squat", "applications.py:tuen"]
    + [f"{family}.py:{next(iter(sizes))}x" for family, sizes in FAMILIES.items()],
)
def test_unknown_argument_is_one_line(spec):
    with pytest.raises(RunError) as error:
        read(spec)
    assert error.value.code == ExitCode.USAGE
    stem, argument = spec.split(".py:")
    assert argument in str(error.value)
    for name in ARGUMENTS.get(stem, ()):
        assert name in str(error.value)
    if stem in FAMILIES:
        assert f"configs/{spec}: no such size (did you mean {next(iter(FAMILIES[stem]))}?)" in str(error.value)


# ---------------------------------------------------------------- published sizes


@pytest.mark.parametrize("size", GPT4O)
def test_sizes_are_what_their_names_say(size, one_device):
    model = gpt.GPT(GPT4O[size], Compute("cpu", "float32"))
    shapes = jax.eval_shape(lambda key: gpt.init(model, key), jax.random.key(0))
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
    assert count == flops.parameter_count(GPT4O[size])
    assert count == pytest.approx(NOMINAL[size], rel=0.15)


def test_nano_has_the_shape_of_quickstart():
    nano, quickstart = GPT4O["nano"], read("quickstart.py")
    for name in ("n_layers", "d_model", "n_heads", "head_width", "kv_heads", "ff_width", "context_length"):
        assert getattr(nano, name) == getattr(quickstart.model, name), name
    assert nano.vocab_size == quickstart.tokenizer.vocab_size


def test_article_has_the_sizes_of_the_article():
    assert (ARTICLE.n_layers, ARTICLE.d_model, ARTICLE.n_heads, ARTICLE.vocab_size) == (1, 512, 8, 10_000)
    assert ARTICLE.ff_width == 4 * 512 and ARTICLE.mlp == "relu"


# ---------------------------------------------------------------- shakespeare: nanoGPT's recipes


@pytest.mark.parametrize("variant, L, D, T", [("char_cpu", 4, 128, 64), ("char_gpu", 6, 384, 256)])
def test_shakespeare_has_nanogpts_parameters(variant, L, D, T):
    nanogpt = L * 12 * D * D + 65 * D + T * D + (2 * L + 1) * D  # blocks, tied table, positions, norm scales
    model = dataclasses.replace(read(f"shakespeare.py:{variant}").model, vocab_size=65 + RESERVED)
    assert flops.parameter_count(model) == nanogpt + RESERVED * D


def test_fast_shakespeare_stays_within_the_budget_of_the_reference():
    reference, fast = read("shakespeare.py:char_cpu"), read("shakespeare.py:char_cpu_fast")
    count = lambda c: flops.parameter_count(dataclasses.replace(c.model, vocab_size=65 + RESERVED))
    assert count(fast) <= count(reference)
    tokens = lambda c: total_steps(c, 1) * c.train.batch_size * c.model.context_length
    assert tokens(fast) == tokens(reference) == 2000 * 12 * 64


def test_shakespeare_follows_nanogpts_learning_rate():
    def get_lr(it, peak=1e-3, lowest=1e-4, warmup=100, decay=2000):  # nanoGPT's train.py
        if it < warmup:
            return peak * (it + 1) / (warmup + 1)
        ratio = (it - warmup) / (decay - warmup)
        return lowest + 0.5 * (1 + math.cos(math.pi * ratio)) * (peak - lowest)

    config = read("shakespeare.py:char_cpu").optimizer
    for it in (0, 1, 50, 99, 100, 101, 700, 1999):
        assert config.peak_lr * float(schedule_factor(config, 2000, it)) == pytest.approx(get_lr(it), rel=1e-5)


def test_shakespeare_decays_what_nanogpt_decays(one_device):
    config = read("shakespeare.py:char_cpu")
    model = gpt.GPT(dataclasses.replace(config.model, vocab_size=65), Compute("cpu", "float32"))
    axes = gpt.logical_axes(model)
    two_axes = jax.tree.map(lambda names: len(set(names) - {"layers"}) >= 2, axes, is_leaf=lambda n: isinstance(n, tuple))
    assert decay_mask(config.optimizer, axes) == two_axes
