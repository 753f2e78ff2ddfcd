"""Import, export and import again; shards on several devices; peak host memory."""

import json
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from gpt4o_jax import parallel, run
from gpt4o_jax.config import MeshConfig, ModelConfig
from gpt4o_jax.errors import RunError
from gpt4o_jax.interop import config_json, files, huggingface, weights
from tests.interop.cases import CASES
from tests.interop.conftest import load


@pytest.fixture(autouse=True)
def laptop(monkeypatch):
    """The commands use every device there is."""
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: first)


def export(workdir, to, **options) -> dict:
    opened = run.open_run(workdir)
    with jax.set_mesh(opened.mesh):
        return huggingface.export_folder(opened, to, **options)


def tensors(folder) -> dict[str, np.ndarray]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.mark.parametrize("name", CASES)
def test_what_is_read_and_written_again_has_the_same_bits(hf, tmp_path, name):
    """Tensors of every case, config and parameters, as `convert` writes them, in several files."""
    source, out = hf(name), tmp_path / "out"
    model, params, family = load(source)
    stored = files.Weights(source).entries.popitem()[1].dtype
    dtype = np.dtype(ml_dtypes.bfloat16 if stored == "BF16" else np.float32)
    theirs = weights.Theirs(family, params, model.config, dtype)
    out.mkdir()
    files.write(out, theirs.shapes.items(), theirs.load, dtype, max_bytes=4000)
    (out / "config.json").write_text(json.dumps(config_json.from_model(family, model.config)))
    before, after = tensors(source), tensors(out)
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 1
    assert before.keys() == after.keys()
    for key, x in before.items():
        np.testing.assert_array_equal(x.astype(np.float32), after[key].astype(np.float32), err_msg=key)
    again, same, _ = load(out)
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, params, same)


@pytest.mark.parametrize("name", ["gpt2-untied", "gemma2-four"])
def test_a_run_that_is_exported_and_imported_again_is_the_same_run(hf, tmp_path, name):
    huggingface.import_folder(hf(name), tmp_path / "run")
    export(tmp_path / "run", tmp_path / "out", name=name.partition("-")[0])
    huggingface.import_folder(tmp_path / "out", tmp_path / "again")
    first, second = (run.open_run(tmp_path / r) for r in ("run", "again"))
    assert first.config == second.config and first.tokenizer.digest == second.tokenizer.digest
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)


def test_without_a_name_the_first_family_that_computes_the_same_is_taken(hf, tmp_path):
    huggingface.import_folder(hf("mistral-global"), tmp_path / "run")
    assert export(tmp_path / "run", tmp_path / "out")["family"] == "llama"  # a Mistral without windows is a Llama
    with pytest.raises(RunError, match="--family=gemma2 does not fit"):
        export(tmp_path / "run", tmp_path / "no", name="gemma2")
    assert not (tmp_path / "no").exists()


def test_the_nearest_family_is_one_that_can_be_read_back():
    """This model has no experts: exported to a family of mixtures, it could not be read back at all."""
    small = ModelConfig(vocab_size=256, expert_d_ff=64, mlp="relu2", value_embeddings=1, residual_mix=True)
    with pytest.raises(RunError, match=r"the nearest is qwen3, which differs in mlp=relu2 .* value_embeddings=1"):
        config_json.choose(small)


@pytest.mark.parametrize("name", ["gpt2-plain", "llama-plain", "gemma2-four"])
@pytest.mark.parametrize("axes", [dict(fsdp=8), dict(data=2, fsdp=2, tensor=2)], ids=str)
def test_shards_on_eight_devices_hold_what_one_device_holds(hf, name, axes):
    source = hf(name)
    if axes.get("tensor"):
        _even_vocabulary(source)
    whole = load(source)[1]
    sharded = load(source, parallel.make_mesh(MeshConfig(**dict(data=1) | axes), jax.local_devices()))[1]
    jax.tree.map(np.testing.assert_array_equal, whole, sharded)
    assert len({s.index[-1].stop or 0 for s in sharded["embedding"].addressable_shards}) > 1  # fsdp does split the width


def _even_vocabulary(folder):
    """Adds a token, because 61 do not divide over two devices."""
    from safetensors.numpy import save_file

    values = json.loads((folder / "config.json").read_text())
    more = {k: np.concatenate([v, v[:1]]) if v.shape[0] == 61 else v for k, v in tensors(folder).items()}
    save_file(more, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(values | {"vocab_size": 62}))


