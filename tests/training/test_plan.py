"""The parts of a plan: collectives read from compiled programs with known ones; the roofline by hand; a real slice."""

import dataclasses
import itertools
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt4o_jax import parallel
from gpt4o_jax.config import InitConfig, MeshConfig, ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from gpt4o_jax.config_finetune import LoraConfig, ObjectiveConfig
from gpt4o_jax.errors import RunError
from gpt4o_jax.parallel.pipeline import Schedule
from gpt4o_jax.training import plan, topology
from gpt4o_jax.training.collectives import collectives
from gpt4o_jax.training.program import build

CHIP = topology.Chip(flops=1e12, hbm_rate=1e9, ici=1e8, dcn=1e6, devices=1, hbm=1e9, pod=(2, 4))


def read(f, in_specs, out_specs, *shapes):
    mesh = parallel.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    f = jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    with jax.set_mesh(mesh):
        text = jax.jit(f).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).compile().as_text()
    return collectives(text, dict(mesh.shape), np.arange(8).reshape(mesh.devices.shape))


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
    # Lines from a program that libtpu compiled for v5e:2x2 with data=2, fsdp=2.
    line = f"  %all-gather.1 = f32[8]{{0}} all-gather(%p), channel_id=1, replica_groups={groups}, dimensions={{0}}"
    found = collectives(
        "ENTRY %main (p: f32[4]) -> f32[8] {\n" + line + "\n}", {"data": 2, "fsdp": 2}, np.arange(4).reshape(2, 2)
    )
    assert [c["axes"] for c in found] == [axes] and found[0]["bytes"] == 32


def test_a_sum_of_which_a_device_keeps_a_part_is_a_reduce_scatter_on_tpus():
    program = """%all-reduce-scatter.1 (input: f32[64]) -> f32[16] {
  %all-reduce.1 = f32[64]{0} all-reduce(%input), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %dynamic-slice.1 = f32[16]{0} dynamic-slice(%all-reduce.1, %place), dynamic_slice_sizes={16}
}
ENTRY %main (p: f32[64]) -> f32[16] {
  ROOT %fusion = f32[16]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
}"""
    (found,) = collectives(program, {"data": 2, "fsdp": 2}, np.arange(4).reshape(2, 2))
    assert found == {"kind": "reduce-scatter", "axes": "data+fsdp", "count": 1, "bytes": 4 * 64}


def test_what_goes_from_slice_to_slice_is_counted_once():
    # Lines from a program that libtpu compiled for two slices of v5e:2x2.
    how = lambda kind: f'is_host_transfer=true, frontend_attributes={{_xla_megascale_transfer_type="{kind}"}}'
    program = f"""ENTRY %main (p: f32[4]) -> f32[8] {{
  %send.1 = (f32[1,128]{{1,0:T(1,128)}}, u32[], token[]) send(%p, %after-all.1), channel_id=3, {how("ALL_REDUCE")}
  %recv.1 = (f32[1,128]{{1,0:T(1,128)}}, u32[], token[]) recv(%after-all.1), channel_id=2, {how("ALL_REDUCE")}
  %send-done = token[] send-done(%send.1), channel_id=3, is_host_transfer=true
  %send.2 = (bf16[1,256]{{1,0}}, u32[], token[]) send(%p, %after-all.2), channel_id=5, {how("ALL_GATHER")}
  %recv.2 = (bf16[2,256]{{1,0}}, u32[], token[]) recv(%after-all.2), channel_id=4, {how("ALL_GATHER")}
}}"""
    found = collectives(program, {"data": 2, "fsdp": 4}, np.arange(8).reshape(2, 4))
    assert [tuple(c.values()) for c in found] == [("all-gather", "slices", 1, 2 * 512), ("all-reduce", "slices", 1, 4 * 128)]


