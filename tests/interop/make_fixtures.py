"""Small random models of transformers and what they compute. Needs requirements-peers.txt; the tests read the files it writes.

python tests/interop/make_fixtures.py make FOLDER SEED [NAME...]    one model per case of cases.py, with its expected.npz
python tests/interop/make_fixtures.py score FOLDER...               loads each strictly and writes its logits to scored.npy

The committed fixtures: make tests/interop/fixtures 0
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))
from cases import CASES

T, SHORT, PROMPT, NEW = 512, 300, 8, 64
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of the stored tensors, in turn; computation is always in float32
KEPT = slice(15, None, 16)  # the positions whose logits are kept, so that files stay small


def make(name: str, folder: Path, seed: int) -> None:
    """Saves a model with random weights of visible size, its logits on rows of 512 and 300 tokens, and 64 greedy tokens."""
    kind, arguments = CASES[name]
    dtype = DTYPES[list(CASES).index(name) % 3]
    torch.manual_seed(seed)
    config = getattr(transformers, kind)(**{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0} | arguments)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            noise = torch.randn_like(p)
            p.copy_(p + 0.2 * noise if p.ndim == 1 else noise * p.shape[-1] ** -0.5 * (4 if "embed" in key else 1))
            p.copy_(p.to(dtype))
    tokens = torch.randint(config.vocab_size, (2, T))
    tokens[1, SHORT:] = 0
    prompt = torch.randint(config.vocab_size, (1, PROMPT))
    continued = _greedy(model, prompt)
    kept = _logits(model, tokens)[:, KEPT]
    shutil.rmtree(folder, ignore_errors=True)
    model.to(dtype).save_pretrained(folder)  # last, because this also rounds the rotary frequencies
    (folder / "generation_config.json").unlink()
    np.savez_compressed(folder / "expected.npz", tokens=tokens.to(torch.uint8), logits=kept, greedy=continued)


def _logits(model, tokens) -> np.ndarray:
    mask = torch.ones_like(tokens)
    mask[1, SHORT:] = 0
    with torch.no_grad():
        return model(input_ids=tokens, attention_mask=mask).logits.float().numpy()


def _greedy(model, ids) -> np.ndarray:
    """The prompt and its greedy continuation, through the cache, past any end token."""
    cache, new = None, ids
    with torch.no_grad():
        for _ in range(NEW):
            out = model(input_ids=new, past_key_values=cache, use_cache=True)
            cache, new = out.past_key_values, out.logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, new], dim=1)
    return ids[0].to(torch.uint8).numpy()


def score(folder: Path) -> None:
    """Raises if transformers finds a tensor of the folder missing or unexpected."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    model, info = load(folder, output_loading_info=True, attn_implementation="eager")
    wrong = {k: list(v) for k, v in info.items() if v}
    if wrong:
        raise SystemExit(f"{folder}: {json.dumps(wrong, default=str)}")
    tokens = torch.from_numpy(np.load(folder / "tokens.npy").astype(np.int64))
    np.save(folder / "scored.npy", _logits(model.eval().float(), tokens)[:, KEPT])


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    action, *rest = sys.argv[1:]
    if action == "make":
        for number, case in enumerate(CASES):
            if not rest[2:] or case in rest[2:]:
                make(case, Path(rest[0]) / case, 1000 * int(rest[1]) + number)
    else:
        for path in rest:
            score(Path(path))
