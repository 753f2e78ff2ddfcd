"""Small models of every family, as arguments of transformers' config classes, named FAMILY-WHAT."""

SIZE = dict(
    vocab_size=61,  # 32 reserved ids and 29 characters: odd, as in real models
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=512,
)
GQA = SIZE | dict(num_key_value_heads=2)
GPT2 = dict(vocab_size=61, n_embd=16, n_layer=2, n_head=4, n_positions=512)


def _rope(kind: str, **more) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10_000.0, **more}}


LLAMA3 = _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
YARN = _rope("yarn", factor=4.0, original_max_position_embeddings=128)

CASES: dict[str, tuple[str, dict]] = {
    "gpt2-plain": ("GPT2Config", GPT2),
    "gpt2-untied": ("GPT2Config", GPT2 | dict(n_inner=40, activation_function="gelu", tie_word_embeddings=False)),
    "gpt2-relu": ("GPT2Config", GPT2 | dict(n_head=2, activation_function="relu", layer_norm_epsilon=1e-4)),
    "llama-plain": ("LlamaConfig", SIZE),
    "llama-gqa": ("LlamaConfig", GQA | LLAMA3 | dict(tie_word_embeddings=True)),
    "llama-wide": ("LlamaConfig", GQA | _rope("linear", factor=3.0) | dict(head_dim=6)),
    "mistral-window": ("MistralConfig", GQA | dict(sliding_window=7)),
    "mistral-global": ("MistralConfig", GQA | dict(sliding_window=None, head_dim=8)),
    "mistral-tied": ("MistralConfig", SIZE | YARN | dict(num_key_value_heads=4, sliding_window=100, tie_word_embeddings=True)),
    "qwen3-plain": ("Qwen3Config", GQA | dict(head_dim=8)),
    "qwen3-tied": ("Qwen3Config", GQA | YARN | dict(head_dim=4, tie_word_embeddings=True)),
    "qwen3-window": (
        "Qwen3Config",
        GQA | dict(head_dim=4, num_hidden_layers=3, use_sliding_window=True, sliding_window=9, max_window_layers=1),
    ),
    "olmo2-plain": ("Olmo2Config", SIZE),
    "olmo2-gqa": ("Olmo2Config", GQA | dict(rms_norm_eps=1e-4, rope_parameters={"rope_type": "default", "rope_theta": 500.0})),
    "olmo2-tied": ("Olmo2Config", GQA | _rope("linear", factor=2.0) | dict(tie_word_embeddings=True)),
    "gemma2-plain": ("Gemma2Config", GQA | dict(head_dim=8, query_pre_attn_scalar=8, sliding_window=16)),
    "gemma2-four": (
        "Gemma2Config",
        GQA | dict(head_dim=4, num_hidden_layers=4, query_pre_attn_scalar=5, sliding_window=3, attn_logit_softcapping=5.0),
    ),
    "gemma2-uncapped": (
        "Gemma2Config",
        GQA
        | _rope("linear", factor=2.0)
        | dict(
            head_dim=4, sliding_window=50, attn_logit_softcapping=None, final_logit_softcapping=None, tie_word_embeddings=False
        ),
    ),
    "qwen2-plain": ("Qwen2Config", SIZE | dict(num_key_value_heads=4)),
    "qwen2-tied": ("Qwen2Config", GQA | YARN | dict(tie_word_embeddings=True)),
    "qwen2-window": (
        "Qwen2Config",
        GQA | dict(num_hidden_layers=3, use_sliding_window=True, sliding_window=5, max_window_layers=2),
    ),
    "gemma3_text-plain": (
        "Gemma3TextConfig",
        GQA
        | dict(
            head_dim=8,
            num_hidden_layers=3,
            query_pre_attn_scalar=8,
            sliding_window=16,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
    ),
    "gemma3_text-stretched": (
        "Gemma3TextConfig",
        GQA
        | dict(
            head_dim=4,
            query_pre_attn_scalar=5,
            sliding_window=6,
            sliding_window_pattern=2,
            rope_scaling={"rope_type": "linear", "factor": 8.0},
        ),
    ),
    "gemma3_text-local": ("Gemma3TextConfig", GQA | dict(head_dim=4, sliding_window=9, final_logit_softcapping=4.0)),
    "mixtral-plain": ("MixtralConfig", GQA | dict(num_local_experts=4, intermediate_size=8)),
    "mixtral-window": (
        "MixtralConfig",
        SIZE | dict(num_key_value_heads=4, num_local_experts=3, num_experts_per_tok=1, intermediate_size=8, sliding_window=11),
    ),
    "mixtral-tied": ("MixtralConfig", GQA | LLAMA3 | dict(num_local_experts=4, intermediate_size=8, tie_word_embeddings=True)),
    "qwen3_moe-plain": (
        "Qwen3MoeConfig",
        GQA | dict(head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, norm_topk_prob=True),
    ),
    "qwen3_moe-scores": (
        "Qwen3MoeConfig",
        GQA | YARN | dict(head_dim=4, num_experts=5, num_experts_per_tok=3, moe_intermediate_size=12, tie_word_embeddings=True),
    ),
    "qwen3_moe-sparse": (
        "Qwen3MoeConfig",
        GQA
        | dict(
            head_dim=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, decoder_sparse_step=2, num_hidden_layers=3
        ),
    ),
    "qwen3_moe-window": (
        "Qwen3MoeConfig",
        GQA
        | dict(
            head_dim=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, use_sliding_window=True, sliding_window=9
        ),
    ),
}
