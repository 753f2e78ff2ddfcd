"""Published sizes and families, as values.

A config file copies one of them and may go on from there:

    c = base_config()
    c.model.update(to_dict(GPT4O["small"]))
"""

from gpt4o_jax.config import ModelConfig


def _gpt4o(n_layers: int, d_model: int, vocab_size: int, context_length: int, n_kv_heads: int | None = None, **more):
    """This project's own decoder: RoPE, RMSNorm, QK-norm, squared ReLU of width 4 D, heads of width 128, untied."""
    return ModelConfig(
        vocab_size=vocab_size,
        context_length=context_length,
        n_layers=n_layers,
        d_model=d_model,
        n_heads=d_model // 128,
        n_kv_heads=n_kv_heads,
        mlp="relu2",
        norm="rms",
        positions="rope",
        qk_norm=True,
        output_init="zero",
        **more,
    )


# Key/value heads are shared (GQA) from 1.3 B on, where the cache starts to limit the batch of a sampler, and
# blocks are recomputed in the backward pass from there on, where activations outgrow the memory of one device.
GPT4O: dict[str, ModelConfig] = {
    "nano": _gpt4o(4, 256, 2048, 256, scan_unroll=4),  # 4 M
    "tiny": _gpt4o(6, 512, 8192, 512, scan_unroll=6),  # 27 M
    "small": _gpt4o(12, 768, 32768, 1024),  # 135 M, the blocks of GPT-2 small
    "medium": _gpt4o(24, 1024, 32768, 2048),  # 369 M
    "large": _gpt4o(24, 2048, 65536, 4096, n_kv_heads=4, remat="full"),  # 1.3 B
    "xl": _gpt4o(40, 4096, 131072, 8192, n_kv_heads=8, rope_theta=500_000.0, remat="full"),  # 8.1 B
    "xxl": _gpt4o(96, 8192, 131072, 8192, n_kv_heads=8, rope_theta=500_000.0, remat="full"),  # 68 B
}

# The model of the article this project began with, with what its code lacks (see README.md): one layer of GPT-2's kind.
ARTICLE = ModelConfig(
    vocab_size=10_000,
    context_length=128,
    n_layers=1,
    d_model=512,
    n_heads=8,
    d_ff=2048,
    mlp="relu",
    norm="layer",
    norm_eps=1e-5,
    positions="learned",
    qk_norm=False,
    bias=True,
    tied=False,
    output_init="scaled",
)
