"""Tiny shakespeare by character: nanoGPT's recipes, and a better one with the same token and parameter budget.

char_cpu       exactly the CPU recipe of nanoGPT's README: 0.8 M parameters, 1.5 M tokens
char_cpu_fast  the same budget with RoPE, RMSNorm, QK-norm, squared ReLU, zero-initialised outputs and Muon
char_gpu       nanoGPT's config/train_shakespeare_char.py: 10.7 M parameters, 82 M tokens

Hardware: char_cpu and char_cpu_fast: 2 CPU cores; char_gpu: one GPU.
Time: 2 to 4 minutes for char_cpu and char_cpu_fast on one core of an AMD EPYC; char_gpu: not measured yet.
Expected: loss on the whole validation split, mean of three seeds: char_cpu 1.897, char_cpu_fast 1.550, char_gpu not measured
    yet. nanoGPT: 1.886 for char_cpu, on 20 random batches of one seed, and 1.47 for char_gpu; its char_cpu recipe in torch
    (benchmarks/torch_char.py), evaluated like these: 1.908.
Command: python -m gpt4o_jax train --config=configs/shakespeare.py:char_cpu --workdir=runs/char
    --config.data.path=input.txt        (README.md says where to get the file)
"""

from gpt4o_jax.config import base_config
from gpt4o_jax.errors import RunError, did_you_mean

_GPT2 = dict(positions="learned", norm="layer", norm_eps=1e-5, mlp="gelu", qk_norm=False, tied=True, output_init="scaled")
_MODERN = dict(positions="rope", norm="rms", norm_eps=1e-6, mlp="relu2", qk_norm=True, tied=False, output_init="zero")
_ADAMW = dict(name="adamw", schedule="cosine", peak_lr=1e-3, warmup_steps=100, end_lr_fraction=0.1)
# So few tokens per step need low learning rates and decay over the whole run: before rows were made longer, muon_lr 0.02 decaying
# in the last 40 % gave a loss of 1.62, this 1.56 to 1.57 (tried by hand, not recorded). The narrower feed-forward offsets the
# parameters of the untied head.
# Rows are twice as long and half as many: the same tokens, with more context.
_MUON = dict(name="muon", schedule="wsd", peak_lr=8e-3, muon_lr=8e-3, warmup_steps=20, decay_fraction=1.0)
_MUON |= dict(end_lr_fraction=0.0, weight_decay=0.05)
_FAST = dict(_MODERN, n_heads=8, d_ff=504, context_length=128)
_CPU = dict(n_layers=4, n_heads=4, d_model=128, context_length=64, scan_unroll=4, dropout=0.0)
_GPU = dict(n_layers=6, n_heads=6, d_model=384, context_length=256, scan_unroll=6, dropout=0.2)

# variant: (shape, architecture, optimizer, rows of a batch, length)
VARIANTS = {
    "char_cpu": (_CPU, dict(_GPT2, compute_dtype="float32"), _ADAMW, 12, "2000 steps"),  # as nanoGPT on a CPU
    "char_cpu_fast": (_CPU, _FAST, _MUON, 6, "2000 steps"),
    "char_gpu": (_GPU, _GPT2, _ADAMW, 64, "5000 steps"),
}


def get_config(variant="char_cpu"):
    if variant not in VARIANTS:
        hint = did_you_mean(variant, VARIANTS)
        raise RunError(f"configs/shakespeare.py:{variant}: no such variant{hint}; variants: {', '.join(VARIANTS)}")
    shape, architecture, optimizer, rows, length = VARIANTS[variant]
    c = base_config()
    c.model.update(shape | architecture, bias=False, init_std=0.02)
    c.optimizer.update(dict(b1=0.9, b2=0.99, weight_decay=0.1, decay_mask="matrices", clip_norm=1.0) | optimizer)
    c.train.batch_size, c.train.length = rows, length
    c.tokenizer.kind = "char"
    # The last tenth of the file is held out, and scored in windows without overlap, so that each position counts equally,
    # as in nanoGPT's random windows.
    c.data.update(source="text", holdout="tail", holdout_fraction=0.1, shingle_bytes=0, rows="windows")
    c.eval.stride = c.model.context_length
    return c
