"""The families, one table each: which tensor is which parameter, and which key of config.json is which knob.

Taken from the files of published checkpoints and the source of transformers 5. Names of tensors omit the family's prefix,
unless they begin with a dot. Letters of axes: interop/layout.py.
"""

import dataclasses

from gpt4o_jax.interop import fields as f
from gpt4o_jax.interop.fields import Field
from gpt4o_jax.interop.layout import Tensor


@dataclasses.dataclass(frozen=True)
class Family:
    """name: their model_type; architecture: their class; buffers: tensors of old files that are not weights, {l} the layer."""

    name: str
    architecture: str
    prefix: str
    tensors: tuple[Tensor, ...]
    fields: tuple[Field, ...]
    buffers: tuple[str, ...] = ()


# ---------------------------------------------------------------- GPT-2

_GPT2_TENSORS = (
    Tensor("embedding", "wte.weight", "V,D->VD"),
    Tensor("positions", "wpe.weight", "P,D->PD"),
    Tensor("unembedding", ".lm_head.weight", "V,D->DV"),
    Tensor("final_norm/scale", "ln_f.weight", "D->D"),
    Tensor("final_norm/bias", "ln_f.bias", "D->D"),
    Tensor("layers/attention_norm/scale", "h.{l}.ln_1.weight", "D->D"),
    Tensor("layers/attention_norm/bias", "h.{l}.ln_1.bias", "D->D"),
    Tensor("layers/attention/query", "h.{l}.attn.c_attn.weight", "D,3NH->DNH", part=0),
    Tensor("layers/attention/key", "h.{l}.attn.c_attn.weight", "D,3KH->DKH", part=1),
    Tensor("layers/attention/value", "h.{l}.attn.c_attn.weight", "D,3KH->DKH", part=2),
    Tensor("layers/attention/query_bias", "h.{l}.attn.c_attn.bias", "3NH->NH", part=0),
    Tensor("layers/attention/key_bias", "h.{l}.attn.c_attn.bias", "3KH->KH", part=1),
    Tensor("layers/attention/value_bias", "h.{l}.attn.c_attn.bias", "3KH->KH", part=2),
    Tensor("layers/attention/output", "h.{l}.attn.c_proj.weight", "NH,D->NHD"),
    Tensor("layers/attention/output_bias", "h.{l}.attn.c_proj.bias", "D->D"),
    Tensor("layers/mlp_norm/scale", "h.{l}.ln_2.weight", "D->D"),
    Tensor("layers/mlp_norm/bias", "h.{l}.ln_2.bias", "D->D"),
    Tensor("layers/mlp/up", "h.{l}.mlp.c_fc.weight", "D,F->DF"),
    Tensor("layers/mlp/up_bias", "h.{l}.mlp.c_fc.bias", "F->F"),
    Tensor("layers/mlp/down", "h.{l}.mlp.c_proj.weight", "F,D->FD"),
    Tensor("layers/mlp/down_bias", "h.{l}.mlp.c_proj.bias", "D->D"),
)


def _gpt2_width() -> Field:
    """n_inner; null: four times the width."""
    return Field(
        lambda v: {"d_ff": v.get("n_inner", int, 4 * v.get("n_embd", int))},
        lambda m: {"n_inner": m.ff_width},
    )


