"""config.json of published checkpoints, key by key, as on the Hub: repository -> Published.

other: our knobs in which that checkpoint differs from its size in model/families.py.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from gpt4o_jax.config import ModelConfig
from gpt4o_jax.model.families import GEMMA2, GEMMA3, GPT2, LLAMA, MISTRAL, MIXTRAL, OLMO2, QWEN2, QWEN3


class Published(NamedTuple):
    size: ModelConfig
    content: dict
    other: Mapping[str, Any] = MappingProxyType({})


def _gpt2(n_layer: int, n_embd: int, n_head: int, **more) -> dict:
    return {
        "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 50256,
        "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "gpt2",
        "n_ctx": 1024, "n_embd": n_embd, "n_head": n_head, "n_layer": n_layer, "n_positions": 1024, "resid_pdrop": 0.1,
        "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True, "summary_type": "cls_index",
        "summary_use_proj": True, "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        "vocab_size": 50257, **more,
    }  # fmt: skip


_BF16 = {"torch_dtype": "bfloat16", "use_cache": True, "initializer_range": 0.02, "attention_dropout": 0.0}
_SILU = {"hidden_act": "silu"}


def _sizes(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int) -> dict:
    return {
        "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }  # fmt: skip


def _llama31(*sizes: int, **more) -> dict:
    stretch = {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }  # fmt: skip
    return _sizes(*sizes) | _BF16 | _SILU | {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "bos_token_id": 128000, "eos_token_id": 128001,
        "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama", "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": stretch, "rope_theta": 500000.0, "tie_word_embeddings": False, "transformers_version": "4.43.0.dev0",
        "vocab_size": 128256, **more,
    }  # fmt: skip


def _llama2(*sizes: int) -> dict:
    return _sizes(*sizes) | {
        "_name_or_path": "meta-llama/Llama-2-7b-hf", "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 4096, "model_type": "llama",
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16",
        "transformers_version": "4.31.0.dev0", "use_cache": True, "vocab_size": 32000,
    }  # fmt: skip


def _qwen2(*sizes: int, vocab: int = 152064, context: int = 131072, **more) -> dict:
    return _sizes(*sizes) | _BF16 | _SILU | {
        "architectures": ["Qwen2ForCausalLM"], "bos_token_id": 151643, "eos_token_id": 151643,
        "max_position_embeddings": context, "max_window_layers": sizes[2], "model_type": "qwen2", "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "sliding_window": context, "tie_word_embeddings": vocab == 151936,
        "transformers_version": "4.40.1", "use_sliding_window": False, "vocab_size": vocab, **more,
    }  # fmt: skip


def _qwen3(*sizes: int, tied: bool = False, kind: str = "Qwen3ForCausalLM", name: str = "qwen3", **more) -> dict:
    return _sizes(*sizes) | _BF16 | _SILU | {
        "architectures": [kind], "attention_bias": False, "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128,
        "max_position_embeddings": 40960, "max_window_layers": sizes[2], "model_type": name, "rms_norm_eps": 1e-06,
        "rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": tied,
        "transformers_version": "4.51.0", "use_sliding_window": False, "vocab_size": 151936, **more,
    }  # fmt: skip


def _gemma2(*sizes: int, head_dim: int = 256, scalar: int = 256, **more) -> dict:
    return _sizes(*sizes) | _BF16 | {
        "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attn_logit_softcapping": 50.0, "bos_token_id": 2,
        "cache_implementation": "hybrid", "eos_token_id": 1, "final_logit_softcapping": 30.0, "head_dim": head_dim,
        "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 8192,
        "model_type": "gemma2", "pad_token_id": 0, "query_pre_attn_scalar": scalar, "rms_norm_eps": 1e-06, "rope_theta": 10000.0,
        "sliding_window": 4096, "torch_dtype": "float32", "transformers_version": "4.42.4", "vocab_size": 256000, **more,
    }  # fmt: skip


def _mixtral(*sizes: int, **more) -> dict:
    return _sizes(*sizes) | _BF16 | _SILU | {
        "architectures": ["MixtralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 32768,
        "model_type": "mixtral", "num_experts_per_tok": 2, "num_local_experts": 8, "output_router_logits": False,
        "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None,
        "tie_word_embeddings": False, "transformers_version": "4.36.0.dev0", "vocab_size": 32000, **more,
    }  # fmt: skip


_GEMMA3_1B = _sizes(1152, 6912, 26, 4, 1) | _BF16 | {
    "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attn_logit_softcapping": None, "bos_token_id": 2,
    "cache_implementation": "hybrid", "eos_token_id": [1, 106], "final_logit_softcapping": None, "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 32768, "model_type": "gemma3_text", "pad_token_id": 0,
    "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000, "rope_scaling": None,
    "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6, "transformers_version": "4.50.0.dev0",
    "vocab_size": 262144,
}  # fmt: skip
_MISTRAL_7B = _sizes(4096, 14336, 32, 32, 8) | _SILU | {
    "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.02,
    "max_position_embeddings": 32768, "model_type": "mistral", "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
    "sliding_window": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0",
    "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
_OLMO2_7B = _sizes(4096, 11008, 32, 32, 32) | _BF16 | _SILU | {
    "architectures": ["Olmo2ForCausalLM"], "attention_bias": False, "eos_token_id": 100257, "max_position_embeddings": 4096,
    "model_type": "olmo2", "pad_token_id": 100277, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 500000,
    "tie_word_embeddings": False, "torch_dtype": "float32", "transformers_version": "4.47.0.dev0", "vocab_size": 100352,
}  # fmt: skip
_A3B = {
    "decoder_sparse_step": 1, "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True, "num_experts": 128,
    "num_experts_per_tok": 8, "output_router_logits": False, "router_aux_loss_coef": 0.001,
}  # fmt: skip
# The same checkpoint as rewritten by transformers 5: experts and rotary positions under other names.
_A3B_5 = {k: v for k, v in _A3B.items() if k != "num_experts"} | {
    "num_local_experts": 128, "dtype": "bfloat16", "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
}  # fmt: skip
_MOE = {"kind": "Qwen3MoeForCausalLM", "name": "qwen3_moe"}
_NO_DENSE = {"d_ff": 6144, "expert_d_ff": 768}  # the first is in config.json, but no layer has a feed-forward of that width
_SHORT = {"context": 32768, "use_mrope": False}

PUBLISHED: dict[str, Published] = {
    "gpt2": Published(GPT2["124m"], _gpt2(12, 768, 12)),
    "gpt2-medium": Published(GPT2["355m"], _gpt2(24, 1024, 16, n_special=0, predict_special_tokens=True)),
    "gpt2-large": Published(GPT2["774m"], _gpt2(36, 1280, 20)),
    "gpt2-xl": Published(GPT2["1558m"], _gpt2(48, 1600, 25, output_past=True)),
    "Llama-2-7b-hf": Published(LLAMA["2-7b"], _llama2(4096, 11008, 32, 32, 32)),
    "Llama-3.1-8B": Published(LLAMA["8b"], _llama31(4096, 14336, 32, 32, 8)),
    "Llama-3.1-8B-Instruct": Published(
        LLAMA["8b"], _llama31(4096, 14336, 32, 32, 8, eos_token_id=[128001, 128008, 128009], transformers_version="4.42.3")
    ),
    "Llama-3.1-70B": Published(LLAMA["70b"], _llama31(8192, 28672, 80, 64, 8)),
    "Llama-3.1-405B": Published(LLAMA["405b"], _llama31(16384, 53248, 126, 128, 8)),
    "Qwen2-7B": Published(QWEN2["7b"], _qwen2(3584, 18944, 28, 28, 4, transformers_version="4.37.2")),
    "Qwen2.5-0.5B": Published(
        QWEN2["0.5b"], _qwen2(896, 4864, 24, 14, 2, vocab=151936, **_SHORT), {"context_length": 32768}
    ),
    "Qwen2.5-1.5B": Published(QWEN2["1.5b"], _qwen2(1536, 8960, 28, 12, 2, vocab=151936, use_mrope=False)),
    "Qwen2.5-7B": Published(QWEN2["7b"], _qwen2(3584, 18944, 28, 28, 4, use_mrope=False)),
    "Qwen3-0.6B": Published(QWEN3["0.6b"], _qwen3(1024, 3072, 28, 16, 8, tied=True)),
    "Qwen3-1.7B": Published(QWEN3["1.7b"], _qwen3(2048, 6144, 28, 16, 8, tied=True)),
    "Qwen3-4B": Published(QWEN3["4b"], _qwen3(2560, 9728, 36, 32, 8, tied=True)),
    "Qwen3-8B": Published(QWEN3["8b"], _qwen3(4096, 12288, 36, 32, 8)),
    "Qwen3-14B": Published(QWEN3["14b"], _qwen3(5120, 17408, 40, 40, 8)),
    "Qwen3-32B": Published(QWEN3["32b"], _qwen3(5120, 25600, 64, 64, 8)),
    "Qwen3-30B-A3B": Published(QWEN3["30b-a3b"], _qwen3(2048, 6144, 48, 32, 4, **_MOE, **_A3B), _NO_DENSE),
    "Qwen3-30B-A3B, written by transformers 5": Published(
        QWEN3["30b-a3b"], _qwen3(2048, 6144, 48, 32, 4, **_MOE, **_A3B_5), _NO_DENSE
    ),
    "gemma-2-2b": Published(GEMMA2["2b"], _gemma2(2304, 9216, 26, 8, 4)),
    "gemma-2-9b": Published(GEMMA2["9b"], _gemma2(3584, 14336, 42, 16, 8, sliding_window_size=4096)),
    "gemma-2-27b": Published(
        GEMMA2["27b"],
        _gemma2(
            4608, 36864, 46, 32, 16, head_dim=128, scalar=144, sliding_window_size=4096, _attn_implementation="eager"
        ),
    ),
    "gemma-3-1b-pt": Published(GEMMA3["1b"], _GEMMA3_1B),
    "Mistral-7B-v0.1": Published(MISTRAL["7b"], _MISTRAL_7B),
    "Mixtral-8x7B-v0.1": Published(MIXTRAL["8x7b"], _mixtral(4096, 14336, 32, 32, 8)),
    "Mixtral-8x22B-v0.1": Published(
        MIXTRAL["8x22b"],
        _mixtral(
            6144, 16384, 56, 48, 8, max_position_embeddings=65536, router_aux_loss_coef=0.001, router_jitter_noise=0.0,
            transformers_version="4.38.0",
        ),
    ),
    "OLMo-2-1124-7B": Published(OLMO2["7b"], _OLMO2_7B),
}  # fmt: skip
