"""The peer of `benchmark train`: transformers' GPT2LMHeadModel trained on random tokens with torch. Needs requirements-peers.txt.

python benchmarks/torch_gpt2.py LAYERS HEADS WIDTH T B VOCABULARY STEPS MODE       prints one JSON object

MODE: float32 or bfloat16 (autocast), with -compiled for torch.compile. AdamW is torch's fused one, the gradient is
clipped to norm 1, as in our step.
"""

import json
import resource
import statistics
import sys
import time

import torch
from transformers import GPT2Config, GPT2LMHeadModel

layers, heads, width, T, B, vocabulary, steps = map(int, sys.argv[1:8])
dtype, _, compiled = sys.argv[8].partition("-")
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
config = GPT2Config(
    vocab_size=vocabulary,
    n_positions=T,
    n_embd=width,
    n_layer=layers,
    n_head=heads,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    bos_token_id=0,
    eos_token_id=0,
    use_cache=False,
)
model = GPT2LMHeadModel(config).to(device).train()
call = torch.compile(model) if compiled else model
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
tokens = torch.randint(vocabulary, (B, T), device=device)

seconds = []
for _ in range(steps + 1):
    begin = time.perf_counter()
    with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
        loss = call(input_ids=tokens, labels=tokens).loss
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    loss.item()  # waits
    seconds.append(time.perf_counter() - begin)

memory = torch.cuda.max_memory_allocated() if device == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(
    json.dumps(
        {
            "tokens_per_second": B * T / statistics.median(seconds[1:]),
            "first_step_seconds": seconds[0],
            "step_seconds": {"median": statistics.median(seconds[1:]), "fastest": min(seconds[1:]), "slowest": max(seconds[1:])},
            "peak_bytes": memory,
            "torch": torch.__version__,
        }
    )
)
