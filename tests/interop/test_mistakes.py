"""Broken folders, by class of mistake: one line says what is wrong and where, and nothing is created."""

import json
import os

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gpt4o_jax.data.tokenizer import char_tokenizer
from gpt4o_jax.errors import ExitCode, RunError
from gpt4o_jax.interop import config_json, huggingface
from gpt4o_jax.interop.families import FAMILIES
from gpt4o_jax.interop.files import INDEX, SINGLE
from tests.interop.conftest import FIXTURES, load

QUERY, NORM = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"


def tensors(change):
    def spoil(folder):
        values = load_file(folder / SINGLE)
        change(values)
        save_file({k: np.ascontiguousarray(v) for k, v in values.items()}, folder / SINGLE)

    return spoil


def config(**values):
    def spoil(folder):
        stored = json.loads((folder / "config.json").read_text())
        stored = {k: v for k, v in (stored | values).items() if v != "absent"}
        (folder / "config.json").write_text(json.dumps(stored))

    return spoil


def sharded(change=lambda folder, index: None):
    """Splits the folder into two files with an index, which `change(folder, index)` may damage."""

    def spoil(folder):
        values = load_file(folder / SINGLE)
        (folder / SINGLE).unlink()
        names, files = sorted(values), ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
        halves = names[: len(names) // 2], names[len(names) // 2 :]
        index = {"metadata": {"total_size": sum(x.nbytes for x in values.values())}, "weight_map": {}}
        for file, half in zip(files, halves, strict=True):
            save_file({n: values[n] for n in half}, folder / file)
            index["weight_map"] |= dict.fromkeys(half, file)
        change(folder, index)
        (folder / INDEX).write_text(json.dumps(index))

    return spoil


def second(index) -> str:
    return sorted(set(index["weight_map"].values()))[1]


def twice(folder, index):
    first = sorted(set(index["weight_map"].values()))[0]
    extra = load_file(folder / first) | {NORM: load_file(folder / second(index))[NORM]}
    save_file(extra, folder / first)


def renamed(to):
    def change(folder, index):
        name = second(index)
        index["weight_map"] = {k: to if v == name else v for k, v in index["weight_map"].items()}

    return change


def linked(folder, index):
    outside = folder.parent / "elsewhere.safetensors"
    os.rename(folder / second(index), outside)
    os.symlink(outside, folder / second(index))


def circular(folder, index):
    name = second(index)
    (folder / name).unlink()
    os.symlink(folder / name, folder / name)


def deep_index(folder):
    sharded()(folder)
    (folder / INDEX).write_text("[" * 200_000)


def deep_header(folder):
    (folder / SINGLE).write_bytes((200_000).to_bytes(8, "little") + b"[" * 200_000)


def pickled(folder):
    (folder / SINGLE).rename(folder / "pytorch_model.bin")


def pickled_in_shards(folder):
    (folder / SINGLE).unlink()
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {NORM: "pytorch_model-00001-of-00002.bin"}}))


def repeated(other: bool):
    """The header names NORM a second time, with other bytes of the file or the same ones."""

    def spoil(folder):
        raw = (folder / SINGLE).read_bytes()
        size = int.from_bytes(raw[:8], "little")
        header, data = json.loads(raw[8 : 8 + size]), raw[8 + size :]
        entry = header[NORM] | ({"data_offsets": [len(data), len(data) + 64]} if other else {})
        text = (json.dumps(header)[:-1] + f', "{NORM}": {json.dumps(entry)}}}').encode()
        (folder / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + data + bytes(64 * other))

    return spoil


def cut(folder):
    (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:-100])


def rope(**values):
    return config(rope_parameters={"rope_theta": 10_000.0, **values})


