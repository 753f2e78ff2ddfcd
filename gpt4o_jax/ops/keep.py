"""Names of the activations that a remat policy (model/block.py) may save for a block's backward pass."""

QKV = "qkv"  # outputs of the query, key and value products
ATTENTION = "attention"  # the output of attention, and what its kernel saves beside it
MLP_HIDDEN = "mlp_hidden"  # products into the feed-forward, or into experts
BLOCK_INPUT = "block_input"
