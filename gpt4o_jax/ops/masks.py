"""Attention masks. B batch, T query positions, S key positions."""

import jax


def causal_mask(
    query_positions_BT: jax.Array,
    key_positions_BS: jax.Array,
    query_segments_BT: jax.Array,
    key_segments_BS: jax.Array,
    window: int | None = None,
) -> jax.Array:
    """Bool [B, T, S], true where a query may attend: keys of its own segment, not after its position, within the window.

    Positions count from 0 within each segment (document); segment 0 is padding. window: number of keys, the query's own included
    (Mistral, arXiv:2310.06825); None: all.
    """
    keys_B1S, queries_BT1 = key_positions_BS[:, None, :], query_positions_BT[:, :, None]
    allowed = (keys_B1S <= queries_BT1) & (key_segments_BS[:, None, :] == query_segments_BT[:, :, None])
    return allowed if window is None else allowed & (keys_B1S > queries_BT1 - window)
