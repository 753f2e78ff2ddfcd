"""Published model families and sizes, as ModelConfig values.

A config file copies one of them and may change it:

    c = base_config()
    c.model.update(to_dict(GPT4O["small"]))
"""

import dataclasses

from gpt4o_jax.config import ModelConfig, base_config, to_dict
from gpt4o_jax.errors import RunError, did_you_mean


def pick(file: str, sizes: dict[str, ModelConfig], size: str) -> ModelConfig:
    """sizes[size]; file: the config's name, for the message. Raises RunError if there is no such size."""
    if size not in sizes:
        raise RunError(f"configs/{file}:{size}: no such size{did_you_mean(size, sizes)}; sizes: {', '.join(sizes)}")
    return sizes[size]


def large_run(file: str, sizes: dict[str, ModelConfig], size: str):
    """The config for pretraining sizes[size] at scale: FSDP over all devices, full remat. Raises RunError as `pick` does."""
    c = base_config()
    c.model.update(to_dict(pick(file, sizes, size)))
    c.model.remat = "full"
    c.tokenizer.vocab_size = c.model.vocab_size
    c.optimizer.warmup_steps = 2000
    c.eval.max_tokens = 500_000
    c.mesh.preset = "fsdp"
    c.train.steps_per_dispatch = 1
    return c


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


# From 1.3 B on, key/value heads are shared (GQA), as the cache starts to limit the batch of sampling, and blocks are
# rematerialised, as activations outgrow the memory of one device.
GPT4O: dict[str, ModelConfig] = {
    "nano": _gpt4o(4, 256, 2048, 256, scan_unroll=4),  # 4 M
    "tiny": _gpt4o(6, 512, 8192, 512, scan_unroll=6),  # 27 M
    "small": _gpt4o(12, 768, 32768, 1024),  # 135 M, the blocks of GPT-2 small
    "moe_nano": _gpt4o(  # 10 M, of which 4 M active, as in nano
        4, 256, 2048, 256, scan_unroll=4, n_experts=8, experts_per_token=2, expert_d_ff=512, router_bias=True
    ),
    "medium": _gpt4o(24, 1024, 32768, 2048),  # 369 M
    "large": _gpt4o(24, 2048, 65536, 4096, n_kv_heads=4, remat="full"),  # 1.3 B
    "xl": _gpt4o(40, 4096, 131072, 8192, n_kv_heads=8, rope_theta=500_000.0, remat="full"),  # 8.1 B
    "xxl": _gpt4o(96, 8192, 131072, 8192, n_kv_heads=8, rope_theta=500_000.0, remat="full"),  # 68 B
}

# The model of the article this project started from, including what its code lacks (see README.md): one layer in GPT-2's style.
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


# ---------------------------------------------------------------- published families
#
# Architectures follow the named checkpoints' own configuration files; how they were initialised is not published in full, so
# output_init and init_std are GPT-2's throughout.


def _gpt2(n_layers: int, d_model: int, n_heads: int) -> ModelConfig:
    """Radford et al. 2019. Heads of width 64, biases everywhere, tied embeddings, the tanh form of GELU."""
    return ModelConfig(
        vocab_size=50_257,
        context_length=1024,
        n_layers=n_layers,
        d_model=d_model,
        n_heads=n_heads,
        mlp="gelu_tanh",
        norm="layer",
        norm_eps=1e-5,
        positions="learned",
        qk_norm=False,
        bias=True,
        tied=True,
        output_init="scaled",
    )


GPT2: dict[str, ModelConfig] = {
    "124m": _gpt2(12, 768, 12),
    "355m": _gpt2(24, 1024, 16),
    "774m": _gpt2(36, 1280, 20),
    "1558m": _gpt2(48, 1600, 25),
}


def _llama(n_layers, d_model, n_heads, n_kv_heads, d_ff, norm_eps=1e-5, **more) -> ModelConfig:
    """The architecture set by Llama (arXiv:2302.13971): RMSNorm, RoPE, SwiGLU, no biases; heads of width 128 by default."""
    return ModelConfig(
        n_layers=n_layers,
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        d_ff=d_ff,
        norm_eps=norm_eps,
        output_init="scaled",
        **dict(head_dim=128, mlp="swiglu", norm="rms", positions="rope", qk_norm=False) | more,
    )