MISTAKES = {
    "missing": (tensors(lambda t: t.pop(QUERY)), f"{QUERY} is missing"),
    "missing, several": (
        tensors(lambda t: [t.pop(k) for k in list(t) if "mlp" in k]),
        "model.layers.0.mlp.gate_proj.weight and 3 more are missing",
    ),
    "extra": (tensors(lambda t: t.update({"model.layers.2.odd": t[NORM]})), "model.layers.2.odd is unexpected"),
    "transposed": (
        tensors(lambda t: t.update({"lm_head.weight": t["lm_head.weight"].T})),
        "lm_head.weight in model.safetensors is [16, 61], expected [61, 16]; it lies transposed",
    ),
    "wrong shape": (tensors(lambda t: t.update({NORM: t[NORM][:-1]})), f"{NORM} in {SINGLE} is [15], expected [16]"),
    "integers": (tensors(lambda t: t.update({NORM: t[NORM].astype(np.int8)})), f"{NORM} in {SINGLE} is I8, expected one of F32"),
    "double": (tensors(lambda t: t.update({NORM: t[NORM].astype(np.float64)})), "is F64, expected one of"),
    "truncated": (cut, "not a whole safetensors file"),
    "empty file": (lambda folder: (folder / SINGLE).write_bytes(b""), "not a whole safetensors file"),
    "pickle": (pickled, "pytorch_model.bin is a pickle file, and loading one runs any program that it holds"),
    "pickles in shards": (pickled_in_shards, "pytorch_model.bin.index.json is the index of pickle files, and loading one runs"),
    "no weights": (lambda folder: (folder / SINGLE).unlink(), f"neither {SINGLE} nor {INDEX}"),
    "twice in one file": (repeated(other=True), f"tensor {NORM} is twice, both times in {SINGLE}"),
    "twice in one file, the same": (repeated(other=False), f"tensor {NORM} is twice, both times in {SINGLE}"),
    "in two shards": (sharded(twice), f"tensor {NORM} is twice"),
    "no name of a file": (sharded(renamed("a\0.safetensors")), "'a\\x00.safetensors' is no file (embedded null"),
    "half a character": (sharded(renamed("\ud800.safetensors")), "'\\ud800.safetensors' is no file"),
    "link to itself": (sharded(circular), "is no file ("),
    "index too deep": (deep_index, "damaged; expected a JSON object with weight_map"),
    "config too deep": (lambda folder: (folder / "config.json").write_text("[" * 200_000), "not readable as JSON"),
    "header too deep": (deep_header, "not a whole safetensors file"),
    "file not there": (sharded(renamed("model-00009.safetensors")), "names model-00009.safetensors, which is not there"),
    "tensor not there": (sharded(lambda f, i: i["weight_map"].update({"odd": second(i)})), "holds odd, which it does not"),
    "tensor not in index": (sharded(lambda f, i: i["weight_map"].pop(NORM)), f"holds {NORM}, of which"),
    "total": (sharded(lambda f, i: i["metadata"].update(total_size=5)), "says total_size=5, but the tensors are"),
    "index damaged": (sharded(lambda f, i: i.pop("weight_map")), "damaged; expected a JSON object with weight_map"),
    "up and out": (
        sharded(renamed("../x.safetensors")),
        "'../x.safetensors' is not the name of a safetensors file in this folder",
    ),
    "absolute": (sharded(renamed("/etc/passwd")), "'/etc/passwd' is not the name of a safetensors file"),
    "link outside": (sharded(linked), "outside the folder"),
    "family": (config(model_type="lama"), "model_type='lama' is not known (did you mean llama?)"),
    "class": (config(architectures=["LlamaForTokenClassification"]), "expected LlamaForCausalLM"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    "config damaged": (lambda folder: (folder / "config.json").write_text("{"), "not readable as JSON"),
    "key missing": (config(hidden_size="absent"), "hidden_size is missing"),
    "type": (config(hidden_size="16"), "hidden_size='16', expected int"),
    "activation": (config(hidden_act="mish"), "hidden_act='mish' is not supported for llama; expected one of silu"),
    "biases": (config(attention_bias=True), "attention_bias=True is not supported for llama; expected False"),
    "unknown key": (config(alibi=True), "alibi=True is not known for llama"),
    "quantised": (config(quantization_config={"bits": 4}), "quantization_config={'bits': 4} is not known"),
    "heads": (config(num_key_value_heads=3), "n_kv_heads=3 does not divide n_heads=4"),
    "rope type": (rope(rope_type="longrope"), "expected rope_type default, linear, yarn, llama3"),
    "rope factor": (rope(rope_type="linear"), "expected a number under factor"),
    "rope parameter": (rope(rope_type="default", mscale=2.0), "expected no mscale with rope_type default"),
    "rope base": (rope(rope_theta="abc"), "expected a number under rope_theta"),
    "rope not by name": (config(rope_parameters=None, rope_scaling=[1]), "rope_scaling=[1], expected dict"),
    "yarn factor": (rope(rope_type="yarn", factor=0), "expected a factor of 1 or more"),
    "yarn factor below 0": (rope(rope_type="yarn", factor=-2.0), "expected a factor of 1 or more"),
    "yarn sharpening": (rope(rope_type="yarn", factor=4.0, attention_factor="1"), "expected a number under attention_factor"),
    "yarn context": (
        rope(rope_type="yarn", factor=4.0, original_max_position_embeddings="4k"),
        "expected a number under original_max_position_embeddings",
    ),
    "yarn context, not whole": (
        rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=32.7),
        "expected a whole number under original_max_position_embeddings",
    ),
    "yarn base": (config(rope_parameters={"rope_type": "yarn", "factor": 2.0, "rope_theta": 1}), "rope_theta=1: all pairs turn"),
    "family not a text": (config(model_type=["llama"]), "model_type=['llama'] is not known"),
    "rope twice": (config(rope_theta=7.0), "expected what rope_theta and rope_scaling beside it say"),
    "tokenizer absent": (lambda folder: (folder / "tokenizer.model").unlink(), "no tokenizer there"),
    "tokenizer": (
        lambda f: char_tokenizer("abcdefghijklmnopqrstuvwxyzABCDE").save(f / "tokenizer.model"),
        "63 pieces, but config",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_in_one_line_and_nothing_is_made(hf, tmp_path, mistake):
    spoil, says = MISTAKES[mistake]
    source = hf("llama-plain")
    spoil(source)
    with pytest.raises(RunError) as e:
        huggingface.import_folder(source, tmp_path / "runs" / "run")
    assert says in str(e.value), str(e.value)
    assert e.value.code == ExitCode.DATA and "\n" not in str(e.value)
    assert {p.name for p in tmp_path.iterdir()} <= {"hf", "elsewhere.safetensors"}


@pytest.mark.parametrize(
    ("name", "values", "says"),
    [
        ("gemma2-plain", dict(query_pre_attn_scalar=0), "query_pre_attn_scalar=0 is not supported for gemma2; expected a"),
        ("gemma2-plain", dict(query_pre_attn_scalar=-1.5), "expected a number above 0"),
        ("gemma2-plain", dict(layer_types=[{}, {}]), "expected 2 of sliding_attention, full_attention"),
        ("gemma2-plain", dict(sliding_window=None), "sliding_window=None is not supported for gemma2; expected a number of"),
        ("gemma3_text-plain", dict(rope_parameters={"full_attention": [1]}), "expected parameters by name"),
        ("mixtral-plain", dict(num_local_experts=0), "num_local_experts=0 is not supported for mixtral; expected at least 1"),
        ("qwen3_moe-plain", dict(num_local_experts=0), "expected at least 1"),
    ],
)
def test_a_value_that_no_model_of_the_family_has_is_told(hf, name, values, says):
    source = hf(name)
    config(**values)(source)
    with pytest.raises(RunError) as e:
        config_json.read(source)
    assert says in str(e.value) and e.value.code == ExitCode.DATA


VALUES = (
    0,
    -1,
    3,
    10**12,
    10**400,
    0.5,
    -0.5,
    1e300,
    float("inf"),
    float("nan"),
    "x",
    True,
    None,
    [],
    [1],
    {},
    {"a": 1},
    "absent",
)
OTHERS = ("rope_local_base_freq", "rope_scaling", "sliding_window", "layer_types", "num_local_experts", "quantization_config")


@pytest.mark.parametrize("name", sorted(path.name for path in FIXTURES.glob("*-plain")))
def test_whatever_stands_in_a_config_is_read_or_told_in_one_line(name):
    """Every key of the family, and keys of others, with every kind of value."""
    stored, told = json.loads((FIXTURES / name / "config.json").read_text()), set()
    for key in (*stored, *OTHERS):
        for value in VALUES:
            changed = {k: v for k, v in (stored | {key: value}).items() if v != "absent"}
            family = FAMILIES[stored["model_type"]]
            try:
                config_json.to_model(family, changed, "config.json")
            except RunError as e:
                assert e.code == ExitCode.DATA and "\n" not in str(e) and len(str(e)) < 600, (key, value)
                told.add(key)
    assert {"hidden_size", "vocab_size", "quantization_config"} & stored.keys() <= told


@pytest.mark.parametrize(("name", "window"), [("qwen2-plain", None), ("qwen2-plain", "absent"), ("gemma2-plain", None)])
def test_no_window_is_none_and_an_absent_one_is_the_default_of_transformers(hf, name, window):
    source = hf(name)
    layers = {"layer_types": ["full_attention"] * 2} if name == "gemma2-plain" else {"layer_types": "absent"}
    config(use_sliding_window=True, max_window_layers=0, sliding_window=window, **layers)(source)
    if name == "gemma2-plain":
        config(use_sliding_window="absent", max_window_layers="absent")(source)
    model = config_json.read(source)[1]
    assert (model.window, model.layer_pattern) == ((4096, ("local",)) if window == "absent" else (None, ("global",)))


def test_what_is_no_mistake(hf, tmp_path, monkeypatch):
    """A sharded folder in the Hub's cache, with its links to blobs; a tied table stored twice; unused keys."""
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: first)
    source = hf("mistral-tied", "snapshots/abc")
    config(rope_theta=10_000.0, transformers_version="4.1", summary_type="x", some_null=None)(source)
    tensors(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))(source)
    sharded()(source)
    (tmp_path / "blobs").mkdir()
    for path in source.glob("*.safetensors"):
        os.rename(path, tmp_path / "blobs" / path.name)
        os.symlink(tmp_path / "blobs" / path.name, path)
    huggingface.import_folder(source, tmp_path / "run")
    tensors_changed = tmp_path / "blobs" / "model-00001-of-00002.safetensors"
    save_file(load_file(tensors_changed) | {"lm_head.weight": np.ones((61, 16), np.float16)}, tensors_changed)
    with pytest.raises(RunError, match="tie_word_embeddings is true, but lm_head"):
        huggingface.import_folder(source, tmp_path / "other")


@pytest.mark.parametrize("name", ["gpt2-plain", "gpt2-relu"])
def test_gpt2_as_the_hub_has_it(hf, name):
    """Its tensors have no prefix and come with causal masks, one per layer."""
    source = hf(name)
    wanted = load(source)[1]
    values = {k.removeprefix("transformer."): v for k, v in load_file(source / SINGLE).items()}
    for layer in range(2):
        values[f"h.{layer}.attn.bias"] = np.tril(np.ones((1, 1, 512, 512), np.float32))
        values[f"h.{layer}.attn.masked_bias"] = np.array(-1e4, np.float32)
    save_file(values, source / SINGLE)
    jax.tree.map(np.testing.assert_array_equal, load(source)[1], wanted)
    save_file(values | {"h.2.attn.bias": values["h.0.attn.bias"]}, source / SINGLE)
    with pytest.raises(RunError, match=r"h\.2\.attn\.bias is unexpected"):
        load(source)
