"""Generation speed of a model on this machine: random prompts, greedy, all ids alike."""

import statistics
import time

import jax
import numpy as np

from gpt4o_jax.data.tokenizer import Symbols
from gpt4o_jax.model.gpt import GPT
from gpt4o_jax.sampling.generate import generate
from gpt4o_jax.sampling.logits import Sampling


def measure(model: GPT, params, batch: int, prompt_tokens: int, new_tokens: int, repeats: int) -> dict:
    """Times `repeats` calls of generate() after one that compiles, and as many with one new token, for the prompts alone.

    Needs an active mesh. Returns new tokens/s of the whole batch (median, prompts included) and of decoding alone (None if within
    the noise: a call took no longer than the slowest with one new token), prompt tokens/s, seconds per call (median, fastest,
    slowest), and the bytes of the parameters, all of which are read for every decoded token (except most of an input embedding
    that is not also the output head).
    """
    prompts = np.random.default_rng(0).integers(0, model.config.vocab_size, (batch, prompt_tokens)).tolist()

    def seconds(n: int) -> list[float]:
        times = []
        for _ in range(repeats + 1):
            begin = time.perf_counter()
            generate(model, params, prompts, n, Sampling(temperature=0.0), symbols=Symbols(eos=(), control=frozenset()))
            times.append(time.perf_counter() - begin)
        return times[1:]

    whole, alone = seconds(new_tokens), seconds(1)
    median, first = statistics.median(whole), statistics.median(alone)
    told = min(whole) > max(alone)  # else the difference is noise
    return {
        "tokens_per_second": batch * new_tokens / median,
        "decode_tokens_per_second": batch * (new_tokens - 1) / (median - first) if told else None,
        "prompt_tokens_per_second": batch * prompt_tokens / first,
        "seconds": {"median": median, "fastest": min(whole), "slowest": max(whole)},
        "weight_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
    }
