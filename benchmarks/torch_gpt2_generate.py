"""The peer of `benchmark generate`: transformers' generate() with GPT2LMHeadModel on torch. Needs requirements-peers.txt.

python benchmarks/torch_gpt2_generate.py LAYERS HEADS WIDTH VOCABULARY B PROMPT NEW REPEATS MODE       prints one JSON object

MODE: float32 or bfloat16, with -static for a cache of fixed size. Random weights and prompts, greedy.
"""

import json
import statistics
import sys
import time

import torch
from transformers import GPT2Config, GPT2LMHeadModel

layers, heads, width, vocabulary, batch, prompt, new, repeats = map(int, sys.argv[1:9])
dtype, _, static = sys.argv[9].partition("-")
torch.manual_seed(0)
config = GPT2Config(
    vocab_size=vocabulary, n_positions=1024, n_embd=width, n_layer=layers, n_head=heads, bos_token_id=0, eos_token_id=None,
    pad_token_id=0,
)  # fmt: skip
model = GPT2LMHeadModel(config).eval().to(getattr(torch, dtype))
tokens = torch.randint(1, vocabulary, (batch, prompt))
how = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, attention_mask=torch.ones_like(tokens))
if static:
    how["cache_implementation"] = "static"

seconds = []
with torch.inference_mode():
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        out = model.generate(tokens, **how)
        seconds.append(time.perf_counter() - begin)
assert out.shape == (batch, prompt + new)
print(json.dumps({"tokens_per_second": batch * new / statistics.median(seconds[1:]), "torch": torch.__version__}))