def _gpt2_heads() -> Field:
    """The width is divided among the heads, each with its own keys and values."""

    def read(v):
        n = v.get("n_head", int)
        return {"n_heads": n, "n_kv_heads": n, "head_dim": v.get("n_embd", int) // max(n, 1)}

    return Field(read, lambda m: {"n_head": m.n_heads})


_GPT2_FIELDS = (
    f.same("vocab_size", "vocab_size", int),
    f.same("context_length", "n_positions", int),
    f.same("n_layers", "n_layer", int),
    f.same("d_model", "n_embd", int),
    _gpt2_heads(),
    _gpt2_width(),
    f.same("norm_eps", "layer_norm_epsilon", float, 1e-5),
    f.choice(
        "mlp",
        "activation_function",
        {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu", "relu2": "relu2"},
        "gelu_new",
    ),
    f.same("tied", "tie_word_embeddings", bool, True),
    f.fixed("scale_attn_weights", True),
    f.fixed("scale_attn_by_inverse_layer_idx", False),
    f.fixed("add_cross_attention", False),
    f.idle("n_special", 0),  # rows that GPT-1 had for special tokens, and whether it predicted them
    f.idle("predict_special_tokens", True, False),
    f.always(norm="layer", positions="learned", qk_norm=False, bias=True),
)

# ---------------------------------------------------------------- Llama and its descendants

_ATTENTION = (
    Tensor("layers/attention/query", "layers.{l}.self_attn.q_proj.weight", "NH,D->DNH"),
    Tensor("layers/attention/key", "layers.{l}.self_attn.k_proj.weight", "KH,D->DKH"),
    Tensor("layers/attention/value", "layers.{l}.self_attn.v_proj.weight", "KH,D->DKH"),
    Tensor("layers/attention/output", "layers.{l}.self_attn.o_proj.weight", "D,NH->NHD"),
)
_GATED = (
    Tensor("layers/mlp/gate", "layers.{l}.mlp.gate_proj.weight", "F,D->DF"),
    Tensor("layers/mlp/up", "layers.{l}.mlp.up_proj.weight", "F,D->DF"),
    Tensor("layers/mlp/down", "layers.{l}.mlp.down_proj.weight", "D,F->FD"),
)
_OUTSIDE = (
    Tensor("embedding", "embed_tokens.weight", "V,D->VD"),
    Tensor("unembedding", ".lm_head.weight", "V,D->DV"),
    Tensor("final_norm/scale", "norm.weight", "D->D"),
)
_PRE_NORMS = (
    Tensor("layers/attention_norm/scale", "layers.{l}.input_layernorm.weight", "D->D"),
    Tensor("layers/mlp_norm/scale", "layers.{l}.post_attention_layernorm.weight", "D->D"),
)
_POST_NORMS = (
    Tensor("layers/attention_post_norm/scale", "layers.{l}.post_attention_layernorm.weight", "D->D"),
    Tensor("layers/mlp_post_norm/scale", "layers.{l}.post_feedforward_layernorm.weight", "D->D"),
)
_SANDWICH_NORMS = (
    Tensor("layers/attention_norm/scale", "layers.{l}.input_layernorm.weight", "D->D"),
    Tensor("layers/mlp_norm/scale", "layers.{l}.pre_feedforward_layernorm.weight", "D->D"),
    *_POST_NORMS,
)
_HEAD_NORMS = (
    Tensor("layers/attention/query_scale", "layers.{l}.self_attn.q_norm.weight", "H->H"),
    Tensor("layers/attention/key_scale", "layers.{l}.self_attn.k_norm.weight", "H->H"),
)
_PROJECTION_NORMS = (
    Tensor("layers/attention/query_scale", "layers.{l}.self_attn.q_norm.weight", "NH->NH"),
    Tensor("layers/attention/key_scale", "layers.{l}.self_attn.k_norm.weight", "KH->KH"),
)
_QKV_BIASES = (
    Tensor("layers/attention/query_bias", "layers.{l}.self_attn.q_proj.bias", "NH->NH"),
    Tensor("layers/attention/key_bias", "layers.{l}.self_attn.k_proj.bias", "KH->KH"),
    Tensor("layers/attention/value_bias", "layers.{l}.self_attn.v_proj.bias", "KH->KH"),
)
_LLAMA_TENSORS = (*_OUTSIDE, *_PRE_NORMS, *_ATTENTION, *_GATED)
_MIXTRAL_EXPERTS = (
    Tensor("layers/moe/router", "layers.{l}.block_sparse_moe.gate.weight", "E,D->DE"),
    Tensor("layers/moe/gate", "layers.{l}.block_sparse_moe.experts.{e}.w1.weight", "F,D->EDF"),
    Tensor("layers/moe/up", "layers.{l}.block_sparse_moe.experts.{e}.w3.weight", "F,D->EDF"),
    Tensor("layers/moe/down", "layers.{l}.block_sparse_moe.experts.{e}.w2.weight", "D,F->EFD"),
)
_QWEN_EXPERTS = (
    Tensor("layers/moe/router", "layers.{l}.mlp.gate.weight", "E,D->DE"),
    Tensor("layers/moe/gate", "layers.{l}.mlp.experts.{e}.gate_proj.weight", "F,D->EDF"),
    Tensor("layers/moe/up", "layers.{l}.mlp.experts.{e}.up_proj.weight", "F,D->EDF"),
    Tensor("layers/moe/down", "layers.{l}.mlp.experts.{e}.down_proj.weight", "D,F->EFD"),
)
_BUFFERS = ("layers.{l}.self_attn.rotary_emb.inv_freq",)


def _frame(eps: float = 1e-6, tied: bool = False, head_dim: int | None = None, rope: Field | None = None) -> tuple[Field, ...]:
    """Sizes, norms and rotary positions; eps, tied and head_dim: defaults of missing keys."""
    return (
        f.same("vocab_size", "vocab_size", int),
        f.same("context_length", "max_position_embeddings", int),
        f.same("n_layers", "num_hidden_layers", int),
        f.same("d_model", "hidden_size", int),
        f.same("d_ff", "intermediate_size", int),
        f.heads(head_dim),
        f.same("norm_eps", "rms_norm_eps", float, eps),
        f.same("tied", "tie_word_embeddings", bool, tied),
        rope or f.rope(),
        f.always(norm="rms", positions="rope", bias=False),
    )


_SWIGLU = f.choice("mlp", "hidden_act", {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu"}, "silu")
_GEGLU = f.choice("mlp", "hidden_activation", {"gelu_pytorch_tanh": "geglu", "silu": "swiglu"}, "gelu_pytorch_tanh")
_NO_ATTENTION_BIAS = f.fixed("attention_bias", False)
_NO_QK_NORM = f.always(qk_norm=False)
_FULL = f.always(layer_pattern=("global",), window=None)
_GEMMA = f.always(norm_position="sandwich", norm_unit_offset=True, embed_scale=True)


def _expert_width() -> Field:
    return Field(
        lambda v: {"expert_d_ff": v.get("moe_intermediate_size", int)},
        lambda m: {"moe_intermediate_size": m.expert_width},
    )


_FAMILIES = (
    Family("gpt2", "GPT2LMHeadModel", "transformer.", _GPT2_TENSORS, _GPT2_FIELDS, ("h.{l}.attn.bias", "h.{l}.attn.masked_bias")),
    Family(
        "llama",
        "LlamaForCausalLM",
        "model.",
        _LLAMA_TENSORS,
        (*_frame(), _SWIGLU, _NO_ATTENTION_BIAS, f.fixed("mlp_bias", False), _NO_QK_NORM, _FULL),
        _BUFFERS,
    ),
    Family(
        "mistral",
        "MistralForCausalLM",
        "model.",
        _LLAMA_TENSORS,
        (*_frame(), _SWIGLU, _NO_QK_NORM, f.one_window(default=4096)),
        _BUFFERS,
    ),
    Family(
        "qwen2",
        "Qwen2ForCausalLM",
        "model.",
        (*_LLAMA_TENSORS, *_QKV_BIASES),
        (*_frame(), _SWIGLU, _NO_QK_NORM, f.always(qkv_bias=True), f.windows_from(28), f.idle("use_mrope", False)),
        _BUFFERS,
    ),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        "model.",
        (*_LLAMA_TENSORS, *_HEAD_NORMS),
        (*_frame(head_dim=128), _SWIGLU, _NO_ATTENTION_BIAS, f.always(qk_norm=True, qk_norm_over="head"), f.windows_from(28)),
    ),
    Family(
        "olmo2",
        "Olmo2ForCausalLM",
        "model.",
        (*_OUTSIDE, *_POST_NORMS, *_ATTENTION, *_PROJECTION_NORMS, *_GATED),
        (
            *_frame(eps=1e-5),
            _SWIGLU,
            _NO_ATTENTION_BIAS,
            f.always(norm_position="post", qk_norm=True, qk_norm_over="projection"),
            _FULL,
        ),
    ),
    Family(
        "gemma2",
        "Gemma2ForCausalLM",
        "model.",
        (*_OUTSIDE, *_SANDWICH_NORMS, *_ATTENTION, *_GATED),
        (
            *_frame(tied=True, head_dim=256),
            _GEGLU,
            f.fixed("hidden_act", "gelu_pytorch_tanh"),  # present beside hidden_activation, which is the one used
            _NO_ATTENTION_BIAS,
            _NO_QK_NORM,
            _GEMMA,
            f.windows_in_turn(2, default=4096),
            f.query_scalar("query_pre_attn_scalar", 256),
            f.off_is_null("attention_softcap", "attn_logit_softcapping", 50.0),
            f.off_is_null("logit_softcap", "final_logit_softcapping", 30.0),
            f.fixed("use_bidirectional_attention", False),
        ),
    ),
    Family(
        "gemma3_text",
        "Gemma3ForCausalLM",
        "model.",
        (*_OUTSIDE, *_SANDWICH_NORMS, *_ATTENTION, *_HEAD_NORMS, *_GATED),
        (
            *_frame(tied=True, head_dim=256, rope=f.rope_by_kind()),
            _GEGLU,
            _NO_ATTENTION_BIAS,
            f.always(qk_norm=True, qk_norm_over="head"),
            _GEMMA,
            f.windows_in_turn(6, default=4096),
            f.query_scalar("query_pre_attn_scalar", 256),
            f.off_is_null("attention_softcap", "attn_logit_softcapping", None),
            f.off_is_null("logit_softcap", "final_logit_softcapping", None),
            f.fixed("use_bidirectional_attention", False),
        ),
    ),
    Family(
        "mixtral",
        "MixtralForCausalLM",
        "model.",
        (*_OUTSIDE, *_PRE_NORMS, *_ATTENTION, *_MIXTRAL_EXPERTS),
        (
            *_frame(eps=1e-5, rope=f.rope(1e6)),
            _SWIGLU,
            _NO_QK_NORM,
            f.one_window(),
            f.experts("num_local_experts", default=8),
            f.same("experts_per_token", "num_experts_per_tok", int, 2),
            f.always(router_scores="softmax", router_normalise=True),
        ),
    ),
    Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        "model.",
        (*_LLAMA_TENSORS, *_HEAD_NORMS, *_QWEN_EXPERTS),
        (
            *_frame(),
            _SWIGLU,
            _NO_ATTENTION_BIAS,
            f.always(qk_norm=True, qk_norm_over="head", router_scores="softmax"),
            f.one_window(default=4096, switch=True),
            f.experts("num_local_experts", "num_experts"),  # the first is the name in transformers 5
            f.same("experts_per_token", "num_experts_per_tok", int, 8),
            f.same("router_normalise", "norm_topk_prob", bool, False),
            f.same("moe_every", "decoder_sparse_step", int, 1),
            f.fixed("mlp_only_layers", []),
            _expert_width(),
        ),
    ),
)
FAMILIES: dict[str, Family] = {family.name: family for family in _FAMILIES}

# Keys that do not change what a model computes: bookkeeping, training only (dropout, initialisation), and ids of special
# tokens, which belong to the tokenizer.
NEUTRAL = frozenset({
    "architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "_attn_implementation",
    "_attn_implementation_autoset", "use_cache", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id",
    "unk_token_id", "sep_token_id", "pretraining_tp", "attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop",
    "reorder_and_upcast_attn", "output_past", "n_ctx", "summary_type", "summary_use_proj", "summary_activation",
    "summary_proj_to_labels", "summary_first_dropout", "task_specific_params", "output_attentions", "output_hidden_states",
    "return_dict", "is_decoder", "is_encoder_decoder", "id2label", "label2id", "problem_type", "gradient_checkpointing",
    "cache_implementation", "router_aux_loss_coef", "output_router_logits", "router_jitter_noise", "max_length", "min_length",
    "do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "num_beams", "num_return_sequences",
    "chunk_size_feed_forward", "torchscript",
})  # fmt: skip