def _llama3(n_layers, d_model, n_heads, d_ff, rope_factor=8.0, **more) -> ModelConfig:
    """Llama 3.1 and 3.2 (arXiv:2407.21783): trained on 8,192 tokens, extended to 131,072."""
    stretch = dict(rope_theta=500_000.0, rope_scaling="llama3", rope_factor=rope_factor, rope_original_context=8192)
    return _llama(n_layers, d_model, n_heads, 8, d_ff, vocab_size=128_256, context_length=131_072, **stretch, **more)


def _llama2(n_layers, d_model, n_heads, n_kv_heads, d_ff) -> ModelConfig:
    """Llama 2 (arXiv:2307.09288)."""
    return _llama(n_layers, d_model, n_heads, n_kv_heads, d_ff, vocab_size=32_000, context_length=4096)


LLAMA: dict[str, ModelConfig] = {
    "1b": _llama3(16, 2048, 32, 8192, rope_factor=32.0, head_dim=64, tied=True),  # 3.2
    "3b": _llama3(28, 3072, 24, 8192, rope_factor=32.0, tied=True),  # 3.2
    "8b": _llama3(32, 4096, 32, 14_336),
    "70b": _llama3(80, 8192, 64, 28_672),
    "405b": _llama3(126, 16_384, 128, 53_248),
    "2-7b": _llama2(32, 4096, 32, 32, 11_008),
    "2-13b": _llama2(40, 5120, 40, 40, 13_824),
    "2-70b": _llama2(80, 8192, 64, 8, 28_672),
}


def _qwen2(n_layers, d_model, n_heads, n_kv_heads, d_ff, vocab_size=151_936, **more) -> ModelConfig:
    """Qwen 2 (arXiv:2407.10671): biases on queries, keys and values only."""
    size = dict(vocab_size=vocab_size, context_length=131_072, rope_theta=1e6)
    return _llama(n_layers, d_model, n_heads, n_kv_heads, d_ff, norm_eps=1e-6, qkv_bias=True, **size, **more)


QWEN2: dict[str, ModelConfig] = {
    "0.5b": _qwen2(24, 896, 14, 2, 4864, head_dim=64, tied=True),
    "1.5b": _qwen2(28, 1536, 12, 2, 8960, tied=True),
    "7b": _qwen2(28, 3584, 28, 4, 18_944, vocab_size=152_064),
    "72b": _qwen2(80, 8192, 64, 8, 29_568, vocab_size=152_064),
}


def _qwen3(n_layers, d_model, n_heads, d_ff, tied=False, n_kv_heads=8, **more) -> ModelConfig:
    """Qwen 3 (arXiv:2505.09388): QK-norm per head, no biases."""
    size = dict(vocab_size=151_936, context_length=40_960, rope_theta=1e6, tied=tied)
    return _llama(n_layers, d_model, n_heads, n_kv_heads, d_ff, norm_eps=1e-6, qk_norm=True, **size, **more)


_OF_128 = dict(n_kv_heads=4, n_experts=128, experts_per_token=8)


QWEN3: dict[str, ModelConfig] = {
    "0.6b": _qwen3(28, 1024, 16, 3072, tied=True),
    "1.7b": _qwen3(28, 2048, 16, 6144, tied=True),
    "4b": _qwen3(36, 2560, 32, 9728, tied=True),
    "8b": _qwen3(36, 4096, 32, 12_288),
    "14b": _qwen3(40, 5120, 40, 17_408),
    "32b": _qwen3(64, 5120, 64, 25_600),
    "30b-a3b": _qwen3(48, 2048, 32, 768, **_OF_128),  # 3.3 B active
    "235b-a22b": _qwen3(94, 4096, 64, 1536, **_OF_128),  # 22 B active
}


