"""Who may look at whom. B batch, T query positions, S key positions."""

import jax


def causal_mask(
    query_positions_BT: jax.Array,
    key_positions_BS: jax.Array,
    query_segments_BT: jax.Array,
    key_segments_BS: jax.Array,
) -> jax.Array:
    """True where a query may attend: keys of its own segment, at its own position or before.

    Positions count from 0 within each segment (document); segment 0 is padding.
    """
    before = key_positions_BS[:, None, :] <= query_positions_BT[:, :, None]
    same = key_segments_BS[:, None, :] == query_segments_BT[:, :, None]
    return before & same
