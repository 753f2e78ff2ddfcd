"""What each preset sends on a TPU according to the program that libtpu compiles, against the sizes of the arrays to send."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpt4o_jax.config_mesh import PRESETS

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="no TPU compiler here (requirements-tpu.txt)"),
]

ROOT = Path(__file__).parents[2]
L, D, F, V, B, T = 2, 256, 512, 1024, 16, 256
CONFIG = {
    "model.n_layers": L, "model.d_model": D, "model.n_heads": 2, "model.d_ff": F, "model.vocab_size": V,
    "model.context_length": T, "model.mlp": "swiglu", "model.qk_norm": False, "model.remat": "full",
    "train.batch_size": B, "train.loss_chunk": T,
}  # fmt: skip
E, k = 4, 2
MIXTURE = {"model.n_experts": E, "model.experts_per_token": k}  # as wide as the feed-forward they replace
# Numbers of entries: in the matrices of all blocks; in the embedding, and in the head.
ATTENTION, MLP, TABLE = L * 4 * D * D, L * 3 * D * F, V * D
LAYERS = ATTENTION + MLP


def plan(topology: str, knobs: dict, *more: str) -> dict:
    flags = [f"--config.{name}={value}" for name, value in knobs.items()] + list(more)
    program = [sys.executable, "-m", "gpt4o_jax", "plan", f"--config={ROOT}/configs/base.py", f"--topology={topology}", *flags]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "2"})
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["fits"] is False or "rates of a chip: " in done.stderr
    assert not result["estimate"]
    return result


def check(knobs: dict, attention: str, expected: dict[str, int], topology: str = "v5e:2x4", least: int = 10_000) -> dict:
    """expected: by mesh axes, bytes of the arrays that one device gathers, sums, exchanges or passes on per step.

    least: axes that move no more bytes than this are ignored: norms, losses and other scalars.
    """
    result, sums = plan(topology, CONFIG | knobs), {}
    assert result["attention"] == attention
    for c in result["collectives"]:
        sums[c["axes"]] = sums.get(c["axes"], 0) + c["bytes"]
    found = {axes: size for axes, size in sums.items() if size > least}
    assert found == {axes: pytest.approx(size, rel=0.1) for axes, size in expected.items()}
    return result


def parameters(shards: int, layers: int = LAYERS, times: int = 1, table: int = TABLE) -> int:
    """Over fsdp: block matrices gathered in bfloat16 forward and backward, the embedding in float32 and the head in bfloat16
    once; then all gradients, in float32. times: steps of a pipeline, whose layers do all that in each of them.

    If a ring or an exchange separates a block's recomputed forward pass from its gradients, libtpu gathers the attention
    matrices again for the gradients: 5 % more than necessary.
    """
    return (times * (2 + 2 + 4) * layers + (4 + 2 + 4 + 4) * table) // shards


def gradients(shards: int, layers: int = LAYERS, table: int = TABLE) -> int:
    """Over an axis with different tokens and the same parameters: in float32, for the shard that fsdp leaves a device."""
    return 4 * (layers + 2 * table) // shards


def residual_stream(entries: int, layers: int = L) -> int:
    """Over tensor. A block gathers the tokens of its two sub-layers' inputs, in float32 forward and in bfloat16 when recomputed,
    and of their outputs' gradients, in bfloat16; it sums five times in float32: its two outputs, the first again when recomputed
    (the second is not needed), and the gradients of the two inputs. The embedding sums over its parts of the vocabulary and
    gathers in the backward pass, in float32; the head gathers in bfloat16 and sums in float32."""
    gathered = layers * (2 * 4 + 2 * 2 + 2 * 2) + 4 + 2
    summed = layers * 5 * 4 + 4 + 4
    return (gathered + summed) * entries


def ring(C: int, rows: int) -> int:
    """Over context. Keys and values go to the C - 1 other devices in bfloat16: forward, recomputed, and for the gradients; two
    devices have only one direction, and libtpu sees that the last two passes are the same. The sums of their gradients travel
    along in float32, and finally return home: those of values, which await no rotation there, in bfloat16."""
    entries = rows * (T // C) * D
    moves = (C - 1) * (2 if C == 2 else 3)
    return L * entries * (moves * 2 * 2 + (C - 1) * 2 * 4 + 4 + 2)


def exchange(p: int, rows: int) -> int:
    """Over expert: the sizes of the receiving arrays; routers may send less. On the way there they have room for all rows of all
    p devices, in bfloat16: forward, recomputed, and for the gradients of what comes back. On the way back they have room for a
    device's own rows: in float32 forward and recomputed (for the router's gradients), in bfloat16 for gradients."""
    entries = rows * T * k * D
    return L * entries * (3 * p * 2 + 2 * 4 + 2)


def stages(S: int, M: int) -> int:
    """Over stage, in float32: each step passes a micro-batch (one row) on, and its gradient back. All M are summed over stages
    four times: the last stage's output, which all stages receive, and its gradient; the gradients of the first stage's input, and
    of the input of the head, which stages share."""
    return 4 * (2 * (M + S - 1) + 4 * M) * T * D


EXPECTED = {
    "dp": {"data": gradients(1)},
    "fsdp": {"fsdp": parameters(1)},
    "tensor": {"data": gradients(2), "tensor": residual_stream(B // 4 * T * D)},
    "fsdp_tensor": {"fsdp": parameters(2), "tensor": residual_stream(B // 4 * T * D)},
    "context": {"fsdp": parameters(1), "context": ring(2, B // 4) + gradients(4)},
    "expert": {
        "fsdp": parameters(1, ATTENTION + E // 2 * MLP),
        "expert": exchange(2, B // 8) + gradients(4, ATTENTION),
    },
    "pipeline": {
        "fsdp": parameters(1, LAYERS // 2, times=B // 4 + 2 - 1),
        "stage": stages(2, B // 4) + gradients(4, 0),
    },
}


@pytest.mark.parametrize("preset", PRESETS)
def test_bytes_by_axis_are_those_of_the_arrays(preset):
    knobs = {"mesh.preset": preset} | (MIXTURE if preset == "expert" else {})
    check(knobs, "ring over context=2" if preset == "context" else "splash", EXPECTED[preset])


def test_muon_exchanges_matrices_once_there_and_once_back():
    """Over fsdp, then over tensor, in float32. Two layers on eight devices: stacks are padded to eight matrices."""
    moved = 2 * 4 * LAYERS // L
    expected = {"fsdp": parameters(2) + moved, "tensor": residual_stream(B // 4 * T * D) + moved}
    check({"mesh.preset": "fsdp_tensor", "optimizer.name": "muon"}, "splash", expected)


def test_a_ring_goes_round():
    sizes = {"mesh.data": 1, "mesh.fsdp": 2, "mesh.context": 4}
    check(sizes, "ring over context=4", {"fsdp": parameters(1), "context": ring(4, B // 2) + gradients(2)})


def test_products_that_pass_weights_round_count_every_pass():
    """Wide enough that libtpu splits a product and passes shards of its weights or gradients around meanwhile."""
    width, tokens, rows = 8 * D, 2048, 2
    sizes = {
        "mesh.data": 1, "mesh.fsdp": 16, "mesh.tensor": 2, "model.n_layers": 1, "model.d_model": width, "model.d_ff": 4 * width,
        "model.n_heads": 4, "model.context_length": tokens, "train.batch_size": 16 * rows, "train.loss_chunk": tokens,
    }  # fmt: skip
    layers = 4 * width * width + 3 * width * 4 * width
    expected = {"fsdp": parameters(2, layers, table=V * width), "tensor": residual_stream(rows * tokens * width, layers=1)}
    sent = check(sizes, "splash", expected, "v5e:4x8", least=30_000)["collectives"]  # norms are eight times as wide
    passed = sum(c["bytes"] for c in sent if (c["kind"], c["axes"]) == ("collective-permute", "fsdp"))
    assert passed > expected["fsdp"] / 2, "so they are passed round"


def test_from_slice_to_slice_go_gradients_alone():
    """Two slices along data: all else that is sent stays within a slice. Twice as wide as elsewhere, because TPUs pad rows to 128
    numbers and a shard of the embedding table has rows of D / fsdp."""
    sizes = {"mesh.data": 2, "mesh.fsdp": 4, "mesh.tensor": 2, "model.d_model": 2 * D, "model.d_ff": 2 * F, "model.n_heads": 4}
    result = plan("v5e:2x4", CONFIG | sizes, "--slices=2")
    sums = {}
    for c in result["collectives"]:
        sums[c["axes"]] = sums.get(c["axes"], 0) + c["bytes"]
    assert sums["slices"] == pytest.approx(gradients(8, 4 * LAYERS, 2 * TABLE), rel=0.01), "each device those of its shards"
    assert {axes for axes, size in sums.items() if size > 20_000} == {"slices", "fsdp", "tensor"}


def test_where_it_does_not_fit_the_first_remedy_that_fits_is_named():
    """1.3 billion parameters in thin layers, replicated on each device: saving less per block does not help, more fsdp does."""
    result = plan("v5e:2x2", CONFIG | {"model.n_layers": 2048, "train.batch_size": 4, "mesh.preset": "dp"})
    assert result["fits"] is False and result["bytes"]["total"] > result["hbm"]
    assert "RESOURCE_EXHAUSTED" in result["compiler"]
    remedy = result["fits_with"]
    assert remedy["knobs"] == {"model.remat": "offload", "mesh.data": 1, "mesh.fsdp": 4}
    assert remedy["bytes"]["total"] < result["hbm"] and remedy["roofline"]["bound_by"] == "ici"
