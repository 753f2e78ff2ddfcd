"""What each preset sends on a TPU, from the program that libtpu compiles, against what its arrays say must be sent."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
LAYERS, TABLE = L * (4 * D * D + 3 * D * F), V * D  # entries: of all matrices of blocks; of the embedding, and of the head


def sent(preset: str) -> dict[str, int]:
    """Bytes by mesh axes, of the arrays that one device gathers, sums, exchanges or passes on in a step."""
    flags = [f"--config.{name}={value}" for name, value in (CONFIG | {"mesh.preset": preset}).items()]
    program = [sys.executable, "-m", "gpt4o_jax", "plan", f"--config={ROOT}/configs/base.py", "--topology=v5e:2x4", *flags]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "2"})
    assert done.returncode == 0, done.stderr
    result, sums = json.loads(done.stdout.splitlines()[-1]), {}
    assert result["attention"] == "splash" and not result["estimate"]
    for c in result["collectives"]:
        sums[c["axes"]] = sums.get(c["axes"], 0) + c["bytes"]
    return sums


def parameters(shards: int) -> int:
    """Over fsdp: matrices of blocks gathered in bfloat16 forwards and backwards, the embedding in float32 and the head in
    bfloat16 once; then all gradients, in float32."""
    return ((2 + 2) * LAYERS + (4 + 2) * TABLE + 4 * (LAYERS + 2 * TABLE)) // shards


def residual_stream(rows: int) -> int:
    """Over tensor. A block gathers the tokens of its two sub-layers' inputs: forwards in float32, computed again in bfloat16,
    and as often for the gradients of their outputs; it adds up five times in float32: its two outputs, one of them again (the
    second is not needed), and the gradients of the two inputs. The embedding adds up its parts of the vocabulary and gathers
    backwards, in float32; the head gathers in bfloat16 and adds up."""
    gathered = L * (2 * 4 + 2 * 2 + 2 * 2) + 4 + 2
    summed = L * 5 * 4 + 4 + 4
    return (gathered + summed) * rows * T * D


EXPECTED = {
    "dp": {"data": 4 * (LAYERS + 2 * TABLE)},
    "fsdp": {"fsdp": parameters(1)},
    "tensor": {"data": 4 * (LAYERS + 2 * TABLE) // 2, "tensor": residual_stream(B // 4)},
    "fsdp_tensor": {"fsdp": parameters(2), "tensor": residual_stream(B // 4)},
}


@pytest.mark.parametrize("preset", EXPECTED)
def test_bytes_by_axis_are_those_of_the_arrays(preset):
    found = {axes: size for axes, size in sent(preset).items() if size > 10_000}  # less: norms, losses and other numbers
    assert found == {axes: pytest.approx(size, rel=0.1) for axes, size in EXPECTED[preset].items()}