def counting(name: str, inside: str, kind: str = "u32", bound: str = "constant(16)", step: int = 1) -> str:
    """The computations of a loop, as libtpu writes them, with its counter at index 1 of the carry."""
    return f"""%{name} (p: (f32[64], {kind}[])) -> (f32[64], {kind}[]) {{
  %p = (f32[64]{{0}}, {kind}[]{{:T(128)}}) parameter(0)
  %one = {kind}[]{{:T(128)}} constant({step})
  %x = f32[64]{{0:T(256)}} get-tuple-element(%p), index=0
  %i = {kind}[]{{:T(128)}} get-tuple-element(%p), index=1
  {inside}
  %next = {kind}[]{{:T(128)}} add(%i, %one), metadata={{stack_frame_id=103}}
  ROOT %t = (f32[64]{{0:T(256)}}, {kind}[]{{:T(128)}}) tuple(%y, %next)
}}
%{name}_condition (p: (f32[64], {kind}[])) -> pred[] {{
  %p = (f32[64]{{0}}, {kind}[]{{:T(128)}}) parameter(0)
  %i = {kind}[]{{:T(128)}} get-tuple-element(%p), index=1
  %end = {kind}[]{{:T(128)}} {bound}, metadata={{op_name="while"}}
  %places = {kind}[]{{:T(128)}} constant(1000)
  ROOT %lt = pred[]{{:T(512)}} compare(%i, %end), direction=LT
}}
"""


SENT = "%y = f32[64]{0:T(256)} collective-permute(%x), channel_id=1, source_target_pairs={{0,1},{1,0}}"


def loop_of(name: str, more: str = "") -> str:
    return f"%w = (f32[64]{{0}}, u32[]) while(%p), condition=%{name}_condition, body=%{name}{more}"


def permutes(computations: str, more: str = "") -> int:
    entry = f"ENTRY %main (p: (f32[64], u32[])) -> (f32[64], u32[]) {{\n  {loop_of('body', more)}\n}}\n"
    (found,) = collectives(computations + entry, {"data": 2}, np.arange(2)) or [{"count": 0, "bytes": 0}]
    assert found["bytes"] == found["count"] * 4 * 64
    return found["count"]


@pytest.mark.parametrize(
    ("how", "more", "count"),
    [
        (dict(kind="u32", step=2), "", 8),
        (dict(kind="u32", step=3), "", 6),
        (dict(kind="s32"), "", 16),
        (dict(kind="s32", bound="get-tuple-element(%p), index=2"), ', backend_config={"known_trip_count":{"n":"5"}}', 5),
    ],
    ids=["u32 by 2", "a last step beyond the end", "s32 by 1", "said by the compiler"],
)
def test_a_loop_runs_as_often_as_it_counts(how, more, count):
    assert permutes(counting("body", SENT, **how), more) == count


def test_loops_in_loops_multiply():
    inside = loop_of("inner") + "\n  %y = f32[64]{0} get-tuple-element(%w), index=0"
    assert permutes(counting("inner", SENT, step=2) + counting("body", inside, kind="s32", bound="constant(3)")) == 3 * 8


def test_a_loop_without_a_known_end_is_refused_where_it_sends_and_none_elsewhere():
    endless = dict(bound="get-tuple-element(%p), index=2")
    with pytest.raises(ValueError, match="a loop that sends, and does not count in a way known here how often: %w = "):
        permutes(counting("body", SENT, **endless))
    assert permutes(counting("body", "%y = f32[64]{0} sine(%x)", **endless)) == 0


@pytest.mark.parametrize(
    ("mesh", "slices", "rows_given", "sizes", "rows"),
    [
        (MeshConfig(preset="fsdp"), 4, False, {"data": 4, "fsdp": 8}, 4 * 64),
        (MeshConfig(preset="dp"), 4, False, {"data": 32}, 4 * 64),
        (MeshConfig(preset="fsdp_tensor"), 4, True, {"data": 4, "fsdp": 4, "tensor": 2}, 64),
        (MeshConfig(preset="fsdp"), 1, False, {"fsdp": 8}, 64),
        (MeshConfig(fsdp=-1), 4, False, {"fsdp": 32}, 64),
    ],
    ids=["fsdp", "dp", "the batch is given", "one slice", "a size is given"],
)
def test_slices_are_copies_of_what_the_config_has_on_one(mesh, slices, rows_given, sizes, rows):
    config = RunConfig(train=TrainConfig(batch_size=64), mesh=mesh)
    found, knobs = topology.along_slices(config, slices, 8, rows_given)
    assert {axis: n for axis, n in found.mesh.sizes(8 * slices).items() if n > 1} == sizes and found.train.batch_size == rows
    copied = {f"mesh.{axis}": n for axis, n in sizes.items()} | ({} if rows_given else {"train.batch_size": rows})
    assert knobs == (copied if found is not config else {})


