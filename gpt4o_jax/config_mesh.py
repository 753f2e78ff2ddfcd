"""The settings of the device mesh, and the axis sizes that follow from them. All other settings are in config.py."""

import dataclasses
import math

from gpt4o_jax.config_model import knob
from gpt4o_jax.errors import RunError

AXES = ("data", "fsdp", "expert", "context", "tensor", "stage")

# Axis sizes by preset; axes not named are 1. Each preset gives the axis it is named after the smallest size above 1, and the
# remaining devices to rows of the batch.
PRESETS: dict[str, dict[str, int]] = {
    "dp": {"data": -1},
    "fsdp": {"fsdp": -1},
    "tensor": {"data": -1, "tensor": 2},
    "fsdp_tensor": {"fsdp": -1, "tensor": 2},
    "context": {"fsdp": -1, "context": 2},
    "expert": {"fsdp": -1, "expert": 2},
    "pipeline": {"fsdp": -1, "stage": 2},
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis: a number, 0 for the preset's value, or -1 (on at most one axis) for all remaining devices."""

    preset: str = knob("dp", "Sizes of the axes that are left at 0.", tuple(PRESETS))
    data: int = knob(0, "Data parallelism: rows of the batch.", low=-1)
    fsdp: int = knob(0, "Fully sharded data parallelism: rows of the batch, and every parameter.", low=-1)
    expert: int = knob(0, "Expert parallelism: rows of the batch, and the experts of a mixture.", low=-1)
    context: int = knob(0, "Context parallelism: tokens of a row.", low=-1)
    tensor: int = knob(
        0, "Tensor parallelism: heads, feed-forward width and vocabulary; between blocks, tokens of a row.", low=-1
    )
    stage: int = knob(0, "Pipeline parallelism: layers.", low=-1)
    pipeline_microbatches: int = knob(
        0, "With stages: pipeline micro-batches of a (micro-)batch; 0: as many as divide a device's rows, up to 4 per stage.",
        low=0,
    )  # fmt: skip
    pipeline_repeats: int = knob(
        1, "With stages: passes of each micro-batch over all stages, each through different layers (parallel/pipeline.py).", low=1
    )

    def wanted(self) -> dict[str, int]:
        """Sizes by axis, at most one of them -1. A size given explicitly, even -1, overrides the preset's."""
        given = {axis: getattr(self, axis) for axis in AXES if getattr(self, axis)}
        preset = PRESETS[self.preset]
        if -1 in given.values():
            preset = {axis: n for axis, n in preset.items() if n != -1}
        return {axis: given.get(axis, preset.get(axis, 1)) for axis in AXES}

    def sizes(self, devices: int) -> dict[str, int]:
        """Sizes by axis for this number of devices. Raises RunError if their product is another number."""
        sizes = self.wanted()
        given = math.prod(n for n in sizes.values() if n != -1)
        sizes = {axis: devices // given if n == -1 and devices % given == 0 else n for axis, n in sizes.items()}
        if math.prod(sizes.values()) != devices:
            shape = ", ".join(f"{axis}={n}" for axis, n in self.wanted().items() if n != 1)
            legal = ", ".join(str(d) for d in range(1, devices + 1) if devices % d == 0)
            raise RunError(
                f"config.mesh ({shape or 'all 1'}) does not fit {devices} device(s): axis sizes must multiply to that number, or"
                f" one be -1 and the others to a divisor of it ({legal})"
            )
        return sizes


def micro_batches(rows: int, stages: int, wanted: int) -> int:
    """Number of pipeline micro-batches for a device's rows: a divisor of `rows`, at most `wanted` (0: four per stage)."""
    return max(m for m in range(1, min(rows, wanted or 4 * stages) + 1) if rows % m == 0)
