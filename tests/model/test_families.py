"""The decoder with each published family's knobs against the formulas of its paper, in NumPy and float64.

T positions, D model width, N query heads, K key/value heads, H head width
"""

import numpy as np
import pytest

from gpt4o_jax.config import ModelConfig

T = 9  # of the fixture `run`
SHAPE = dict(vocab_size=40, context_length=12, n_layers=2, d_model=16, n_heads=4, n_kv_heads=2, d_ff=28, norm_eps=1e-5)
GPT2 = ModelConfig(
    **SHAPE | dict(n_kv_heads=None), mlp="gelu_tanh", norm="layer", positions="learned", qk_norm=False, bias=True, tied=True
)
QWEN2 = ModelConfig(**SHAPE, mlp="swiglu", qk_norm=False, qkv_bias=True, tied=True)
OLMO2 = ModelConfig(**SHAPE, mlp="swiglu", norm_position="post", qk_norm_over="projection")
GEMMA2 = ModelConfig(
    **SHAPE, head_dim=6, mlp="geglu", norm_position="sandwich", norm_unit_offset=True, embed_scale=True, qk_norm=False, tied=True,
    layer_pattern=("local", "global"), window=4, attention_softcap=2.0, attention_scale=0.3,
    logit_softcap=5.0,
)  # fmt: skip
GEMMA3 = ModelConfig(
    **SHAPE | dict(n_layers=5), head_dim=6, mlp="geglu", norm_position="sandwich", norm_unit_offset=True, embed_scale=True,
    tied=True, layer_pattern=("local", "local", "global"), window=4, attention_scale=0.3, rope_theta=1e6, rope_local_theta=100.0,
    rope_scaling="linear", rope_factor=8.0,
)  # fmt: skip
GPT_OSS = ModelConfig(
    **SHAPE | dict(n_layers=4), mlp="swiglu", qk_norm=False, bias=True, qkv_bias=True, attention_sinks=True,
    layer_pattern=("local", "global"), window=4,
)  # fmt: skip
SPEEDRUN = ModelConfig(**SHAPE | dict(n_layers=3), mlp="relu2", residual_mix=True, value_embeddings=1)
MIXTRAL = ModelConfig(**SHAPE, mlp="swiglu", qk_norm=False, n_experts=5, experts_per_token=2)
QWEN_MOE = ModelConfig(
    **SHAPE | dict(n_layers=3),
    mlp="swiglu",
    n_experts=6,
    experts_per_token=3,
    expert_d_ff=20,
    router_normalise=False,
    moe_every=2,
)
DEEPSEEK = ModelConfig(
    **SHAPE, mlp="swiglu", qk_norm=False, n_experts=6, n_shared_experts=2, expert_d_ff=10, router_scores="sigmoid",
    router_bias=True,
)  # fmt: skip
MISTRAL = ModelConfig(**SHAPE, mlp="swiglu", qk_norm=False, layer_pattern=("local",), window=3)


def layer(params, i):
    """Layer i of a pattern of P kinds is number i // P of block_(i % P); an incomplete last period is in last_layers."""
    layers = params["layers"]
    if "block_0" in layers:
        period, whole = len(layers), len(layers["block_0"]["attention_norm"]["scale"])
        layers = layers if i < period * whole else params["last_layers"]
        layers, i = layers[f"block_{i % period}"], i // period % whole
    part = lambda tree: {k: part(v) if isinstance(v, dict) else v[i] for k, v in tree.items()}
    return part(layers)


def rms(x, scale, eps=1e-5):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * scale


