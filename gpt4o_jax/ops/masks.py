"""Who may look at whom. B batch, T query positions, S key positions."""

import jax


def causal_mask(
    query_positions_BT: jax.Array,
    key_positions_BS: jax.Array,
    query_segments_BT: jax.Array,
    key_segments_BS: jax.Array,
    window: int | None = None,
) -> jax.Array:
    """True where a query may attend: keys of its own segment, at its own position or before, within the window.

    Positions count from 0 within each segment (document); segment 0 is padding. window: how many keys, the query's
    own among them (Mistral's, arXiv:2310.06825); None: all.
    """
    keys_B1S, queries_BT1 = key_positions_BS[:, None, :], query_positions_BT[:, :, None]
    allowed = (keys_B1S <= queries_BT1) & (key_segments_BS[:, None, :] == query_segments_BT[:, :, None])
    return allowed if window is None else allowed & (keys_B1S > queries_BT1 - window)
