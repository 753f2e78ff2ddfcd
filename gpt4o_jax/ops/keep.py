"""Names of what a remat policy (model/block.py) may keep of a block for its backward pass."""

QKV = "qkv"  # queries, keys and values, as their products give them
ATTENTION = "attention"  # what attention makes of them, and what its kernel keeps beside it
MLP_HIDDEN = "mlp_hidden"  # products into the feed-forward, or into experts
BLOCK_INPUT = "block_input"
