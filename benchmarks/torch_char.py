"""The peer of shakespeare:char_cpu: nanoGPT's recipe for a CPU in plain torch, evaluated like ours. Needs torch.

python benchmarks/torch_char.py TEXT SEED       prints the validation loss over the whole last tenth, in windows of 64

Written from the recipe (config/train_shakespeare_char.py with its README's flags), not from its code.
B batch, T positions, D width, N heads, L layers
"""

import json
import math
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

L, N, D, T, B, STEPS = 4, 4, 128, 64, 12, 2000


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(D, bias=False) for _ in range(2))
        self.qkv, self.up = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, 4 * D, bias=False)
        self.output, self.down = nn.Linear(D, D, bias=False), nn.Linear(4 * D, D, bias=False)

    def forward(self, x):
        rows, length, _ = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(rows, length, 3, N, D // N).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.output(y.transpose(1, 2).reshape(rows, length, D))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class Model(nn.Module):
    def __init__(self, vocabulary):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, D), nn.Embedding(T, D)
        self.blocks, self.norm = nn.ModuleList(Block() for _ in range(L)), nn.LayerNorm(D, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, 0, 0.02 / math.sqrt(2 * L) if "output" in name or "down" in name else 0.02)

    def loss(self, ids, reduction="mean"):
        x = self.tokens(ids[:, :-1]) + self.positions.weight
        for block in self.blocks:
            x = block(x)
        logits = self.norm(x) @ self.tokens.weight.T
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction=reduction)


def main(path, seed):
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    text = Path(path).read_text()
    index = {c: i for i, c in enumerate(sorted(set(text)))}
    ids = torch.tensor([index[c] for c in text])
    training, held = ids[: int(0.9 * len(ids))], ids[int(0.9 * len(ids)) :]
    model = Model(len(index))
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99))
    for step in range(STEPS):
        cosine = 1e-4 + 0.5 * (1 + math.cos(math.pi * (step - 100) / (STEPS - 100))) * 9e-4
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (step + 1) / 101 if step < 100 else cosine
        starts = torch.randint(len(training) - T, (B,))
        loss = model.loss(torch.stack([training[s : s + T + 1] for s in starts]))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        windows = held.unfold(0, T + 1, T)
        total = sum(model.loss(part, "sum").item() for part in windows.split(64))
    print(json.dumps({"loss": total / (len(windows) * T)}))


main(sys.argv[1], int(sys.argv[2]))
