"""The knobs of the decoder (config.py has all others), and what follows from them."""

import dataclasses
import math
from typing import Any, NamedTuple


def knob(default: Any, doc: str, choices: tuple = (), low: float | None = None, high: float | None = None):
    """A dataclass field with its sentence, and its legal values or closed interval."""
    return dataclasses.field(default=default, metadata={"doc": doc, "choices": choices, "low": low, "high": high})


class LayerKind(NamedTuple):
    """What tells a layer from others."""

    window: int | None  # keys that a token sees, its own among them; None: all before it
    experts: bool  # a mixture of experts in the place of the feed-forward

    @property
    def local(self) -> bool:
        return self.window is not None


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The decoder: what `model/gpt.py` needs to know, and nothing about how it is trained."""

    vocab_size: int | None = knob(None, "Rows of the embedding; None takes the tokenizer's size.", low=2)
    context_length: int = knob(256, "Longest sequence T, in tokens, that the model is trained on.", low=2)
    n_layers: int = knob(4, "Decoder blocks L.", low=1)
    d_model: int = knob(256, "Width D of the residual stream.", low=1)
    n_heads: int = knob(4, "Query heads N.", low=1)
    n_kv_heads: int | None = knob(None, "Key/value heads K (grouped-query attention); None means n_heads.", low=1)
    head_dim: int | None = knob(None, "Width H of one head; None means d_model / n_heads.", low=1)
    d_ff: int | None = knob(None, "Hidden width F of the feed-forward; None means 4 * d_model.", low=1)
    mlp: str = knob(
        "relu2",
        "Feed-forward non-linearity; swiglu and geglu (with GELU's tanh form) gate a second projection.",
        ("gelu", "gelu_tanh", "relu", "relu2", "swiglu", "geglu"),
    )
    n_experts: int = knob(0, "Experts E of a mixture that takes the place of the feed-forward; 0: none.", low=0)
    experts_per_token: int = knob(2, "Experts k that the router chooses for a token.", low=1)
    expert_d_ff: int | None = knob(None, "Hidden width of one expert; None: as of a feed-forward.", low=1)
    n_shared_experts: int = knob(0, "Further experts that every token passes (DeepSeekMoE).", low=0)
    expert_chunk: int | None = knob(
        None,
        "Tokens of a device whose rows, one for each of their experts, exist at once, and are computed again in the backward"
        " pass; None: all. With mesh.expert there is room for the rows of as many tokens of each device along it.",
        low=1,
    )
    moe_every: int = knob(1, "The last of every so many layers has experts, the others a feed-forward; 1: all have.", low=1)
    router_scores: str = knob(
        "softmax",
        "Scores by which experts are chosen and weighted; sigmoid: each by itself (DeepSeek-V3).",
        ("softmax", "sigmoid"),
    )
    router_normalise: bool = knob(
        True, "The weights of a token's experts sum to 1 (Mixtral, Qwen 3); false: they are the scores (Switch, OLMoE)."
    )
    router_bias: bool = knob(
        False, "A number for each expert that counts in the choice alone, moved by train.router_bias_rate (DeepSeek-V3)."
    )
    norm: str = knob("rms", "Normalisation around each sub-layer and at the end.", ("rms", "layer"))
    norm_position: str = knob(
        "pre",
        "Each sub-layer's norm: on its input, on its output before that is added (OLMo 2), or on both (Gemma 2).",
        ("pre", "post", "sandwich"),
    )
    norm_unit_offset: bool = knob(False, "Norms multiply by 1 + scale, and scales start at 0 (Gemma).")
    norm_eps: float = knob(1e-6, "Added to the variance inside every norm.", low=0.0)
    positions: str = knob("rope", "How positions enter: rotary, a learned table, or not at all.", ("rope", "learned", "none"))
    rope_theta: float = knob(10_000.0, "Base of the rotary wavelengths.", low=1.0)
    rope_local_theta: float | None = knob(
        None, "The base in local layers, whose wavelengths are then not stretched (Gemma 3); None: as in global ones.", low=1.0
    )
    rope_fraction: float = knob(
        1.0, "Share of a head's coordinates that are rotated; the others know no position.", low=0.0, high=1.0
    )
    rope_scaling: str = knob(
        "none", "How rotary wavelengths are stretched for a longer context.", ("none", "linear", "ntk", "yarn", "llama3")
    )
    rope_factor: float = knob(1.0, "Longest context after stretching, in units of the one before.", low=1.0)
    rope_original_context: int | None = knob(None, "yarn, llama3: the context before stretching, in tokens.", low=1)
    rope_low: float | None = knob(
        None, "yarn, llama3: pairs that turn fewer times than this in the original context stretch wholly; None: 1.", low=0.0
    )
    rope_high: float | None = knob(
        None, "yarn, llama3: pairs that turn more often than this do not stretch; None: 32 for yarn, 4 for llama3.", low=0.0
    )
    qk_norm: bool = knob(True, "RMS-normalise queries and keys, with learned scales.")
    qk_norm_over: str = knob(
        "head", "What qk_norm takes the mean over: each head (Qwen 3), or all heads at once (OLMo 2).", ("head", "projection")
    )
    layer_pattern: tuple[str, ...] = knob(
        ("global",),
        "Kinds of layers, repeated over the depth, at whose end the last repetition may break off: local ones see only the"
        " window, global ones everything before.",
    )
    window: int | None = knob(None, "Keys that a token of a local layer sees, its own among them.", low=1)
    attention_scale: float | None = knob(None, "What scores q k^T are multiplied by; None: 1 / sqrt(head width).", low=0.0)
    attention_softcap: float = knob(0.0, "Scores become cap * tanh(score / cap) before the softmax (Gemma 2); 0: not.", low=0.0)
    attention_sinks: bool = knob(False, "One more learned logit in the softmax of each head, for attending to nothing (gpt-oss).")
    bias: bool = knob(False, "Biases in projections and layer norms.")
    qkv_bias: bool | None = knob(None, "Biases on queries, keys and values (Qwen 2: there alone); None: as `bias`.")
    embed_scale: bool = knob(False, "Multiply embeddings by sqrt(d_model) (Gemma).")
    residual_mix: bool = knob(False, "Each layer starts from a learned mixture of the stream and what entered the first layer.")
    value_embeddings: int = knob(
        0, "Tables n of embeddings mixed into attention's values: in the first n layers, and again in the last n.", low=0
    )
    mtp_heads: int = knob(0, "Heads that predict the tokens after the next one while training (DeepSeek-V3).", low=0)
    tied: bool = knob(False, "Use the embedding table, transposed, as the output head.")
    dropout: float = knob(0.0, "Dropout on embeddings, attention weights and sub-layer outputs.", low=0.0, high=0.99)
    logit_softcap: float = knob(0.0, "Logits z become softcap * tanh(z / softcap), as in Gemma 2 with 30; 0: off.", low=0.0)
    init_std: float = knob(0.02, "Standard deviation of the normal initialisation.", low=0.0)
    mup_base_width: int = knob(
        0,
        "muP: the d_model whose learning rates and init_std hold at this width too (arXiv:2203.03466); 0: off.",
        low=0,
    )
    mup_base_head_dim: int | None = knob(
        None, "muP: head width of the base model; None: this model's, so that a wider one has more heads.", low=1
    )
    output_init: str = knob(
        "zero",
        "Projections that write to the residual stream: zeros, or init_std / sqrt(2 * n_layers).",
        ("zero", "scaled"),
    )
    compute_dtype: str = knob(
        "auto",
        "Operands of matrix products (sums stay float32). auto: bfloat16 where the device is fast at it.",
        ("auto", "float32", "bfloat16"),
    )
    attention: str = knob(
        "auto",
        "Who computes attention in training (ops/attention.py); auto: the fastest for the platform and the shapes.",
        ("auto", "reference", "blocks", "cudnn", "splash", "ring", "gather"),
    )
    scan_unroll: int = knob(
        1, "Periods of layer_pattern per iteration of the scan over them; all of them unroll it. On CPUs 1 with remat.", low=1
    )
    remat: str = knob(
        "none",
        "What the forward pass keeps of a block for the backward pass, which computes the rest again, from the most to the least:"
        " none: everything; dots: products with weights; save_mlp: those into the feed-forward; save_attention: queries, keys,"
        " values and what attention makes of them; full: the input alone; offload: that too, but in the host's memory.",
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
        """The kinds of layers that are repeated over the depth."""
        every = self.moe_every if self.n_experts else 1
        windows = [self.window if kind == "local" else None for kind in self.layer_pattern]
        places = range(min(math.lcm(len(windows), every), self.n_layers))
        return tuple(LayerKind(windows[i % len(windows)], self.n_experts > 0 and i % every == every - 1) for i in places)

    @property
    def periods(self) -> int:
        """Whole ones; n_layers % len(period) layers are left over, of the kinds that a period begins with."""
        return self.n_layers // len(self.period)

    @property
    def layer_kinds(self) -> tuple["LayerKind", ...]:
        """Of every layer."""
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
        """muP: base width / width, by which logits and Adam's learning rate of hidden matrices are multiplied; else 1."""
        return self.mup_base_width / self.d_model if self.mup_base_width else 1.0

    @property
    def score_scale(self) -> float | None:
        """attention_scale; under muP as 1 / head width, which at the base's head width is the usual 1 / sqrt."""
        if self.attention_scale is None and self.mup_base_width:
            return (self.mup_base_head_dim or self.head_width) ** 0.5 / self.head_width
        return self.attention_scale

    @property
    def hidden_std(self) -> float:
        """Standard deviation of hidden matrices at the start: under muP the variance is as 1 / fan-in."""
        return self.init_std * self.width_ratio**0.5