def test_the_host_never_holds_more_than_two_shards_of_the_largest_parameter(hf, monkeypatch):
    """A model of 38 MB on eight devices, read in small steps: the peak memory of Python and NumPy beyond that of the devices,
    which on CPU devices is part of theirs."""
    from safetensors.numpy import save_file

    monkeypatch.setattr(weights, "CHUNK", 1 << 14)
    source = hf("llama-plain")
    D, F, L = 64, 4096, 12
    values = json.loads((source / "config.json").read_text())
    values |= {"hidden_size": D, "intermediate_size": F, "num_hidden_layers": L, "head_dim": 16}
    (source / "config.json").write_text(json.dumps(values))
    resized = {}
    for key, x in tensors(source).items():
        if ".layers.1." in key:
            continue
        shape = [{16: D, 24: F}.get(n, n) for n in x.shape]
        for layer in range(L if ".layers.0." in key else 1):
            resized[key.replace(".0.", f".{layer}.")] = np.random.default_rng(layer).normal(size=shape).astype(np.float32)
    save_file(resized, source / "model.safetensors")
    del resized
    mesh = parallel.make_mesh(MeshConfig(data=1, fsdp=8), jax.local_devices())
    load(source, mesh)  # so that imports and caches are not measured
    tracemalloc.start()
    try:
        begin = tracemalloc.get_traced_memory()[0]
        params = load(source, mesh)[1]
        peak = tracemalloc.get_traced_memory()[1] - begin
    finally:
        tracemalloc.stop()
    shard = L * D * F * 4 // 8
    assert params["layers"]["mlp"]["up"].addressable_shards[0].data.nbytes == shard
    assert peak < sum(x.nbytes for x in jax.tree.leaves(params)) + 2 * shard


def test_a_killed_import_or_export_leaves_nothing_that_looks_finished(hf, tmp_path, monkeypatch):
    source, workdir = hf("gpt2-plain"), tmp_path / "run"

    class Killed(BaseException):
        pass

    def dies(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(huggingface, "write_config", dies)
        with pytest.raises(Killed):
            huggingface.import_folder(source, workdir)
    assert not workdir.exists()
    left = tmp_path / ".run.unfinished.0"  # what a kill -9 leaves
    (left / "checkpoints").mkdir(parents=True)
    (left / "rubbish").write_text("x")
    huggingface.import_folder(source, workdir)
    assert not left.exists() and not (workdir / "rubbish").exists()
    with monkeypatch.context() as patch:
        patch.setattr(huggingface.config_json, "from_model", dies)
        with pytest.raises(Killed):
            opened = run.open_run(workdir)
            with jax.set_mesh(opened.mesh):
                huggingface.export_folder(opened, tmp_path / "out", name="gpt2")
    assert not (tmp_path / "out").exists()


def test_a_published_tokenizer_travels_with_the_weights(hf, tmp_path):
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    source = hf("llama-gqa")
    (source / "tokenizer.model").unlink()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:58]
    library = tokenizers.Tokenizer(models.BPE({"<unk>": 0} | {c: i + 3 for i, c in enumerate(letters)}, [], unk_token="<unk>"))
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    library.save(str(source / "tokenizer.json"))
    stored = json.loads((source / "tokenizer.json").read_text())
    stored["added_tokens"] = [
        {"id": i, "content": text, "special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        for i, text in enumerate(("<unk>", "<s>", "</s>"))
    ]
    stored["model"]["vocab"] |= {"<s>": 1, "</s>": 2}
    (source / "tokenizer.json").write_text(json.dumps(stored))
    huggingface.import_folder(source, tmp_path / "run")
    export(tmp_path / "run", tmp_path / "out")
    huggingface.import_folder(tmp_path / "out", tmp_path / "again")
    first, second = (run.open_run(tmp_path / r).tokenizer for r in ("run", "again"))
    assert (first.symbols.bos, first.symbols.eos) == (1, (2,)) and first.digest == second.digest
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == [2]
    said = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (said["tokenizer_class"], said["bos_token"], said["eos_token"]) == ("PreTrainedTokenizerFast", "<s>", "</s>")
    assert first.encode("ABC") == library.encode("ABC").ids == second.encode("ABC")
