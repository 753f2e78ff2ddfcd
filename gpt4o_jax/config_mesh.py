"""The knobs of the device mesh (config.py has all others), and the sizes that follow from them."""

import dataclasses
import math

from gpt4o_jax.config_model import knob
from gpt4o_jax.errors import RunError

AXES = ("data", "fsdp", "expert", "context", "tensor", "stage")

# Sizes of the axes by preset; those not named are 1. Each starts the axes that it is about at the smallest size that shows
# them, and gives the rest of the devices to rows of the batch.
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
    """Devices along each axis of the mesh: a number, 0 for what the preset says, or -1 (one axis at most) for what is left."""

    preset: str = knob("dp", "The sizes of those axes that are left at 0.", tuple(PRESETS))
    data: int = knob(0, "Data parallelism: rows of the batch.", low=-1)
    fsdp: int = knob(0, "Rows of the batch and shards of every parameter.", low=-1)
    expert: int = knob(0, "Rows of the batch and the experts of a mixture.", low=-1)
    context: int = knob(0, "Tokens of a row.", low=-1)
    tensor: int = knob(0, "Heads, feed-forward width and vocabulary; between blocks the tokens of a row.", low=-1)
    stage: int = knob(0, "Layers, as stages of a pipeline.", low=-1)
    pipeline_microbatches: int = knob(
        0, "With stages: parts of a (micro-)batch that pass them in turn; 0: as many as divide a device's rows, up to 4 a stage.",
        low=0,
    )  # fmt: skip
    pipeline_repeats: int = knob(
        1, "With stages: times that each part passes all of them, each time through other layers (parallel/pipeline.py).", low=1
    )

    def wanted(self) -> dict[str, int]:
        """Sizes by axis, at most one of them -1. A size that is given, -1 too, stands in front of the preset's."""
        given = {axis: getattr(self, axis) for axis in AXES if getattr(self, axis)}
        preset = PRESETS[self.preset]
        if -1 in given.values():
            preset = {axis: n for axis, n in preset.items() if n != -1}
        return {axis: given.get(axis, preset.get(axis, 1)) for axis in AXES}

    def sizes(self, devices: int) -> dict[str, int]:
        """Sizes by axis for so many devices. Raises RunError where they do not multiply to that number."""
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
    """Into how many parts a pipeline cuts so many rows of a device: a divisor of them, at most `wanted` (0: four a stage)."""
    return max(m for m in range(1, min(rows, wanted or 4 * stages) + 1) if rows % m == 0)