def test_what_stays_on_a_device_sends_nothing():
    assert read(lambda x: x * 2, (jax.P("data"),), jax.P("data"), (64,)) == []


def test_roofline_by_hand():
    config = RunConfig(
        model=ModelConfig(vocab_size=64, context_length=16, n_layers=1, d_model=32, remat="full"), train=TrainConfig(batch_size=8)
    )
    mesh = parallel.make_mesh(MeshConfig(data=8))
    found = [{"kind": "all-reduce", "axes": "data", "count": 1, "bytes": 8_000_000}]
    r = plan.roofline(config, CHIP, mesh, found, 1_000_000, Schedule(1, 1, 1))
    useful = plan.flops.train_flops_per_token(config.model) * 8 * 16
    seen = useful - 12 * 32 * (16 - 17 / 2) * 8 * 16  # token t of 16 sees t keys, 17 / 2 on average
    again = seen / 3 - 2 * 32 * 64 * 8 * 16  # the block is recomputed, the head is not
    assert r["seconds"]["compute"] == pytest.approx((seen + again) / 8 / 1e12)
    assert r["seconds"]["hbm"] == pytest.approx(2e6 / 1e9)
    assert r["seconds"]["ici"] == pytest.approx(2 * 8e6 * 7 / 8 / 1e8)
    assert r["seconds"]["dcn"] == 0 and r["bound_by"] == "ici"
    assert r["mfu_at_most"] == pytest.approx(useful / 8 / 1e12 / r["step_seconds_at_least"])
    assert r["mfu_causal_at_most"] == pytest.approx(seen / 8 / 1e12 / r["step_seconds_at_least"])


ADAPTED = RunConfig(
    model=ModelConfig(vocab_size=64, context_length=16, n_layers=1, d_model=32, n_heads=2, compute_dtype="float32", remat="full"),
    train=TrainConfig(batch_size=8),
    init=InitConfig(from_="runs/base"),
    lora=LoraConfig(rank=2),
    mesh=MeshConfig(fsdp=8),
)


def test_roofline_of_adapters_counts_no_gradient_of_what_is_frozen():
    mesh = parallel.make_mesh(ADAPTED.mesh)
    r = plan.roofline(ADAPTED, CHIP, mesh, [], 1_000_000, Schedule(1, 1, 1), frozen=900_000)
    attention = 4 * 32 * (16 + 1) / 2  # scores and values, for visible keys only
    matrices = 2 * (4 * 32 * 32 + 2 * 32 * 4 * 32)
    head = 2 * 32 * 64
    useful = 2 * (matrices + head) + 3 * attention  # forward, and backward to the inputs; attention also backward to both sides
    assert r["seconds"]["compute"] == pytest.approx((useful + matrices + attention) * 8 * 16 / 8 / 1e12)
    assert r["seconds"]["hbm"] == pytest.approx((2 * 100_000 + 900_000) / 1e9), "read, and not written"
    assert r["mfu_causal_at_most"] == pytest.approx(useful * 8 * 16 / 8 / 1e12 / r["step_seconds_at_least"])


