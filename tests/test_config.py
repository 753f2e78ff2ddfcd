"""Every mistake in a config is one RunError that says what to write instead; what is legal survives the round trip."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt4o_jax.commands import config_file
from gpt4o_jax.config import RunConfig, base_config, flatten, freeze, knobs, parse_value, to_dict
from gpt4o_jax.config_mesh import AXES
from gpt4o_jax.config_rules import parse_length, validate_router
from gpt4o_jax.errors import ExitCode, RunError
from gpt4o_jax.length import total_steps

ROOT = Path(__file__).parent.parent
BASE = str(ROOT / "configs" / "base.py")


def refusal(call, *args) -> str:
    with pytest.raises(RunError) as e:
        call(*args)
    assert e.value.code == ExitCode.USAGE
    assert "\n" not in str(e.value)
    return str(e.value)


# ---------------------------------------------------------------- defaults and round trip


def test_defaults_stand_once_and_are_legal():
    assert freeze(base_config().to_dict()) == RunConfig() == freeze({})


def test_to_dict_and_freeze_are_inverse_through_json():
    config = freeze({"seed": 7, "model": {"n_kv_heads": 2}, "init": {"from": "x"}, "sample": {"prompts": ["a", "b"]}})
    assert freeze(json.loads(json.dumps(to_dict(config)))) == config
    assert freeze(flatten(to_dict(config))) == config
    assert config.init.from_ == "x" and config.sample.prompts == ("a", "b")


def test_the_config_is_immutable_and_hashable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig().model.d_model = 3
    assert len({RunConfig(), freeze({})}) == 1


def test_every_knob_has_a_sentence():
    assert [name for name, field in knobs().items() if not field.metadata["doc"].endswith((".", ")"))] == []


def test_every_knob_is_read_outside_config_py():
    """A knob that nothing reads would be accepted and ignored."""
    sources = (
        p for p in (ROOT / "gpt4o_jax").rglob("*.py") if not re.fullmatch("config(_(finetune|idle|mesh|model|rules))?.py", p.name)
    )
    text = "\n".join(p.read_text() for p in sources)
    through = {  # read via a property or function of config.py, or under another name
        "model.n_kv_heads": ".kv_heads",
        "model.head_dim": ".head_width",
        "model.d_ff": ".ff_width",
        "model.expert_d_ff": ".expert_width",
        "model.moe_every": ".layer_kinds",
        "model.attention_scale": ".score_scale",
        "model.mup_base_head_dim": ".score_scale",
        "model.layer_pattern": ".periods",
        "model.window": ".window",
        "model.qkv_bias": ".biased_qkv",
        "model.rope_fraction": ".rotary_width",
        "model.rope_low": ".rope_turns",
        "model.rope_high": ".rope_turns",
        "train.length": "total_steps(",
        "init.from": "init.from_",
        "lora.alpha": "lora.scale",
        "tokenizer.path": "wanted.path",
        "tokenizer.kind": "wanted.kind",
        "tokenizer.vocab_size": "wanted.vocab_size",
        "data.path": "config.path",
    }
    through |= {f"mesh.{axis}": "config.sizes(" for axis in ("preset", *AXES)}
    fields = [name.rpartition(".")[2] for name in knobs()]

    def is_read(name):
        field = name.rpartition(".")[2]
        unique = fields.count(field) == 1  # otherwise only the section tells which one is meant
        wanted = through.get(name, f".{field}" if unique else name)
        return re.search(re.escape(wanted) + ("" if wanted.endswith(("(", ")")) else r"\b"), text)

    assert [name for name in knobs() if not is_read(name)] == []


# ---------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("model.d_model", "128", 128),
        ("model.d_model", "1_024", 1024),
        ("model.d_model", "1e3", 1000),
        ("model.n_kv_heads", "2", 2),
        ("model.n_kv_heads", "None", None),
        ("optimizer.peak_lr", "3e-4", 3e-4),
        ("optimizer.peak_lr", "1", 1.0),
        ("model.tied", "True", True),
        ("model.tied", "0", False),
        ("data.path", "None", "None"),
        ("data.separator", "\n\n", "\n\n"),
        ("sample.prompts", "('a', 'b')", ("a", "b")),
        ("sample.prompts", "'a'", ("a",)),
    ],
)
def test_command_line_values_take_the_type_of_their_knob(name, text, value):
    parsed = parse_value(name, text)
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "fragment"),
    [
        ("model.d_model", "wide", "not an integer; write for example --config.model.d_model=12"),
        ("model.d_model", "1.5", "not an integer"),
        ("model.d_model", "1.5e0", "not an integer"),
        ("model.d_model", "1e999", "not an integer"),
        ("model.d_model", "None", "not an integer"),
        ("model.d_model", "", "not an integer"),
        ("optimizer.peak_lr", "fast", "not a number"),
        ("model.tied", "yes please", "not true or false"),
        ("sample.prompts", "hello", "not a tuple of strings"),
        ("sample.prompts", "{[]: 1}", "not a tuple of strings"),
        ("sample.prompts", "__import__('os')", "not a tuple of strings"),
        ("sample.prompts", "(" * 5000, "not a tuple of strings"),
    ],
)
def test_command_line_values_of_another_type_are_refused(name, text, fragment):
    assert fragment in refusal(parse_value, name, text)


@settings(deadline=None)
@given(st.sampled_from(sorted(knobs())), st.text(max_size=20))
def test_any_text_is_a_value_or_one_clear_line(name, text):
    try:
        parse_value(name, text)
    except RunError as e:
        assert f"--config.{name}=" in str(e)


@pytest.mark.parametrize(
    ("values", "fragment"),
    [
        ({"modle": {"d_model": 1}}, "'modle' does not exist"),
        ({"model": {"d_modle": 1}}, "'model.d_modle' does not exist (did you mean model.d_model?)"),
        ({"sede": 1}, "did you mean seed?"),
        ({"model": 3}, "config.model: got 3, expected a section such as config.model.<knob>"),
        ({"seed": {"a": 1}}, "config.seed: got {'a': 1}, expected an integer"),
        ({"model": {"d_model": "64"}}, "config.model.d_model: got '64', expected an integer"),
        ({"model": {"d_model": 64.0}}, "got 64.0, expected an integer"),
        ({"model": {"d_model": True}}, "got True, expected an integer"),
        ({"model": {"d_model": None}}, "got None, expected an integer"),
        ({"model": {"tied": 1}}, "got 1, expected true or false"),
        ({"optimizer": {"peak_lr": "3e-4"}}, "got '3e-4', expected a number"),
        ({"optimizer": {"peak_lr": float("nan")}}, "got nan, expected a number at least 0.0"),
        ({"optimizer": {"b1": 1.0}}, "got 1.0, expected a number from 0.0 to 0.9999"),
        ({"model": {"n_layers": 0}}, "got 0, expected a number from 1 to 10000"),
        ({"seed": 2**31}, "config.seed: got 2147483648, expected a number from 0 to 2147483647"),
        ({"model": {"mlp": "swiglue"}}, "expected one of gelu, gelu_tanh, relu, relu2, swiglu, geglu (did you mean swiglu?)"),
        ({"sample": {"prompts": "abc"}}, "got 'abc', expected a tuple of strings"),
        ({"sample": {"prompts": ["a", 2]}}, "config.sample.prompts: got ('a', 2), expected a tuple of strings"),
        ({"sample": {"prompts": []}}, "expected at least one"),
        ([1], "got [1], expected knobs by name"),
        # Rules between knobs name both numbers and the nearest legal value.
        ({"model": {"d_model": 100, "n_heads": 8}}, "d_model=100 is not a multiple of n_heads=8; nearest: d_model=96"),
        ({"model": {"n_heads": 8, "n_kv_heads": 3}}, "n_kv_heads=3 does not divide n_heads=8; nearest: n_kv_heads=2"),
        ({"model": {"head_dim": 7}}, "head_dim=7: rotary positions need an even width; nearest: 8"),
        ({"model": {"d_model": 12, "n_heads": 4}}, "head_dim=3: rotary positions need an even width"),
        ({"model": {"qk_norm": False, "qk_norm_over": "projection"}}, "qk_norm_over=projection does nothing with qk_norm=false"),
        ({"model": {"value_embeddings": 3}}, "overlap with n_layers=4; nearest: value_embeddings=2"),
        ({"model": {"mtp_heads": 300}}, "mtp_heads=300 looks beyond context_length=256; nearest: mtp_heads=255"),
        ({"model": {"mtp_heads": 1}, "train": {"mtp_weight": 0.0}}, "mtp_heads=1 does nothing with train.mtp_weight=0"),
        ({"model": {"norm_position": "post"}}, "norm_position=post: a norm on a sub-layer's output undoes output_init=zero"),
        ({"model": {"rope_fraction": 0.3}}, "rope_fraction=0.3 rotates 19 of 64 coordinates, expected an even number"),
        ({"model": {"rope_fraction": 0.3}}, "nearest: rope_fraction=0.28125"),
        ({"model": {"rope_fraction": 0.0}}, "nearest: rope_fraction=0.03125"),
        ({"model": {"rope_factor": 2.0}}, "rope_factor=2 does nothing with rope_scaling=none"),
        ({"model": {"rope_scaling": "linear", "rope_low": 1.0}}, "rope_low=1 does nothing with rope_scaling=linear"),
        ({"model": {"rope_scaling": "yarn", "rope_factor": 4.0}}, "nearest: context_length / rope_factor = 64"),
        ({"model": {"rope_scaling": "yarn", "rope_original_context": 64, "rope_theta": 1.0}}, "rope_theta=1: all pairs turn"),
        ({"model": {"rope_scaling": "llama3", "rope_original_context": 64, "rope_low": 5.0}}, "rope_low=5, rope_high=4"),
        ({"model": {"rope_scaling": "ntk", "head_dim": 2}}, "rope_scaling=ntk needs two pairs, got 2 rotated"),
        ({"model": {"rope_scaling": "ntk", "positions": "none"}}, "rope_scaling=ntk needs positions=rope, got positions=none"),
        ({"model": {"n_layers": 6, "scan_unroll": 4}}, "scan_unroll=4 does not divide n_layers=6; nearest: scan_unroll=3"),
        ({"model": {"layer_pattern": ["local", "globl"]}}, "got 'globl', expected global or local (did you mean global?)"),
        ({"model": {"layer_pattern": []}}, "got '', expected global or local"),
        ({"model": {"n_layers": 1, "layer_pattern": ["local", "global"], "window": 8}}, "n_layers=1 is less than the 2 layers"),
        ({"model": {"n_layers": 1, "layer_pattern": ["local", "global"], "window": 8}}, "nearest: n_layers=2"),
        ({"model": {"layer_pattern": ["local", "global"], "window": 8, "scan_unroll": 4}}, "does not divide the 2 whole periods"),
        ({"model": {"n_experts": 4, "experts_per_token": 5}}, "nearest: experts_per_token=4"),
        ({"model": {"n_shared_experts": 1}}, "n_shared_experts=1 does nothing without experts"),
        ({"model": {"moe_every": 2}}, "moe_every=2 does nothing without experts"),
        ({"model": {"n_experts": 4, "moe_every": 5}}, "less than the 5 layers of layer_pattern or moe_every"),
        ({"model": {"n_experts": 4, "bias": True}}, "experts have no biases"),
        (
            {"model": {"n_experts": 4, "router_bias": True}, "optimizer": {"name": "schedule_free", "schedule": "constant"}},
            "set router_bias=false, or optimizer.name=adamw",
        ),
        ({"model": {"rope_local_theta": 100.0}}, "rope_local_theta=100 needs positions=rope and local layers"),
        ({"model": {"layer_pattern": ["local"]}}, "window=None: local layers in layer_pattern need a width"),
        ({"model": {"window": 8}}, "window=8 does nothing without local layers"),
        ({"train": {"batch_size": 8, "accumulate": 3}}, "accumulate=3 does not divide batch_size=8; nearest: accumulate=2"),
        ({"train": {"batch_warmup_steps": 9}}, "accumulate=1 of them; nearest: accumulate=2"),
        ({"train": {"batch_warmup_steps": 9, "accumulate": 4, "batch_warmup_start": 4}}, "nearest: batch_warmup_start=3"),
        ({"train": {"accumulate": 4, "batch_warmup_start": 2}}, "batch_warmup_start=2 does nothing with batch_warmup_steps=0"),
        ({"log": {"every": 7}}, "config.log.every=7 is not a multiple of train.steps_per_dispatch=10; nearest: log.every=10"),
        ({"eval": {"every": 26}}, "nearest: eval.every=30"),
        ({"sample": {"every": 5}}, "nearest: sample.every=10"),
        ({"checkpoint": {"every": 501}}, "nearest: checkpoint.every=500"),
        ({"train": {"length": "25 steps"}}, "'25 steps' is not a whole multiple of train.steps_per_dispatch=10"),
        ({"train": {"length": "25 steps"}}, "nearest: '20 steps'"),
        ({"train": {"length": "3.5 steps"}}, "nearest: '10 steps'"),
        ({"eval": {"stride": 300}}, "eval.stride=300 is larger than model.context_length=256"),
        ({"model": {"logit_softcap": -1.0}}, "got -1.0, expected a number at least 0.0"),
        ({"train": {"z_loss": -1e-4}}, "got -0.0001, expected a number at least 0.0"),
        ({"model": {"mup_base_width": -64}}, "got -64, expected a number at least 0"),
        ({"model": {"mup_base_head_dim": 32}}, "mup_base_head_dim=32 does nothing without muP; set mup_base_width"),
        ({"model": {"mup_base_width": 8, "mup_base_head_dim": 32, "attention_scale": 0.1}}, "does nothing with attention_scale"),
        ({"model": {"mup_base_width": 64, "d_ff": 1001}}, "no whole d_ff is to mup_base_width=64 as 1001 to d_model=256"),
        ({"model": {"mup_base_width": 64, "d_ff": 1001}}, "nearest: d_ff=1000"),
        ({"optimizer": {"name": "lyon"}}, "did you mean lion?"),
        ({"optimizer": {"schedule": "cosin"}}, "expected one of cosine, wsd, inverse_sqrt, constant (did you mean cosine?)"),
        ({"optimizer": {"name": "schedule_free"}}, "takes the place of schedule=cosine; nearest: optimizer.schedule=constant"),
        ({"optimizer": {"name": "schedule_free", "schedule": "constant", "ema_decay": 0.9}}, "set ema_decay=0"),
        ({"optimizer": {"name": "schedule_free", "schedule": "constant", "b1": 0.0}}, "needs b1 above 0 (got 0.0)"),
        ({"optimizer": {"name": "adafactor", "moment_dtype": "bfloat16"}}, "does nothing with optimizer.name=adafactor"),
        ({"optimizer": {"moment_dtype": "bfloat16", "b2": 0.999}}, "of 8 bits a step of 1 - b2 = 0.001 is rounded away"),
        ({"data": {"source": "text"}}, "config.data.path is empty"),
        ({"data": {"holdout": "tail"}}, "shingle_bytes=50: near-duplicates can be dropped only with data.holdout=hash"),
        ({"checkpoint": {"every": 500, "keep_every": 300}}, "multiples of 1500 would stay; nearest: keep_every=500"),
        ({"model": {"head_dim": 36, "rope_fraction": 0.65}}, "rotates 23 of 36 coordinates"),
        ({"mesh": {"fsdp": -1, "data": -1}}, "at most one axis takes what is left (-1)"),
        ({"mesh": {"preset": "fdsp"}}, "did you mean fsdp?"),
    ],
)  # fmt: skip
def test_bad_values_are_refused(values, fragment):
    assert fragment in refusal(freeze, values)


@pytest.mark.parametrize("name", ["adamw", "muon", "lion"])
def test_moments_in_half_the_memory_can_be_asked_for(name):
    assert freeze({"optimizer": {"name": name, "moment_dtype": "bfloat16"}}).optimizer.moment_dtype == "bfloat16"


def test_a_router_that_could_not_learn_is_refused_in_new_models():
    model = freeze({"model": {"n_experts": 4, "experts_per_token": 1}}).model
    assert "learns nothing from the task; set router_normalise=false" in refusal(validate_router, model)
    validate_router(dataclasses.replace(model, router_normalise=False))
    validate_router(dataclasses.replace(model, n_experts=0))


@pytest.mark.parametrize("width", [6, 36, 44, 96, 150])
def test_the_nearest_share_of_rotary_coordinates_is_legal(width):
    for wrong in (n / 41 for n in range(1, 41)):
        try:
            freeze({"model": {"head_dim": width, "rope_fraction": wrong}})
        except RunError as e:
            freeze({"model": {"head_dim": width, "rope_fraction": float(re.search(r"nearest: rope_fraction=(\S+)", str(e))[1])}})


@settings(deadline=None)
@given(st.integers(1, 64), st.integers(1, 64))
def test_the_nearest_value_named_is_legal(d_model, n_heads):
    try:
        freeze({"model": {"d_model": d_model, "n_heads": n_heads, "positions": "none"}})
    except RunError as e:
        nearest = int(re.search(r"nearest: d_model=(\d+)", str(e))[1])
        freeze({"model": {"d_model": nearest, "n_heads": n_heads, "positions": "none"}})


# ---------------------------------------------------------------- train.length


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2000 steps", (2000, "steps")),
        ("1e6 tokens", (1e6, "tokens")),
        ("0.5 epochs", (0.5, "epochs")),
        ("1_000 steps", (1000, "steps")),
    ],
)  # fmt: skip
def test_lengths(text, expected):
    assert parse_length(text) == expected


@pytest.mark.parametrize(
    "text", ["", "steps", "10", "10steps", "10 hours", "0 steps", "-1 epochs", "nan steps", "inf tokens", "1 2 steps"]
)
def test_other_lengths_are_refused(text):
    assert "expected 'N steps', 'N tokens' or 'N epochs'" in refusal(parse_length, text)


@pytest.mark.parametrize("length", ["2147483650 steps", "1e300 steps"])
def test_more_steps_than_an_int32_counts_are_refused(length):
    assert "steps; nearest: 2147483647, the most that 32 bits count" in refusal(freeze, {"train": {"length": length}})
    freeze({"train": {"length": "2147483640 steps"}})


@pytest.mark.parametrize("length", ["1e308 epochs", "5e12 tokens", "2e9 epochs"])
def test_also_those_that_only_the_text_tells(length):
    config = freeze({"train": {"length": length}})
    assert f"config.train.length={length!r} is " in refusal(total_steps, config, 4096)


def test_tokens_and_epochs_are_rounded_up_to_whole_dispatches():
    def steps(length):
        values = {"train": {"length": length, "batch_size": 4, "steps_per_dispatch": 10}, "model": {"context_length": 32}}
        return total_steps(freeze(values), tokens_per_epoch=128 * 25)

    assert [steps(s) for s in ("40 steps", "1280 tokens", "1281 tokens", "1 epochs", "2 epochs")] == [40, 10, 20, 30, 50]


# ---------------------------------------------------------------- config files and overrides


def test_overrides_reach_every_knob_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flat = flatten(to_dict(RunConfig()))
    written = {name: str(value) for name, value in flat.items()}  # defaults, including None, as one would type them
    assert config_file.read(BASE, written) == RunConfig()
    config = config_file.read(BASE, {"model.n_kv_heads": "2", "eval.stride": "8", "init.from": "run", "seed": "3"})
    assert (config.model.n_kv_heads, config.eval.stride, config.init.from_, config.seed) == (2, 8, "run", 3)


def test_a_file_outside_the_project_can_take_an_argument_and_set_an_optional(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from gpt4o_jax.config import base_config\n"
        "def get_config(size):\n    c = base_config()\n    c.model.d_ff = int(size)\n    return c\n"
    )
    assert config_file.read(f"{file}:96", {}).model.d_ff == 96
    assert config_file.read(f"{file}:96", {"model.d_ff": "64"}).model.d_ff == 64


def test_what_a_file_leaves_out_has_its_default(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({'train': {'batch_size': 3}})\n"
    )
    assert config_file.read(str(file), {"seed": "2"}) == freeze({"train": {"batch_size": 3}, "seed": 2})


START = "from gpt4o_jax.config import base_config\ndef get_config():\n    c = base_config()\n    "


@pytest.mark.parametrize(
    ("text", "argument", "fragment"),
    [
        ("def get_config(:\n", "", "line 1"),
        ("x = 1\n", "", "get_config"),
        ("def get_config():\n    return 3\n", "", "get_config() returned int"),
        ("def get_config(size):\n    return 3\n", "", "missing 1 required positional argument"),
        ("def get_config():\n    return 3\n", ":small", "takes no argument after the colon"),
        ("def get_config():\n    return 1 / 0\n", "", "ZeroDivisionError"),
        ("import nothing_of_this_name\n", "", "No module named"),
        ("import sys\ndef get_config():\n    sys.exit('no such data')\n", "", "line 3: SystemExit: no such data"),
        ("import sys\nsys.exit()\n", "", "line 2: SystemExit"),
        ("\x00", "", "null byte"),
        (START + "c.model.d_modle = 3\n    return c\n", "", "line 4: Key \"d_modle\" does not exist"),
        (START + "c.model.d_modle = 3\n    return c\n", "", "since the config is locked. Did you mean \"d_model\" instead"),
        (START + "c.model.d_model = 'x'\n    return c\n", "", "line 4: TypeError"),
        (START + "return type(c)({'model': 3})\n", "", "expected a section"),
    ],
)  # fmt: skip
def test_broken_config_files_are_refused(tmp_path, text, argument, fragment):
    file = tmp_path / "mine.py"
    file.write_text(text)
    message = refusal(config_file.read, f"{file}{argument}", {"seed": "1"})
    assert str(file) in message or fragment == "expected a section"
    assert fragment in message


@pytest.mark.parametrize(
    ("spec", "overrides", "fragment"),
    [
        ("nowhere.py", {}, "no such file; configs of this project are in configs/"),
        (str(ROOT / "configs"), {}, "configs: a folder, expected a Python file"),
        (BASE, {"model.d_modle": "3"}, "--config.model.d_modle: no such key (did you mean model.d_model?)"),
        (BASE, {"model": "3"}, "--config.model: no such key"),
        (BASE, {"": "3"}, "no such key"),
    ],
)
def test_wrong_files_and_keys_are_refused(spec, overrides, fragment):
    assert fragment in refusal(config_file.read, spec, overrides)
