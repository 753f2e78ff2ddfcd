"""A checkpoint is restored bit for bit on any mesh, or refused by name; no damage and no failed write goes unnoticed."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from gpt4o_jax import parallel
from gpt4o_jax.checkpoint import manifest
from gpt4o_jax.checkpoint.store import Store
from gpt4o_jax.config import MeshConfig
from gpt4o_jax.errors import ExitCode, RunError

META = {"step": 10, "corpus": "c", "tokenizer": "t"}
MESHES = {
    "one device": lambda: parallel.make_mesh(devices=jax.devices()[:1]),
    "8 data": lambda: parallel.make_mesh(),
    "8 fsdp": lambda: parallel.make_mesh(MeshConfig(data=1, fsdp=8)),
    "2 fsdp x 4 tensor": lambda: parallel.make_mesh(MeshConfig(data=1, fsdp=2, tensor=4)),
}
AXES = {"table": ("vocab", "embed"), "norm": ("norm",), "layers": {"up": ("layers", "embed", "mlp")}, "count": ()}


def values(seed: int = 0) -> dict:
    """Leaves of several ranks and types, with floats that only an exact copy preserves (NaN, -0, a subnormal)."""
    rng = np.random.default_rng(seed)
    table = rng.normal(size=(16, 8)).astype(np.float32)
    table[0, :4] = [np.nan, -0.0, 1e-45, np.inf]
    up = jnp.asarray(rng.normal(size=(2, 8, 16)), jnp.bfloat16)
    return {"table": table, "norm": np.ones(8, np.float32), "layers": {"up": up}, "count": np.int32(seed)}


def placed(tree, mesh):
    return jax.tree.map(jax.device_put, tree, parallel.shardings(AXES, mesh))


def like(tree, mesh):
    shardings = parallel.shardings(AXES, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=s), tree, shardings)


def assert_same_bits(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def save(folder, *steps, **options):
    with Store(folder, **options) as store:
        for step in steps:
            store.save(step, {"params": placed(values(step), MESHES["one device"]())}, {**META, "step": step})


def refusal(code, call, *args) -> str:
    with pytest.raises(RunError) as e:
        call(*args)
    assert e.value.code == code and "\n" not in str(e.value)
    return str(e.value)


@pytest.fixture
def folder(tmp_path):
    return epath.Path(tmp_path / "checkpoints")


@pytest.fixture
def two(folder):
    """Finished checkpoints at 10 and 20."""
    save(folder, 10, 20)
    return folder


# ---------------------------------------------------------------- round trip


@pytest.mark.parametrize(("written", "read"), [*((m, "one device") for m in MESHES), *(("one device", m) for m in MESHES)])
def test_what_is_saved_on_one_mesh_comes_back_bit_for_bit_on_another(folder, written, read):
    with Store(folder) as store:
        store.save(10, {"params": placed(values(), MESHES[written]()), "counters": {"step": jnp.int32(10)}}, META)
    store, mesh = Store(folder), MESHES[read]()
    got = store.restore(10, "params", like(values(), mesh))
    assert_same_bits(got, values())
    wanted = parallel.shardings(AXES, mesh)
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), got, wanted))
    assert store.meta(10) == META and store.steps() == [10]
    assert store.has(10, "counters") and not store.has(10, "ema")


def test_a_donated_step_right_after_saving_does_not_reach_the_checkpoint(folder):
    mesh = MESHES["one device"]()
    whole = NamedSharding(mesh, PartitionSpec())
    overwrite = jax.jit(lambda t: jax.tree.map(lambda x: x * 0 - 1, t), donate_argnums=0)
    before = {f"w{i}": np.full((512, 512), i, np.float32) for i in range(8)}
    with Store(folder) as store:
        tree = jax.jit(lambda t: jax.tree.map(lambda x: x + 0, t))(jax.device_put(before, whole))  # owned by the device
        store.save(10, {"params": tree}, META)
        for _ in range(3):
            tree = overwrite(tree)
        jax.block_until_ready(tree)
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), before)
    assert_same_bits(Store(folder).restore(10, "params", wanted), before)


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (lambda t: t | {"norm": np.ones(9, np.float32)}, "norm is float32[8] in the checkpoint but float32[9] in the model"),
        (lambda t: t | {"norm": np.ones(8, np.float16)}, "norm is float32[8] in the checkpoint but float16[8] in the model"),
        (lambda t: t | {"norm": np.ones((1, 8), np.float32)}, "norm is float32[8] in the checkpoint but float32[1, 8]"),
        (lambda t: t | {"layers": {"up": np.ones(3)}}, "layers.up is bfloat16[2, 8, 16] in the checkpoint"),
        (lambda t: t | {"layers": {}}, "layers.up is bfloat16[2, 8, 16] in the checkpoint but absent in the model"),
        (lambda t: t | {"head": np.ones(3, np.float32)}, "head is absent in the checkpoint but float32[3] in the model"),
    ],
)
def test_a_tree_that_does_not_fit_is_refused_by_the_name_of_its_leaf(two, change, fragment):
    whole = NamedSharding(MESHES["one device"](), PartitionSpec())
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=whole), change(values()))
    assert fragment in refusal(ExitCode.DATA, Store(two).restore, 20, "params", wanted)


def test_an_item_that_is_not_there_is_refused(two):
    assert "ema: no such item" in refusal(ExitCode.DATA, Store(two).restore, 20, "ema", {})


# ---------------------------------------------------------------- damage


def files(checkpoint) -> dict[str, Path]:
    """Every file except the manifest, by its name within the checkpoint."""
    found = (p for p in Path(checkpoint).rglob("*") if p.is_file() and p.name != manifest.NAME)
    return {str(p.relative_to(checkpoint)): p for p in found}


def largest_file(checkpoint):
    return max(files(checkpoint).values(), key=lambda p: p.stat().st_size)


def flip_bit(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(bytes(raw))


DAMAGE = {
    "flipped bit": (lambda c: flip_bit(largest_file(c)), "is damaged"),
    "truncated": (lambda c: largest_file(c).write_bytes(largest_file(c).read_bytes()[:-1]), "is damaged"),
    "missing": (lambda c: largest_file(c).unlink(), "is missing"),
    "stray": (lambda c: (c / "params" / "stray").write_text("x"), "stray does not belong to this checkpoint"),
    "swapped item": (lambda c: (c / "params").rename(c / "ema"), "does not belong to this checkpoint"),
    "manifest empty": (lambda c: (c / manifest.NAME).write_text(""), "manifest.json: damaged"),
    "manifest cut off": (lambda c: (c / manifest.NAME).write_text((c / manifest.NAME).read_text()[:-5]), "damaged"),
    "manifest of other JSON": (lambda c: (c / manifest.NAME).write_text("[1]"), "manifest.json: damaged"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_named_put_aside_and_the_checkpoint_before_it_taken(two, kind):
    damage, fragment = DAMAGE[kind]
    store, told = Store(two), []
    assert manifest.verify(store.path(20)) > 1
    damage(store.path(20))
    assert fragment in refusal(ExitCode.DATA, manifest.verify, store.path(20))
    assert store.newest_intact(told.append) == 10
    assert len(told) == 1 and fragment in told[0] and "moved to 20.corrupt" in told[0]
    assert store.steps() == [10] and (two / "20.corrupt").exists()
    assert_same_bits(store.restore(10, "params", like(values(10), MESHES["one device"]())), values(10))


def test_no_flipped_bit_of_the_manifest_goes_unnoticed(two):
    """It protects the files, and its own digest protects it."""
    path = Store(two).path(20) / manifest.NAME
    raw = path.read_bytes()
    good = manifest.read(path.parent)
    for at in range(0, len(raw), 7):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ (1 << at % 8)]) + raw[at + 1 :])
        try:
            assert manifest.read(path.parent) == good, "a flip that changes nothing, such as in white space"
        except RunError as e:
            assert e.code == ExitCode.DATA


def test_a_second_damage_at_the_same_step_is_put_aside_too(two):
    (two / "20.corrupt").mkdir()
    flip_bit(largest_file(two / "20"))
    assert Store(two).newest_intact() == 10


def test_where_nothing_is_intact_there_is_none(two):
    for step in (10, 20):
        flip_bit(largest_file(two / str(step)))
    assert Store(two).newest_intact() is None and Store(two).steps() == []


# ---------------------------------------------------------------- unfinished checkpoints, and how many are kept


def test_unfinished_checkpoints_are_invisible_and_cleaned_away(two):
    (two / "20" / manifest.NAME).unlink()
    (two / "30" / "params").mkdir(parents=True)
    (two / "40.orbax-checkpoint-tmp-1").mkdir()
    store = Store(two)
    assert store.steps() == [10] and store.newest_intact() == 10
    assert "no manifest.json: not a finished checkpoint" in refusal(ExitCode.DATA, store.meta, 30)
    store.clean()
    assert [p.name for p in two.iterdir()] == ["10"]
    save(two, 20)
    assert store.steps() == [10, 20]


def test_a_step_cut_off_before_its_manifest_can_be_saved_again(two):
    (two / "20" / manifest.NAME).unlink()
    save(two, 20)
    assert manifest.verify(two / "20") and Store(two).newest_intact() == 20


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"keep_last": 1}, [60]),
        ({"keep_last": 3}, [40, 50, 60]),
        ({"keep_last": 1, "keep_every": 20}, [20, 40, 60]),
        ({"keep_last": 2, "keep_every": 30}, [30, 50, 60]),
    ],
)
def test_the_last_ones_and_the_milestones_are_kept(folder, options, kept):
    save(folder, *range(10, 70, 10), **options)
    assert Store(folder).steps() == kept == sorted(int(p.name) for p in folder.iterdir())


def test_a_folder_that_is_not_there_has_no_checkpoints(folder):
    store = Store(folder)
    assert store.steps() == [] and store.newest_intact() is None
    store.clean()


# ---------------------------------------------------------------- failing writes


def test_a_file_in_the_way_of_the_folder_is_a_storage_error(folder):
    folder.write_text("not a folder")
    assert Store(folder).steps() == []
    assert f"{folder}/10: cannot write a checkpoint" in refusal(ExitCode.STORAGE, save, folder, 10)


def test_a_failure_in_the_background_is_raised_at_the_next_save_and_at_close(folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest, "write", full)
    items = {"params": placed(values(), MESHES["one device"]())}
    with Store(folder) as store:
        store.save(10, items, META)
        assert "no space left on the device" in refusal(ExitCode.STORAGE, store.save, 20, items, META)
    store = Store(folder)
    store.save(10, items, META)
    assert "free space and run the same command again" in refusal(ExitCode.STORAGE, store.close)
    assert store.steps() == []


def test_the_manifest_is_plain_json_with_a_digest_of_every_file(two):
    content = json.loads((two / "20" / manifest.NAME).read_text())
    assert set(content["files"]) == set(files(two / "20")) and content["meta"] == {**META, "step": 20}
    assert all(len(digest) == 64 for digest in content["files"].values())
