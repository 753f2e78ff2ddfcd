"""The parts of a plan: collectives read off compiled programs that do known ones; the roofline by hand; a real slice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt4o_jax import parallel
from gpt4o_jax.config import MeshConfig, ModelConfig, RunConfig, TrainConfig
from gpt4o_jax.errors import RunError
from gpt4o_jax.training import plan
from gpt4o_jax.training.collectives import collectives

CHIP = plan.Chip(flops=1e12, hbm=1e9, hbm_rate=1e9, ici=1e8, dcn=1e6, devices=1, accelerator="")


def read(f, in_specs, out_specs, *shapes):
    mesh = parallel.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    f = jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    with jax.set_mesh(mesh):
        text = jax.jit(f).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).compile().as_text()
    return collectives(text, dict(mesh.shape), np.arange(8).reshape(2, 2, 2))


def loop(x):
    return jax.lax.fori_loop(0, 5, lambda _, y: jax.lax.psum(jnp.sin(y), "tensor"), x)


@pytest.mark.parametrize(
    ("f", "spec", "out", "expected"),
    [
        (lambda x: jax.lax.psum(x, "data"), jax.P(), jax.P(), ("all-reduce", "data", 1, 4 * 64)),
        (lambda x: jax.lax.psum(x, ("data", "fsdp")), jax.P(), jax.P(), ("all-reduce", "data+fsdp", 1, 4 * 64)),
        (lambda x: jax.lax.all_gather(x, "fsdp"), jax.P("fsdp"), jax.P(), ("all-gather", "fsdp", 1, 4 * 64)),
        (lambda x: jax.lax.psum_scatter(x, "tensor"), jax.P(), jax.P("tensor"), ("reduce-scatter", "tensor", 1, 4 * 64)),
        (lambda x: jax.lax.ppermute(x, "data", [(0, 1), (1, 0)]), jax.P(), jax.P(), ("collective-permute", "data", 1, 4 * 64)),
        (loop, jax.P(), jax.P(), ("all-reduce", "tensor", 5, 5 * 4 * 64)),
    ],
    ids=["all-reduce", "two axes", "all-gather", "reduce-scatter", "permute", "in a loop"],
)
def test_collectives_are_read_by_axis_with_count_and_bytes(f, spec, out, expected):
    shape = (2, 32) if expected[0] == "reduce-scatter" else (64,)
    (found,) = read(f, (spec,), out, shape)
    assert tuple(found.values()) == expected


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("mesh['axis_0'=1,'axis_1'=2,'axis_2'=2], device_ids=([2,2]T(1,0)) {'axis_1'}", "fsdp"),
        ("mesh['axis_0'=1,'axis_1'=2,'axis_2'=2], device_ids=([2,2]T(1,0)) {'axis_2'}", "data"),
        ("mesh['axis_0'=2,'axis_1'=2] {'axis_0'}", "data"),
        ("mesh['axis_0'=4,'axis_1'=1] {'axis_0','axis_1'}", "data+fsdp"),
        ("{{0,1},{2,3}}", "fsdp"),
    ],
)
def test_groups_as_tpus_write_them(groups, axes):
    # Lines of a program that libtpu compiled for v5e:2x2 with data=2, fsdp=2.
    line = f"  %all-gather.1 = f32[8]{{0}} all-gather(%p), channel_id=1, replica_groups={groups}, dimensions={{0}}"
    found = collectives(
        "ENTRY %main (p: f32[4]) -> f32[8] {\n" + line + "\n}", {"data": 2, "fsdp": 2}, np.arange(4).reshape(2, 2)
    )
    assert [c["axes"] for c in found] == [axes] and found[0]["bytes"] == 32


def test_what_stays_on_a_device_sends_nothing():
    assert read(lambda x: x * 2, (jax.P("data"),), jax.P("data"), (64,)) == []


def test_roofline_by_hand():
    config = RunConfig(
        model=ModelConfig(vocab_size=64, context_length=16, n_layers=1, d_model=32, remat="full"), train=TrainConfig(batch_size=8)
    )
    mesh = parallel.make_mesh(MeshConfig(data=8))
    found = [{"kind": "all-reduce", "axes": "data", "count": 1, "bytes": 8_000_000}]
    r = plan.roofline(config, CHIP, mesh, found, arguments=1_000_000)
    useful = plan.flops.train_flops_per_token(config.model) * 8 * 16
    assert r["seconds"]["compute"] == pytest.approx(useful * 4 / 3 / 8 / 1e12)
    assert r["seconds"]["hbm"] == pytest.approx(2e6 / 1e9)
    assert r["seconds"]["ici"] == pytest.approx(2 * 8e6 * 7 / 8 / 1e8)
    assert r["seconds"]["dcn"] == 0 and r["bound_by"] == "ici"
    assert r["mfu_at_most"] == pytest.approx(useful / 8 / 1e12 / r["step_seconds_at_least"])


@pytest.mark.parametrize("name", ["v5e", "v9:2x2", "v5e:0x2", "v5e:axb", ""])
def test_an_unknown_topology_is_told(name):
    with pytest.raises(RunError, match="expected FAMILY"):
        plan.parse_topology(name)


def test_remedies_come_mildest_first():
    config = RunConfig(model=ModelConfig(vocab_size=64), train=TrainConfig(batch_size=32), mesh=MeshConfig(data=4, fsdp=2))
    names = [name for name, _ in plan.remedies(config, {"data": 4, "fsdp": 2, "tensor": 1})]
    assert names[:3] == ["model.remat=dots", "model.remat=full", "model.remat=full, mesh.data=1, mesh.fsdp=8"]
    assert names[3:] == ["model.remat=full, train.batch_size=16", "model.remat=full, train.batch_size=8"]
