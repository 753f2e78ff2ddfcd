"""Parameter counts and floating-point operations, by formula.

XLA's own count sees the body of a scan only once, so it does not work for a scanned stack.
"""

from gpt4o_jax.config_model import LayerKind, ModelConfig


def parameter_count(c: ModelConfig, active: bool = False) -> int:
    """Number of parameters of the model; active: without the routed experts that a token does not use."""
    D, N, K, H, F, V = c.d_model, c.n_heads, c.kv_heads, c.head_width, c.ff_width, c.vocab_size
    norm = D * (2 if c.norm == "layer" and c.bias else 1)
    tables = V * D * (1 if c.tied else 2) + (c.context_length * D if c.positions == "learned" else 0)
    mixes = c.n_layers * 2 * (c.residual_mix + (c.value_embeddings > 0)) + c.value_embeddings * V * K * H
    k = c.experts_per_token if active else c.n_experts
    matrices = [_matrices(c, kind, k) + (c.n_experts if kind.experts and c.router_bias else 0) for kind in c.layer_kinds]
    per_layer = norm * (4 if c.norm_position == "sandwich" else 2)
    if c.qk_norm:
        per_layer += 2 * H if c.qk_norm_over == "head" else (N + K) * H
    if c.attention_sinks:
        per_layer += N
    if c.biased_qkv:
        per_layer += (N + 2 * K) * H
    if c.bias:
        per_layer += D + F * (2 if c.gated else 1) + D
    head_ahead = per_layer + matrices[len(c.period) - 1] + 2 * D * D + 3 * norm
    return c.n_layers * per_layer + sum(matrices) + norm + tables + mixes + c.mtp_heads * head_ahead


def _matrices(c: ModelConfig, kind: LayerKind, experts: int) -> int:
    """Number of entries in a layer's matrices, with `experts` routed experts counted."""
    attention = c.d_model * c.head_width * (2 * c.n_heads + 2 * c.kv_heads)
    in_and_out = c.d_model * (3 if c.gated else 2)
    if not kind.experts:
        return attention + in_and_out * c.ff_width
    return attention + in_and_out * c.expert_width * (experts + c.n_shared_experts) + c.d_model * c.n_experts


def forward_flops_per_token(c: ModelConfig, keys: float) -> float:
    """FLOPs (a multiply-add is two) of the forward pass of a token that attends to `keys` keys, or to the window's if fewer."""
    matrices = sum(_matrices(c, kind, c.experts_per_token) for kind in c.layer_kinds) + c.d_model * c.vocab_size
    seen = sum(min(keys, kind.window) if kind.local else keys for kind in c.layer_kinds)
    return 2 * matrices + 4 * c.n_heads * c.head_width * seen


def train_flops_per_token(c: ModelConfig, frozen: bool = False) -> float:
    """FLOPs of forward and backward over all T keys, or the window's: PaLM's 6N + 12LDT (arXiv:2204.02311), without remat.

    frozen: the weights get no gradient, which leaves 4N + 12LDT; the products of adapters are not counted.
    """
    T, D = c.context_length, c.d_model
    keys = min(T, c.period[-1].window or T)
    matrices = _matrices(c, c.period[-1], c.experts_per_token)
    head_ahead = 2 * (matrices + 2 * D * D + D * c.vocab_size) + 4 * c.n_heads * c.head_width * keys
    forward = forward_flops_per_token(c, T) + c.mtp_heads * head_ahead
    if not frozen:
        return 3 * forward
    products = forward_flops_per_token(c, 0) + c.mtp_heads * (head_ahead - 4 * c.n_heads * c.head_width * keys)
    return 3 * forward - products


def masked_flops_per_token(c: ModelConfig) -> float:
    """The part of train_flops_per_token that a causal kernel can skip: keys after the token."""
    T = c.context_length
    kinds = [*c.layer_kinds, *[c.period[-1]] * c.mtp_heads]
    widths = [min(T, kind.window or T) for kind in kinds]  # the t-th token sees min(t, width) keys
    return 12 * c.n_heads * c.head_width * sum(w * (w - 1) / (2 * T) for w in widths)
