"""The decoder equals an independent plain transcription of the published formulas, in NumPy and float64.

B batch, T positions, D model width, N query heads, K key/value heads, H head width, F MLP width, V vocabulary, L layers
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt4o_jax.config import ModelConfig
from gpt4o_jax.ops.attention import attention
from gpt4o_jax.ops.compute import Compute

B, T = 2, 9  # of the fixture `run`
FLOAT32 = Compute("cpu", "float32")
GPT2 = ModelConfig(
    vocab_size=40, context_length=12, n_layers=2, d_model=16, n_heads=4,
    mlp="gelu", norm="layer", norm_eps=1e-5, positions="learned", qk_norm=False, bias=True, tied=True,
)  # fmt: skip
QWEN = ModelConfig(
    vocab_size=40, context_length=12, n_layers=2, d_model=16, n_heads=4, n_kv_heads=2, head_dim=6, d_ff=28,
    mlp="swiglu", norm="rms", positions="rope", rope_theta=500.0, qk_norm=True, bias=False, tied=False,
)  # fmt: skip
# Only part of a head is rotated (GPT-NeoX, arXiv:2204.06745, 2.1); the base grows with the factor (arXiv:2309.00071, def. 1).
PARTIAL = dataclasses.replace(QWEN, head_dim=8, rope_fraction=0.5)
NTK = dataclasses.replace(QWEN, rope_scaling="ntk", rope_factor=4.0)
BOTH = dataclasses.replace(PARTIAL, rope_scaling="ntk", rope_factor=4.0)
ARTICLE = dataclasses.replace(GPT2, d_model=32, n_heads=8, mlp="relu", n_layers=1)


def layer(params, i):
    return jax.tree.map(lambda x: x[i], params["layers"])


def close(got, wanted):
    assert np.max(np.abs(np.asarray(got) - wanted)) <= 1e-5 * np.max(np.abs(wanted))


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


# ---------------------------------------------------------------- GPT-2 (Radford et al. 2019)


def gpt2(params, tokens, c):
    def layer_norm(x, p):
        mean, variance = x.mean(axis=-1, keepdims=True), x.var(axis=-1, keepdims=True)
        return (x - mean) / np.sqrt(variance + c.norm_eps) * p["scale"] + p["bias"]

    def self_attention(x, p):
        heads = []
        for n in range(c.n_heads):
            q, k, v = (x @ p[name][:, n] + p[name + "_bias"][n] for name in ("query", "key", "value"))
            scores = q @ k.T / np.sqrt(q.shape[-1])
            heads.append(softmax(np.where(np.tri(T, dtype=bool), scores, -np.inf)) @ v)
        return np.concatenate(heads, axis=-1) @ p["output"].reshape(-1, x.shape[-1]) + p["output_bias"]

    gelu = np.vectorize(lambda u: u * 0.5 * (1 + math.erf(u / math.sqrt(2))))
    logits = []
    for ids in tokens:
        x = params["embedding"][ids] + params["positions"][:T]
        for i in range(c.n_layers):
            p = layer(params, i)
            x = x + self_attention(layer_norm(x, p["attention_norm"]), p["attention"])
            h = gelu(layer_norm(x, p["mlp_norm"]) @ p["mlp"]["up"] + p["mlp"]["up_bias"])
            x = x + h @ p["mlp"]["down"] + p["mlp"]["down_bias"]
        logits.append(layer_norm(x, params["final_norm"]) @ params["embedding"].T)
    return np.stack(logits)


def test_gpt2_like(run):
    params, tokens, logits, _ = run(GPT2)
    close(logits, gpt2(params, tokens, GPT2))


# ---------------------------------------------------------------- Llama and Qwen 3 (arXiv:2302.13971, arXiv:2505.09388)


def qwen(params, tokens, c):
    def rms_norm(x, scale):
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + c.norm_eps) * scale

    def rotate(x):  # [T, H]: pairs (i, i + R/2) of the first R
        R = round(c.head_dim * c.rope_fraction)
        base = c.rope_theta * c.rope_factor ** (R / (R - 2))
        angles = np.arange(T)[:, None] / base ** (2 * np.arange(R // 2) / R)
        pairs = (x[:, : R // 2] + 1j * x[:, R // 2 : R]) * np.exp(1j * angles)
        return np.concatenate([pairs.real, pairs.imag, x[:, R:]], axis=-1)

    def self_attention(x, p):
        heads = []
        for n in range(c.n_heads):
            group = n // (c.n_heads // c.n_kv_heads)
            q = rotate(rms_norm(x @ p["query"][:, n], p["query_scale"]))
            k = rotate(rms_norm(x @ p["key"][:, group], p["key_scale"]))
            scores = np.where(np.tri(T, dtype=bool), q @ k.T / np.sqrt(c.head_dim), -np.inf)
            heads.append(softmax(scores) @ (x @ p["value"][:, group]))
        return sum(head @ p["output"][n] for n, head in enumerate(heads))

    logits = []
    for ids in tokens:
        x = params["embedding"][ids]
        for i in range(c.n_layers):
            p = layer(params, i)
            x = x + self_attention(rms_norm(x, p["attention_norm"]["scale"]), p["attention"])
            h = rms_norm(x, p["mlp_norm"]["scale"])
            gate = h @ p["mlp"]["gate"]
            x = x + (gate / (1 + np.exp(-gate)) * (h @ p["mlp"]["up"])) @ p["mlp"]["down"]
        logits.append(rms_norm(x, params["final_norm"]["scale"]) @ params["unembedding"])
    return np.stack(logits)


@pytest.mark.parametrize("c", [QWEN, PARTIAL, NTK, BOTH], ids=["qwen", "partial", "ntk", "both"])
def test_llama_and_qwen_like(run, c):
    params, tokens, logits, _ = run(c)
    close(logits, qwen(params, tokens, c))


# ---------------------------------------------------------------- Attention Is All You Need (arXiv:1706.03762), 1/16 of its size


def formula_attention(Q, K, V, allowed):
    """softmax(Q K^T / sqrt(d_k)) V for one head; forbidden scores are -inf inside the softmax."""
    return softmax(np.where(allowed, Q @ K.T / np.sqrt(K.shape[-1]), -np.inf)) @ V


def test_article_attention():
    Q, K, V = np.random.default_rng(0).normal(size=(3, T, 4))
    add_axes = lambda x: jnp.asarray(x, jnp.float32)[None, :, None]
    out = attention(add_axes(Q), add_axes(K), add_axes(V), jnp.ones((1, T, T), bool), FLOAT32)[0, :, 0]
    close(out, formula_attention(Q, K, V, True))


def test_article_multi_head(run):
    """MultiHead(Q, K, V) = Concat(head_1, ..., head_h) W^O, head_i = Attention(Q W_i^Q, K W_i^K, V W_i^V), with biases."""
    params, _, _, inside = run(ARTICLE)
    x, y = (inside["layers"][name]["__call__"][0] for name in ("attention_norm", "attention"))
    p = layer(params, 0)["attention"]
    for b in range(B):
        X = np.asarray(x[0, b], np.float64)
        Q, K, V = (np.einsum("TD,DNH->NTH", X, p[n]) + p[f"{n}_bias"][:, None] for n in ("query", "key", "value"))
        heads = [formula_attention(Q[i], K[i], V[i], np.tri(T, dtype=bool)) for i in range(ARTICLE.n_heads)]
        close(y[0][0, b], np.concatenate(heads, axis=-1) @ p["output"].reshape(32, 32) + p["output_bias"])


def test_article_feed_forward(run):
    """FFN(x) = max(0, x W_1 + b_1) W_2 + b_2, the inner width four times the outer."""
    params, _, _, inside = run(ARTICLE)
    x, y = (np.asarray(inside["layers"][name]["__call__"][0][0], np.float64) for name in ("mlp_norm", "mlp"))
    p = layer(params, 0)["mlp"]
    assert p["up"].shape == (32, 128)
    close(y, np.maximum(0, x @ p["up"] + p["up_bias"]) @ p["down"] + p["down_bias"])