def test_a_plan_of_adapters_shows_the_weights_as_frozen():
    mesh = parallel.make_mesh(ADAPTED.mesh)
    program = build(ADAPTED, mesh)
    with jax.set_mesh(mesh):
        shown = {row["parameter"]: row for row in plan.show_sharding(program)}
    up, A = shown["layers/mlp/up"], shown["layers/mlp/up/A"]
    assert (up["frozen"], up["shape"], up["bytes_a_device"]) == (True, [1, 32, 128], 4 * 32 * 128 // 8)
    assert (A["frozen"], A["shape"], A["logical"]) == (False, [1, 32, 2], ["layers", "embed", "rank"])
    adapters = sum(row["bytes_a_device"] for row in shown.values() if not row["frozen"])
    base = sum(row["bytes_a_device"] for row in shown.values() if row["frozen"])

    result = plan.compile_step(ADAPTED, mesh, CHIP)
    assert (result["bytes"]["parameters"], result["bytes"]["frozen"]) == (adapters, base)
    assert result["saved_activations_estimate"] > 0
    assert adapters * 2 <= result["bytes"]["optimizer"] < adapters * 2 + 64, "two averages, and counters"
    assert result["roofline"]["seconds"]["hbm"] == (2 * result["bytes"]["arguments"] - base) / CHIP.hbm_rate
    # Only the adapters' gradients are summed over devices.
    whole = 4 * sum(np.prod(row["shape"]) for row in shown.values() if not row["frozen"])
    summed = sum(c["bytes"] for c in result["collectives"] if c["kind"] in ("all-reduce", "reduce-scatter"))
    assert whole <= summed < 2 * whole


def test_the_weights_that_grpo_starts_from_are_counted_where_it_keeps_them():
    mesh = parallel.make_mesh(ADAPTED.mesh)
    kept = ObjectiveConfig(method="grpo")
    whole = dataclasses.replace(ADAPTED, lora=LoraConfig(), objective=kept)
    found = plan.compile_step(whole, mesh, CHIP)["bytes"]
    assert found["reference"] == found["parameters"] > 0
    free = dataclasses.replace(whole, objective=ObjectiveConfig(method="grpo", beta=0.0))
    without = plan.compile_step(free, mesh, CHIP)["bytes"]
    assert "reference" not in without and found["total"] == without["total"] + found["reference"]
    assert "reference" not in plan.compile_step(dataclasses.replace(ADAPTED, objective=kept), mesh, CHIP)["bytes"]


def test_what_the_backward_pass_needs_is_estimated_by_policy():
    """On 8 devices. With remat=full an additional layer saves only its input; no policy saves more than "none"."""

    def estimate(remat: str, layers: int) -> int:
        model = ModelConfig(vocab_size=64, context_length=16, n_layers=layers, d_model=32, n_heads=2, remat=remat)
        model = dataclasses.replace(model, compute_dtype="float32")
        config = RunConfig(model=model, train=TrainConfig(batch_size=16), mesh=MeshConfig(fsdp=8))
        return plan.saved_activations(build(config, parallel.make_mesh(config.mesh)))

    assert estimate("full", 4) - estimate("full", 2) == 2 * 4 * 16 * 16 * 32 // 8
    assert estimate("full", 2) < estimate("save_mlp", 2) < estimate("none", 2)


def test_a_pipeline_waits_in_its_bubble_and_shares_the_head():
    model = ModelConfig(vocab_size=64, context_length=16, n_layers=4, d_model=32)
    mesh = parallel.make_mesh(MeshConfig(data=4, stage=2))

    def compute(order: tuple, rows: int = 8) -> float:
        config = RunConfig(model=model, train=TrainConfig(batch_size=rows))
        return plan.roofline(config, CHIP, mesh, [], 0, Schedule(*order))["seconds"]["compute"] * 8 * 1e12 / rows / 16

    whole = plan.flops.train_flops_per_token(model) - plan.flops.masked_flops_per_token(model)
    head = 3 * 2 * 32 * 64
    assert compute((1, 1, 1)) == pytest.approx(whole)
    assert compute((2, 1, 3)) == pytest.approx((whole - head) * 4 / 3 + head)  # 3 micro-batches in 4 steps
    assert compute((2, 1, 3), rows=4) == pytest.approx((whole - head) * 4 / 3 + 2 * head)  # too few rows for stages to share
    assert compute((2, 2, 3)) == pytest.approx((whole - head) * 4 / 3 * 7 / 6 + head)  # forward twice; 6 items in 7 steps


@pytest.mark.parametrize(
    ("kind", "axes", "ici", "dcn"),
    [  # 2 slices (data) of 2 chips (fsdp) of 2 devices (tensor); what a chip must receive of 8 bytes
        ("all-gather", "tensor", 0, 0),
        ("all-gather", "fsdp", 2 * 4, 0),  # half of each of two groups
        ("all-gather", "fsdp+tensor", 4, 0),  # its two devices want the same half
        ("all-gather", "data+fsdp+tensor", 4, 0),  # within a slice
        ("all-reduce", "data+fsdp", 2 * 2 * 4, 0),
        ("all-gather", "slices", 0, 2 * 4),
        ("all-reduce", "slices", 0, 2 * 2 * 4),
        ("collective-permute", "slices", 0, 2 * 8),
        ("all-to-all", "fsdp", 2 * 4, 0),
        ("ragged-all-to-all", "fsdp", 0, 0),
        ("collective-permute", "fsdp", 2 * 8, 0),
        ("collective-permute", "fsdp+tensor", 8, 0),
        ("collective-permute", "tensor", 0, 0),
    ],
)
def test_what_a_chip_must_receive(kind, axes, ici, dcn):
    class Device(NamedTuple):
        slice_index: int
        coords: tuple
        id: int

    devices = np.empty((2, 2, 2), object)
    for i in np.ndindex(2, 2, 2):
        devices[i] = Device(i[0], (i[1], 0, 0), int(np.ravel_multi_index(i, (2, 2, 2))))
    mesh = SimpleNamespace(devices=devices, axis_names=("data", "fsdp", "tensor"))
    assert plan._received({"kind": kind, "axes": axes, "bytes": 8}, mesh, devices=2) == (ici, dcn)


@pytest.mark.parametrize("window, T", [(None, 7), (3, 7), (7, 7), (9, 7), (1, 5)])
def test_keys_that_a_causal_kernel_leaves_out(window, T):
    pattern = ("global",) if window is None else ("local",)
    c = ModelConfig(vocab_size=64, context_length=T, n_layers=2, d_model=32, n_heads=2, layer_pattern=pattern, window=window)
    all_keys, seen = min(T, window or T), np.mean([min(t, window or t) for t in range(1, T + 1)])
    assert plan.flops.masked_flops_per_token(c) == pytest.approx(12 * 2 * 32 * (all_keys - seen))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("v9:2x2", "expected FAMILY"),
        ("", "expected FAMILY"),
        ("v5e", "expected v5e:AxB, chips along each axis of the slice, up to 16x16"),
        ("v5e:0x2", "expected v5e:AxB"),
        ("v5e:axb", "expected v5e:AxB"),
        ("v5e:2x2x2", "expected v5e:AxB"),
        ("v5p:2x2", "expected v5p:AxBxC"),
        ("v5e:32x8", "no larger v5e than 16x16; several of them: --slices=N"),
        ("v5p:16x20x32", "no larger v5p"),
    ],
)
def test_a_topology_that_is_none_is_told(name, told):
    with pytest.raises(RunError, match=told):
        topology.parse_topology(name)


