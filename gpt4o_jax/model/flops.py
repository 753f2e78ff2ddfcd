"""Parameters and floating-point operations, by formula.

XLA's own count sees the body of a scan once, so it cannot be used for a scanned stack.
"""

from gpt4o_jax.config import ModelConfig


def parameter_count(c: ModelConfig) -> int:
    """Every number that training changes."""
    D, N, K, H, F, V = c.d_model, c.n_heads, c.kv_heads, c.head_width, c.ff_width, c.vocab_size
    norm = D * (2 if c.norm == "layer" and c.bias else 1)
    tables = V * D * (1 if c.tied else 2) + (c.context_length * D if c.positions == "learned" else 0)
    mixes = c.n_layers * 2 * (c.residual_mix + (c.value_embeddings > 0)) + c.value_embeddings * V * K * H
    per_layer = _matrices_per_layer(c) + norm * (4 if c.norm_position == "sandwich" else 2)
    if c.qk_norm:
        per_layer += 2 * H if c.qk_norm_over == "head" else (N + K) * H
    if c.attention_sinks:
        per_layer += N
    if c.biased_qkv:
        per_layer += (N + 2 * K) * H
    if c.bias:
        per_layer += D + F * (2 if c.gated else 1) + D
    head_ahead = per_layer + 2 * D * D + 3 * norm
    return c.n_layers * per_layer + norm + tables + mixes + c.mtp_heads * head_ahead


def _matrices_per_layer(c: ModelConfig) -> int:
    attention = c.d_model * c.head_width * (2 * c.n_heads + 2 * c.kv_heads)
    return attention + c.d_model * c.ff_width * (3 if c.gated else 2)


def forward_flops_per_token(c: ModelConfig, keys: float) -> float:
    """Operations (a multiply-add is two) of the forward pass for a token that looks at `keys` keys, or the window's."""
    matrices = c.n_layers * _matrices_per_layer(c) + c.d_model * c.vocab_size
    seen = sum(min(keys, kind.window) if kind.local else keys for kind in c.layer_kinds)
    return 2 * matrices + 4 * c.n_heads * c.head_width * seen


def train_flops_per_token(c: ModelConfig) -> float:
    """Forward and backward, over all T keys, or the window's: the 6N + 12LDT of PaLM (arXiv:2204.02311); remat not counted."""
    T, D = c.context_length, c.d_model
    keys = min(T, c.period[-1].window or T)
    head_ahead = 2 * (_matrices_per_layer(c) + 2 * D * D + D * c.vocab_size) + 4 * c.n_heads * c.head_width * keys
    return 3 * (forward_flops_per_token(c, T) + c.mtp_heads * head_ahead)