def _gemma2(n_layers, d_model, n_heads, n_kv_heads, d_ff, head_dim, query_scalar) -> ModelConfig:
    """Gemma 2 (arXiv:2408.00118): alternating local and global layers, norms on both sides, soft-caps, GeGLU, tied embeddings."""
    return _llama(
        n_layers,
        d_model,
        n_heads,
        n_kv_heads,
        d_ff,
        norm_eps=1e-6,
        vocab_size=256_000,
        context_length=8192,
        head_dim=head_dim,
        mlp="geglu",
        norm_position="sandwich",
        norm_unit_offset=True,
        layer_pattern=("local", "global"),
        window=4096,
        attention_scale=query_scalar**-0.5,
        attention_softcap=50.0,
        logit_softcap=30.0,
        embed_scale=True,
        tied=True,
    )


GEMMA2: dict[str, ModelConfig] = {
    "2b": _gemma2(26, 2304, 8, 4, 9216, 256, 256),
    "9b": _gemma2(42, 3584, 16, 8, 14_336, 256, 256),
    "27b": _gemma2(46, 4608, 32, 16, 36_864, 128, 144),
}


def _gemma3(n_layers, d_model, n_heads, n_kv_heads, d_ff, head_dim=256, query_scalar=256, window=1024) -> ModelConfig:
    """Gemma 3's text decoder (arXiv:2503.19786): five local layers per global one, QK-norm instead of soft-caps.

    Contexts beyond 32,768 tokens by RoPE scaling, in global layers only.
    """
    return _llama(
        n_layers,
        d_model,
        n_heads,
        n_kv_heads,
        d_ff,
        norm_eps=1e-6,
        vocab_size=262_208,  # including rows for images
        context_length=131_072,
        head_dim=head_dim,
        mlp="geglu",
        norm_position="sandwich",
        norm_unit_offset=True,
        qk_norm=True,
        layer_pattern=("local",) * 5 + ("global",),
        window=window,
        attention_scale=query_scalar**-0.5,
        rope_theta=1e6,
        rope_local_theta=10_000.0,
        rope_scaling="linear",
        rope_factor=8.0,
        embed_scale=True,
        tied=True,
    )


_TEXT_ONLY = dict(vocab_size=262_144, context_length=32_768, rope_scaling="none", rope_factor=1.0)
GEMMA3: dict[str, ModelConfig] = {
    "1b": dataclasses.replace(_gemma3(26, 1152, 4, 1, 6912, window=512), **_TEXT_ONLY),
    "4b": _gemma3(34, 2560, 8, 4, 10_240),
    "12b": _gemma3(48, 3840, 16, 8, 15_360),
    "27b": _gemma3(62, 5376, 32, 16, 21_504, head_dim=128, query_scalar=168),
}

# Mistral 7B v0.1 (arXiv:2310.06825): a sliding window of 4,096 tokens in every layer.
_WINDOW = dict(layer_pattern=("local",), window=4096)
MISTRAL: dict[str, ModelConfig] = {
    "7b": _llama(32, 4096, 32, 8, 14_336, vocab_size=32_000, context_length=32_768, **_WINDOW),
}


# Mixtral (arXiv:2401.04088): eight experts, two per token; no window.
_EIGHT = dict(n_experts=8, experts_per_token=2, rope_theta=1e6, vocab_size=32_000)
MIXTRAL: dict[str, ModelConfig] = {
    "8x7b": _llama(32, 4096, 32, 8, 14_336, context_length=32_768, **_EIGHT),
    "8x22b": _llama(56, 6144, 48, 8, 16_384, context_length=65_536, **_EIGHT),
}


def _olmo2(n_layers, d_model, n_heads, d_ff) -> ModelConfig:
    """OLMo 2 (arXiv:2501.00656): norms on the sub-layers' outputs, QK-norm over the whole projection."""
    size = dict(vocab_size=100_352, context_length=4096, rope_theta=500_000.0)
    norms = dict(norm_eps=1e-6, norm_position="post", qk_norm=True, qk_norm_over="projection")
    return _llama(n_layers, d_model, n_heads, n_heads, d_ff, **size, **norms)


OLMO2: dict[str, ModelConfig] = {"7b": _olmo2(32, 4096, 32, 11_008), "13b": _olmo2(40, 5120, 40, 13_824)}