def test_topologies():
    assert topology.parse_topology("v5p:8x8x8") == ("v5p", 512)
    assert topology.parse_topology("v5p:28x16x20") == ("v5p", 8960)
    assert topology.parse_topology("tpu7x:4x4x4") == ("tpu7x", 64)


def test_few_devices_stand_in_with_as_many_rows_each():
    config = RunConfig(train=TrainConfig(batch_size=512), mesh=MeshConfig(data=2, fsdp=-1, tensor=4))
    small, n = topology.stand_in(config, 256)  # fsdp 32
    assert n == 8 and small.mesh.sizes(8) == dict(data=2, fsdp=2, expert=1, context=1, tensor=2, stage=1)
    assert small.train.batch_size == 512 // 64 * 4
    assert topology.stand_in(RunConfig(mesh=MeshConfig(fsdp=12, data=1)), 12)[1] == 6
    with pytest.raises(RunError, match="does not fit 256"):
        topology.stand_in(RunConfig(mesh=MeshConfig(data=3)), 256)


@pytest.mark.parametrize(
    ("message", "needed"),
    [  # as libtpu 0.0.42 writes them
        ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (27.00G) exceeds available"
         " HBM (15.75G).", 27 * 2**30),
        ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 1.10T of 15.75G hbm."
         " Exceeded hbm capacity by 1.09T.", 1.1 * 2**40),
        ("RESOURCE_EXHAUSTED: something else", None),
    ],
)  # fmt: skip
def test_what_the_compiler_would_need_is_read_off_its_refusal(message, needed):
    assert plan._refused(message) == needed


def remedies(config: RunConfig, **sizes: int) -> list[list[tuple]]:
    """What each remedy adds to those before it."""
    found = list(plan.remedies(config, {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1} | sizes))
    assert all({**before, **knobs}.keys() == knobs.keys() for before, knobs in itertools.pairwise(found)), (
        "each on top of those before"
    )
    return [sorted(knobs.items() - before.items()) for before, knobs in itertools.pairwise([{}, *found])]