def layer_norm(x, p):
    return (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def silu(x):
    return x / (1 + np.exp(-x))


def rotate(x, theta=10_000.0, slower=1):
    """[T, n, H]: every pair (i, i + H/2) as a complex number."""
    half = x.shape[-1] // 2
    angles = np.arange(T)[:, None] / slower * theta ** (-np.arange(half) / half)
    pairs = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[:, None]
    return np.concatenate([pairs.real, pairs.imag], axis=-1)


def attend(q, k, v, scale=None, window=T, cap=None, sinks=None):
    """Heads [T, n, H] -> [T, N, H]; each key/value head serves N / K query heads."""
    group = q.shape[1] // k.shape[1]
    ago = np.arange(T)[:, None] - np.arange(T)
    out = []
    for n in range(q.shape[1]):
        scores = q[:, n] @ k[:, n // group].T * (q.shape[-1] ** -0.5 if scale is None else scale)
        scores = scores if cap is None else cap * np.tanh(scores / cap)
        weights = np.exp(np.where((ago >= 0) & (ago < window), scores, -np.inf))
        total = weights.sum(axis=-1, keepdims=True) + (0 if sinks is None else np.exp(sinks[n]))
        out.append(weights / total @ v[:, n // group])
    return np.stack(out, axis=1)


def project(x, p, *names):
    return [np.einsum("td,dnh->tnh", x, p[name]) for name in names]


def merge(heads, p):
    return np.einsum("tnh,nhd->td", heads, p["output"])


def gated(x, p, activation):
    return (activation(x @ p["gate"]) * (x @ p["up"])) @ p["down"]


def gpt2(params, ids):
    x = params["embedding"][ids] + params["positions"][:T]
    for i in range(2):
        p = layer(params, i)
        h = layer_norm(x, p["attention_norm"])
        q, k, v = (y + p["attention"][f"{n}_bias"] for n in QKV for y in project(h, p["attention"], n))
        x = x + merge(attend(q, k, v), p["attention"]) + p["attention"]["output_bias"]
        h = gelu_tanh(layer_norm(x, p["mlp_norm"]) @ p["mlp"]["up"] + p["mlp"]["up_bias"])
        x = x + h @ p["mlp"]["down"] + p["mlp"]["down_bias"]
    return layer_norm(x, params["final_norm"]) @ params["embedding"].T


def qwen2(params, ids):
    x = params["embedding"][ids]
    for i in range(2):
        p = layer(params, i)
        h = rms(x, p["attention_norm"]["scale"])
        q, k, v = (y + p["attention"][f"{n}_bias"] for n in QKV for y in project(h, p["attention"], n))
        x = x + merge(attend(rotate(q), rotate(k), v), p["attention"])
        x = x + gated(rms(x, p["mlp_norm"]["scale"]), p["mlp"], silu)
    return rms(x, params["final_norm"]["scale"]) @ params["embedding"].T


def olmo2(params, ids):
    """arXiv:2501.00656, section 2: h = x + RMSNorm(Attention(x)), out = h + RMSNorm(MLP(h)); q and k normed before the split."""
    x = params["embedding"][ids]
    for i in range(2):
        p = layer(params, i)
        q, k, v = project(x, p["attention"], *QKV)
        whole = lambda y, scale: rms(y.reshape(T, -1), scale.reshape(-1)).reshape(y.shape)
        q, k = whole(q, p["attention"]["query_scale"]), whole(k, p["attention"]["key_scale"])
        x = x + rms(merge(attend(rotate(q), rotate(k), v), p["attention"]), p["attention_post_norm"]["scale"])
        x = x + rms(gated(x, p["mlp"], silu), p["mlp_post_norm"]["scale"])
    return rms(x, params["final_norm"]["scale"]) @ params["unembedding"]


def gemma2(params, ids):
    """arXiv:2408.00118: norms before and after each sub-layer, scales stored as their distance from 1, windows in even layers."""
    x = params["embedding"][ids] * np.sqrt(16)
    for i in range(2):
        p = layer(params, i)
        norm = lambda y, name: rms(y, 1 + p[name]["scale"])
        q, k, v = project(norm(x, "attention_norm"), p["attention"], *QKV)
        heads = attend(rotate(q), rotate(k), v, scale=0.3, window=(4, T)[i % 2], cap=2.0)
        x = x + norm(merge(heads, p["attention"]), "attention_post_norm")
        x = x + norm(gated(norm(x, "mlp_norm"), p["mlp"], gelu_tanh), "mlp_post_norm")
    return 5 * np.tanh(rms(x, 1 + params["final_norm"]["scale"]) @ params["embedding"].T / 5)


def gemma3(params, ids):
    """arXiv:2503.19786: Gemma 2's norms, QK-norm for its soft-caps, a global layer after every two local ones, two rotations."""
    x = params["embedding"][ids] * np.sqrt(16)
    for i in range(5):
        p = layer(params, i)
        norm = lambda y, name: rms(y, 1 + p[name]["scale"])
        q, k, v = project(norm(x, "attention_norm"), p["attention"], *QKV)
        q, k = rms(q, 1 + p["attention"]["query_scale"]), rms(k, 1 + p["attention"]["key_scale"])
        turn = (lambda y: rotate(y, 1e6, slower=8)) if i % 3 == 2 else (lambda y: rotate(y, 100.0))
        heads = attend(turn(q), turn(k), v, scale=0.3, window=T if i % 3 == 2 else 4)
        x = x + norm(merge(heads, p["attention"]), "attention_post_norm")
        x = x + norm(gated(norm(x, "mlp_norm"), p["mlp"], gelu_tanh), "mlp_post_norm")
    return rms(x, 1 + params["final_norm"]["scale"]) @ params["embedding"].T


def mixture(x, p, k, score, normalise=True):
    """Token by token, expert by expert."""
    out = []
    for token in x:
        scores = score(token @ p["router"])
        chosen = np.argsort(-(scores + p.get("balance", 0)))[:k]
        shares = scores[chosen] / (scores[chosen].sum() if normalise else 1)
        out.append(
            sum(s * gated(token, {n: p[n][e] for n in ("gate", "up", "down")}, silu) for s, e in zip(shares, chosen, strict=True))
        )
    return np.stack(out) + (gated(x, p["shared"], silu) if "shared" in p else 0)


def softmax(x):
    return np.exp(x - x.max()) / np.exp(x - x.max()).sum()


def mixtral(params, ids):
    """arXiv:2401.04088: a Llama whose feed-forward is Softmax(TopK(x W_g)) of eight experts."""
    x = params["embedding"][ids]
    for i in range(2):
        p = layer(params, i)
        q, k, v = project(rms(x, p["attention_norm"]["scale"]), p["attention"], *QKV)
        x = x + merge(attend(rotate(q), rotate(k), v), p["attention"])
        x = x + mixture(rms(x, p["mlp_norm"]["scale"]), p["moe"], 2, softmax)
    return rms(x, params["final_norm"]["scale"]) @ params["unembedding"]


def qwen_moe(params, ids):
    """arXiv:2505.09388 with norm_topk_prob=false, and experts in every second layer (decoder_sparse_step=2)."""
    x = params["embedding"][ids]
    for i in range(3):
        p = layer(params, i)
        q, k, v = project(rms(x, p["attention_norm"]["scale"]), p["attention"], *QKV)
        q, k = rms(q, p["attention"]["query_scale"]), rms(k, p["attention"]["key_scale"])
        x = x + merge(attend(rotate(q), rotate(k), v), p["attention"])
        h = rms(x, p["mlp_norm"]["scale"])
        x = x + (mixture(h, p["moe"], 3, softmax, normalise=False) if i == 1 else gated(h, p["mlp"], silu))
    return rms(x, params["final_norm"]["scale"]) @ params["unembedding"]


def deepseek(params, ids):
    """The feed-forward of arXiv:2412.19437, section 2.1.2: sigmoid scores, a bias in the choice, shared experts."""
    x = params["embedding"][ids]
    for i in range(2):
        p = layer(params, i)
        q, k, v = project(rms(x, p["attention_norm"]["scale"]), p["attention"], *QKV)
        x = x + merge(attend(rotate(q), rotate(k), v), p["attention"])
        x = x + mixture(rms(x, p["mlp_norm"]["scale"]), p["moe"], 2, lambda z: 1 / (1 + np.exp(-z)))
    return rms(x, params["final_norm"]["scale"]) @ params["unembedding"]


def mistral(params, ids):
    """arXiv:2310.06825: a Llama whose tokens see the last three, themselves included."""
    x = params["embedding"][ids]
    for i in range(2):
        p = layer(params, i)
        q, k, v = project(rms(x, p["attention_norm"]["scale"]), p["attention"], *QKV)
        x = x + merge(attend(rotate(q), rotate(k), v, window=3), p["attention"])
        x = x + gated(rms(x, p["mlp_norm"]["scale"]), p["mlp"], silu)
    return rms(x, params["final_norm"]["scale"]) @ params["unembedding"]


def gpt_oss(params, ids):
    """The attention of arXiv:2508.10925 (biases, sinks, windows in even layers), with a dense feed-forward."""
    x = params["embedding"][ids]
    for i in range(4):
        p = layer(params, i)
        h = rms(x, p["attention_norm"]["scale"])
        q, k, v = (y + p["attention"][f"{n}_bias"] for n in QKV for y in project(h, p["attention"], n))
        heads = attend(rotate(q), rotate(k), v, window=(4, T)[i % 2], sinks=p["attention"]["sinks"])
        x = x + merge(heads, p["attention"]) + p["attention"]["output_bias"]
        h, m = rms(x, p["mlp_norm"]["scale"]), p["mlp"]
        x = x + (silu(h @ m["gate"] + m["gate_bias"]) * (h @ m["up"] + m["up_bias"])) @ m["down"] + m["down_bias"]
    return rms(x, params["final_norm"]["scale"]) @ params["unembedding"]


def speedrun(params, ids):
    """modded-nanogpt's lambdas and value embeddings (first and last layer share a table), in a block with QK-norm."""
    x = start = params["embedding"][ids]
    for i in range(3):
        p = layer(params, i)
        x = p["residual_mix"][0] * x + p["residual_mix"][1] * start
        q, k, v = project(rms(x, p["attention_norm"]["scale"]), p["attention"], *QKV)
        q, k = rms(q, p["attention"]["query_scale"]), rms(k, p["attention"]["key_scale"])
        v = p["attention"]["value_mix"][0] * v
        if i in (0, 2):
            v = v + p["attention"]["value_mix"][1] * params["value_embedding_0"][ids]
        x = x + merge(attend(rotate(q), rotate(k), v), p["attention"])
        x = x + np.maximum(rms(x, p["mlp_norm"]["scale"]) @ p["mlp"]["up"], 0) ** 2 @ p["mlp"]["down"]
    return rms(x, params["final_norm"]["scale"]) @ params["unembedding"]


QKV = ("query", "key", "value")
FAMILIES = {
    "gpt2": (GPT2, gpt2),
    "qwen2": (QWEN2, qwen2),
    "olmo2": (OLMO2, olmo2),
    "gemma2": (GEMMA2, gemma2),
    "gemma3": (GEMMA3, gemma3),
    "mistral": (MISTRAL, mistral),
    "mixtral": (MIXTRAL, mixtral),
    "qwen_moe": (QWEN_MOE, qwen_moe),
    "deepseek_moe": (DEEPSEEK, deepseek),
    "gpt_oss": (GPT_OSS, gpt_oss),
    "speedrun": (SPEEDRUN, speedrun),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_familys(run, family):
    config, reference = FAMILIES[family]
    params, tokens, logits, _ = run(config)
    wanted = np.stack([reference(params, ids) for ids in tokens])
    assert np.max(np.abs(np.asarray(logits) - wanted)) <= 1e-5 * np.max(np.abs(wanted))
