"""What one process of several holds of the arrays that all of them share."""

from collections.abc import Iterable

import jax


def places(
    sharding: jax.sharding.Sharding, shape: tuple[int, ...], axis: int, devices: Iterable[jax.Device] | None = None
) -> list[int]:
    """The indices along `axis`, in order, of those parts of an array of this shape that lie on `devices`.

    devices: None for those of this process. Replicas hold the same places: processes of one tensor-parallel group all of theirs.
    """
    parts = sharding.devices_indices_map(shape)
    held = (parts[d][axis] for d in (sharding.addressable_devices if devices is None else devices))
    return sorted({i for part in held for i in range(shape[axis])[part]})