def test_remedies_come_mildest_first():
    model = ModelConfig(vocab_size=64, n_heads=4, n_kv_heads=2)
    config = RunConfig(model=model, train=TrainConfig(batch_size=32), mesh=MeshConfig(data=4, fsdp=2))
    assert remedies(config, data=4, fsdp=2) == [
        *([("model.remat", policy)] for policy in ("dots", "save_mlp", "save_attention", "full", "offload")),
        [("mesh.data", 1), ("mesh.fsdp", 8)],
        [("train.accumulate", 2)],
        [("train.accumulate", 4)],
        [("mesh.fsdp", 4), ("mesh.tensor", 2), ("train.accumulate", 8)],
        [("optimizer.moment_dtype", "bfloat16")],
        [("optimizer.offload", True)],
        [("train.accumulate", 1), ("train.batch_size", 4)],
    ]


def test_micro_batches_of_one_row_a_device_and_then_fewer_rows_are_tried_for_odd_numbers_of_rows():
    model = ModelConfig(vocab_size=64, n_heads=3, n_kv_heads=1, remat="offload")
    config = RunConfig(model=model, train=TrainConfig(batch_size=24), optimizer=OptimizerConfig(offload=True))
    found = [added for added in remedies(config, data=4) if any(name.startswith("train.") for name, _ in added)]
    assert found == [[("train.accumulate", 2)], [("train.accumulate", 6)], [("train.accumulate", 1), ("train.batch_size", 4)]]


def test_less_tensor_comes_before_more_micro_batches_while_rows_and_widths_divide():
    model = ModelConfig(vocab_size=64, d_model=64, n_heads=8, remat="offload")
    config = RunConfig(model=model, train=TrainConfig(batch_size=64), mesh=MeshConfig(fsdp=8, tensor=4))
    found = remedies(config, fsdp=8, tensor=4)
    assert found[:4] == [
        [("mesh.data", 1), ("mesh.fsdp", 16), ("mesh.tensor", 2)],
        [("mesh.fsdp", 32), ("mesh.tensor", 1)],
        [("train.accumulate", 2)],
        [("mesh.fsdp", 4), ("mesh.tensor", 8), ("train.accumulate", 16)],
    ], "nor is any tried again on the way to more tensor"
    narrow = dataclasses.replace(config, model=dataclasses.replace(model, d_model=8 * 3 * 8))
    assert [("mesh.fsdp", 32), ("mesh.tensor", 1)] in remedies(narrow, fsdp=8, tensor=4)
    narrow = dataclasses.replace(config, model=dataclasses.replace(model, d_model=8 * 3))
    assert remedies(narrow, fsdp=8, tensor=4)[0] == [("train.accumulate", 2)], "24 does not divide into 16"


@pytest.mark.parametrize(
    ("optimizer", "told"),
    [
        (OptimizerConfig(), ["moment_dtype", "offload"]),
        (OptimizerConfig(moment_dtype="bfloat16", offload=True), []),
        (OptimizerConfig(name="adafactor"), ["offload"]),
        (OptimizerConfig(b2=0.999), ["offload"]),
    ],
    ids=["adamw", "has both", "has no such moments", "would round its steps away"],
)
def test_the_optimizer_is_made_smaller_where_it_can_be(optimizer, told):
    model = ModelConfig(vocab_size=64, n_heads=4, remat="offload")
    config = RunConfig(model=model, train=TrainConfig(batch_size=8), optimizer=optimizer)
    found = [name for more in remedies(config, fsdp=8) for name, _ in more if name.startswith("optimizer.")]
    assert found == [f"optimizer.{name}" for name in told]


@pytest.mark.parametrize("T, chunk, told", [(4096, None, [1024]), (4096, 512, []), (512, None, [])])
def test_experts_of_few_tokens_at_a_time_are_a_remedy(T, chunk, told):
    model = ModelConfig(vocab_size=64, context_length=T, n_experts=4, expert_chunk=chunk, remat="offload")
    config = RunConfig(model=model, train=TrainConfig(batch_size=8))
    assert [value for name, value in remedies(config, fsdp=8)[0] if name == "model.expert_chunk"] == told
