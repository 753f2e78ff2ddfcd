"""The settings of the decoder, and the sizes derived from them. All other settings are in config.py."""

import dataclasses
import math
from typing import Any, NamedTuple


def knob(default: Any, doc: str, choices: tuple = (), low: float | None = None, high: float | None = None):
    """A dataclass field with its description, and its legal values or closed interval."""
    return dataclasses.field(default=default, metadata={"doc": doc, "choices": choices, "low": low, "high": high})


class LayerKind(NamedTuple):
    """How a layer differs from the model's others."""

    window: int | None  # keys that a token attends to, itself included; None: all earlier ones
    experts: bool  # a mixture of experts instead of a feed-forward

    @property
    def local(self) -> bool:
        return self.window is not None


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture of the decoder (model/gpt.py), and how it is computed."""

    vocab_size: int | None = knob(None, "Rows of the embedding; None takes the tokenizer's size.", low=2)
    context_length: int = knob(256, "Length T of training rows, in tokens.", low=2)
    n_layers: int = knob(4, "Number of decoder blocks L.", low=1, high=10_000)
    d_model: int = knob(256, "Width D of the residual stream.", low=1)
    n_heads: int = knob(4, "Number of query heads N.", low=1)
    n_kv_heads: int | None = knob(None, "Number of key/value heads K (grouped-query attention); None: n_heads.", low=1)
    head_dim: int | None = knob(None, "Width H of a head; None: d_model / n_heads.", low=1)
    d_ff: int | None = knob(None, "Hidden width F of the feed-forward; None: 4 * d_model.", low=1)
    mlp: str = knob(
        "relu2",
        "Activation of the feed-forward; swiglu and geglu (tanh approximation of GELU) are gated, with a third matrix.",
        ("gelu", "gelu_tanh", "relu", "relu2", "swiglu", "geglu"),
    )
    n_experts: int = knob(0, "Number of experts E in the mixture that replaces the feed-forward; 0: no mixture.", low=0)
    experts_per_token: int = knob(2, "Number of experts k that the router chooses for each token.", low=1)
    expert_d_ff: int | None = knob(None, "Hidden width of an expert; None: that of the feed-forward.", low=1)
    n_shared_experts: int = knob(0, "Number of additional experts that process every token (DeepSeekMoE).", low=0)
    expert_chunk: int | None = knob(
        None,
        "Process a device's tokens through the experts in chunks of this many, recomputed in the backward pass, to save memory;"
        " None: all at once. With mesh.expert, buffers hold this many tokens of each device along that axis.",
        low=1,
    )
    moe_every: int = knob(1, "Every n-th layer has experts, the others a feed-forward; 1: all layers have experts.", low=1)
    router_scores: str = knob(
        "softmax",
        "Function from router logits to scores; sigmoid scores each expert independently (DeepSeek-V3).",
        ("softmax", "sigmoid"),
    )
    router_normalise: bool = knob(
        True, "Normalise the weights of a token's experts to sum to 1 (Mixtral, Qwen 3); false: use the scores (Switch, OLMoE)."
    )
    router_bias: bool = knob(
        False,
        "Balance the load by a bias per expert, used only to choose experts, updated by train.router_bias_rate (DeepSeek-V3).",
    )
    norm: str = knob("rms", "Normalisation of sub-layers and of the final hidden state.", ("rms", "layer"))
    norm_position: str = knob(
        "pre",
        "Norm of each sub-layer: on its input, on its output before the residual addition (OLMo 2), or on both (Gemma 2).",
        ("pre", "post", "sandwich"),
    )
    norm_unit_offset: bool = knob(False, "Norms multiply by 1 + scale, with scales initialised to 0 (Gemma).")
    norm_eps: float = knob(1e-6, "Added to the variance inside every norm.", low=0.0)
    positions: str = knob(
        "rope", "Positional encoding: rotary (RoPE), learned absolute embeddings, or none.", ("rope", "learned", "none")
    )
    rope_theta: float = knob(10_000.0, "RoPE base theta.", low=1.0)
    rope_local_theta: float | None = knob(
        None, "RoPE base of local layers, which rope_scaling then leaves alone (Gemma 3); None: as for global layers.", low=1.0
    )
    rope_fraction: float = knob(1.0, "Fraction of each head's width that is rotated.", low=0.0, high=1.0)
    rope_scaling: str = knob("none", "Method of extending RoPE to a longer context.", ("none", "linear", "ntk", "yarn", "llama3"))
    rope_factor: float = knob(1.0, "Extended context length divided by the original one.", low=1.0)
    rope_original_context: int | None = knob(None, "yarn, llama3: the original context length, in tokens.", low=1)
    rope_low: float | None = knob(
        None,
        "yarn, llama3: dimensions with fewer rotations than this in the original context are fully scaled; None: 1.",
        low=0.0,
    )
    rope_high: float | None = knob(
        None, "yarn, llama3: dimensions with more rotations than this are not scaled; None: 32 for yarn, 4 for llama3.", low=0.0
    )
    qk_norm: bool = knob(True, "RMSNorm of queries and keys, with learned scales.")
    qk_norm_over: str = knob(
        "head", "qk_norm normalises each head (Qwen 3), or all heads together (OLMo 2).", ("head", "projection")
    )
    layer_pattern: tuple[str, ...] = knob(
        ("global",),
        "Sequence of local (sliding-window) and global (full) attention layers, repeated over the depth; the last repetition may"
        " be incomplete.",
    )
    window: int | None = knob(None, "Sliding window of local layers: keys that a token attends to, itself included.", low=1)
    attention_scale: float | None = knob(None, "Scale of the attention scores q k^T; None: 1 / sqrt(head width).", low=0.0)
    attention_softcap: float = knob(
        0.0, "Attention scores become cap * tanh(score / cap) before the softmax (Gemma 2); 0: off.", low=0.0
    )
    attention_sinks: bool = knob(
        False, "An additional learned logit in the softmax of each head, so that it can attend to nothing (gpt-oss)."
    )
    bias: bool = knob(False, "Biases in projections and LayerNorms.")
    qkv_bias: bool | None = knob(None, "Biases of query, key and value projections (Qwen 2 has only these); None: as model.bias.")
    embed_scale: bool = knob(False, "Multiply embeddings by sqrt(d_model) (Gemma).")
    residual_mix: bool = knob(
        False, "Each layer's input is a learned mixture of the residual stream and the first layer's input (modded-nanogpt)."
    )
    value_embeddings: int = knob(
        0,
        "Number n of embedding tables mixed into attention values, in the first n and in the last n layers (modded-nanogpt).",
        low=0,
    )
    mtp_heads: int = knob(0, "Number of multi-token prediction heads, used in training only (DeepSeek-V3).", low=0)
    tied: bool = knob(False, "Tie the output head to the embedding table.")
    dropout: float = knob(0.0, "Dropout on embeddings, attention weights and sub-layer outputs.", low=0.0, high=0.99)
    logit_softcap: float = knob(0.0, "Output logits become cap * tanh(logit / cap) (Gemma 2: 30); 0: off.", low=0.0)
    init_std: float = knob(0.02, "Standard deviation of the normal initialisation.", low=0.0)
    mup_base_width: int = knob(
        0,
        "muP (arXiv:2203.03466): the d_model at which learning rates and init_std were tuned; 0: off.",
        low=0,
    )
    mup_base_head_dim: int | None = knob(
        None, "muP: head width of the base model; None: this model's, so that wider models have more heads.", low=1
    )
    output_init: str = knob(
        "zero",
        "Initialisation of projections into the residual stream: zeros, or normal with std init_std / sqrt(2 * n_layers).",
        ("zero", "scaled"),
    )
    compute_dtype: str = knob(
        "auto",
        "Type of matrix product operands (accumulation is float32); auto: bfloat16 where the device is fast at it.",
        ("auto", "float32", "bfloat16"),
    )
    attention: str = knob(
        "auto",
        "Attention implementation in training (ops/attention.py); auto: the fastest for the platform and the shapes.",
        ("auto", "reference", "blocks", "cudnn", "splash", "ring", "gather"),
    )
    scan_unroll: int = knob(1, "Unroll factor of the scan over periods of layer_pattern. Always 1 on CPUs with remat.", low=1)
    remat: str = knob(
        "none",
        "Rematerialisation: what a block saves for the backward pass; the rest is recomputed. none: everything; dots: products"
        " with weights; save_mlp: inputs of the feed-forward's activation; save_attention: queries, keys, values and attention"
        " outputs; full: the block's input only; offload: the same, in host memory.",
        ("none", "dots", "save_mlp", "save_attention", "full", "offload"),
    )

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def head_width(self) -> int:
        return self.head_dim or self.d_model // self.n_heads

    @property
    def period(self) -> tuple["LayerKind", ...]:
        """The kinds of layers in one period, which is repeated over the depth."""
        every = self.moe_every if self.n_experts else 1
        windows = [self.window if kind == "local" else None for kind in self.layer_pattern]
        places = range(min(math.lcm(len(windows), every), self.n_layers))
        return tuple(LayerKind(windows[i % len(windows)], self.n_experts > 0 and i % every == every - 1) for i in places)

    @property
    def periods(self) -> int:
        """Number of whole periods; the last n_layers % len(period) layers begin another."""
        return self.n_layers // len(self.period)

    @property
    def layer_kinds(self) -> tuple["LayerKind", ...]:
        """The kind of every layer."""
        return (self.period * (self.periods + 1))[: self.n_layers]

    @property
    def gated(self) -> bool:
        return self.mlp in ("swiglu", "geglu")

    @property
    def biased_qkv(self) -> bool:
        return self.bias if self.qkv_bias is None else self.qkv_bias

    @property
    def rotary_width(self) -> int:
        return int(self.head_width * self.rope_fraction)

    @property
    def rope_turns(self) -> tuple[float, float]:
        """(rope_low, rope_high) with their defaults: those of the YaRN paper and of Llama 3.1."""
        high = {"yarn": 32.0}.get(self.rope_scaling, 4.0)
        return 1.0 if self.rope_low is None else self.rope_low, high if self.rope_high is None else self.rope_high

    @property
    def ff_width(self) -> int:
        return self.d_ff or 4 * self.d_model

    @property
    def expert_width(self) -> int:
        return self.expert_d_ff or self.ff_width

    @property
    def width_ratio(self) -> float:
        """muP: base width / width, which multiplies logits and the learning rate of hidden matrices; 1 without muP."""
        return self.mup_base_width / self.d_model if self.mup_base_width else 1.0

    @property
    def score_scale(self) -> float | None:
        """attention_scale; with muP proportional to 1 / head width, and 1 / sqrt(head width) for the base model's head width."""
        if self.attention_scale is None and self.mup_base_width:
            return (self.mup_base_head_dim or self.head_width) ** 0.5 / self.head_width
        return self.attention_scale

    @property
    def hidden_std(self) -> float:
        """Standard deviation of hidden matrices at initialisation; with muP the variance is proportional to 1 / fan-in."""
        return self.init_std * self.width_ratio**0.5
