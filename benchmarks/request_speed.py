"""Speed of continuous batching and of speculative decoding, each interleaved with the plain way in one process.

python benchmarks/request_speed.py batching LAYERS HEADS WIDTH VOCABULARY ROWS REQUESTS MEAN WEIGHTS ROUNDS
python benchmarks/request_speed.py speculation RUN ROUNDS                              each prints one JSON object
"""

import dataclasses
import functools
import itertools
import json
import random
import statistics
import sys
import time
from pathlib import Path

from training_speed import _last_line as last_line

GPT2_124M, ROWS, REQUESTS, MEAN, WEIGHTS, ROUNDS = (12, 12, 768, 50257), 8, 64, 64, "bfloat16", 3
LONGEST = 384  # new tokens of a request, which with its prompt of at most 128 fill 512
PHRASES, TRAINING = 4000, {  # a model that learns to copy, in about a minute
    "model.n_layers": 2, "model.scan_unroll": 2, "model.d_model": 128, "model.n_heads": 2, "model.context_length": 256,
    "tokenizer.vocab_size": 1024, "data.source": "text", "data.separator": "\n", "data.shingle_bytes": 0,
    "train.batch_size": 8, "train.length": "600 steps", "train.steps_per_dispatch": 10, "optimizer.name": "muon",
    "optimizer.peak_lr": 3e-3, "eval.every": 0, "sample.every": 0, "checkpoint.every": 0, "log.tensorboard": False,
}  # fmt: skip
PROMPTS, NEW, DRAFT = 4, 192, 4  # texts to continue; new tokens of each; tokens per draft


# ---------------------------------------------------------------- what measure.py calls: name -> (value, details)


def measure_batching(folder: Path) -> dict:
    result = _in_process("batching", *GPT2_124M, ROWS, REQUESTS, MEAN, WEIGHTS, ROUNDS)
    return {"continuous_over_static": (result["gain"], result)}


def measure_speculation(folder: Path, training: dict = TRAINING) -> dict:
    """Trains a small model on repeated phrases, then times it on repeated phrases that it has not seen."""
    corpus, run = folder / "phrases.txt", folder / "run"
    corpus.write_text("\n".join(_repeated(phrase, 120) for phrase in itertools.islice(_phrases(0), PHRASES)))
    flags = [f"--config.{name}={value}" for name, value in (training | {"data.path": corpus}).items()]
    trained = last_line([sys.executable, "-m", "gpt4o_jax", "train", "--config=configs/base.py", f"--workdir={run}", *flags])
    result = _in_process("speculation", run, ROUNDS) | {"loss": trained["loss"], "parameters": trained["parameters"]}
    assert result["same_text"], result
    return {"speculation_gain": (result["gain"], result)}


def _in_process(*args) -> dict:
    return last_line([sys.executable, "benchmarks/request_speed.py", *map(str, args)])


def _phrases(seed: int):
    """An endless stream of phrases of 6 to 16 words, from a vocabulary of 64."""
    draw = random.Random(seed)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    words = ["".join(random.Random(i).sample(syllables, 2)) for i in range(64)]
    while True:
        yield " ".join(draw.choices(words, k=draw.randint(6, 16)))


def _repeated(phrase: str, words: int) -> str:
    return " ".join(itertools.islice(itertools.cycle(phrase.split()), words))


# ---------------------------------------------------------------- the processes


def _in_turns(ways: dict, rounds: int) -> tuple[dict, dict]:
    """(median seconds, last result) of each way; the first round compiles and is not counted."""
    seconds, results = {name: [] for name in ways}, {}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            begin = time.perf_counter()
            results[name] = way()
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}, results


def batching(layers: int, heads: int, width: int, vocabulary: int, rows: int, n: int, mean: int, weights: str, rounds: int):
    """The same requests in batches of `rows` in order of arrival, each run until its longest request ends, and in the engine."""
    import jax
    import numpy as np

    from gpt4o_jax import parallel
    from gpt4o_jax.data.tokenizer import Symbols
    from gpt4o_jax.model import families, gpt
    from gpt4o_jax.model.quantization import for_generation
    from gpt4o_jax.ops.compute import Compute, resolve_dtype
    from gpt4o_jax.sampling.engine import Engine
    from gpt4o_jax.sampling.generate import generate
    from gpt4o_jax.sampling.logits import Sampling

    draw, greedy, symbols = np.random.default_rng(0), Sampling(temperature=0.0), Symbols(eos=())
    prompts = [draw.integers(0, vocabulary, length).tolist() for length in draw.integers(16, 129, n)]
    new = np.clip(np.ceil(draw.exponential(mean, n)), 1, LONGEST).astype(int).tolist()
    config = dataclasses.replace(
        families.GPT2["124m"], n_layers=layers, n_heads=heads, d_model=width, vocab_size=vocabulary, context_length=512
    )
    mesh = parallel.make_mesh()
    model = gpt.GPT(config, Compute.on(mesh, resolve_dtype("auto", mesh.devices.flat[0].platform)))

    def static() -> list:
        done = []
        for begin in range(0, n, rows):
            part = slice(begin, begin + rows)
            ended = lambda row, ids, most=new[part]: most[row] if len(ids) >= most[row] else None
            done += generate(model, params, prompts[part], max(new[part]), greedy, should_stop=ended, symbols=symbols)
        return [c.ids for c in done]

    def continuous() -> list:
        engine = Engine(model, params, rows, symbols=symbols)
        requests = [engine.submit(p, most, greedy) for p, most in zip(prompts, new, strict=True)]
        engine.run()
        return [r.completion.ids for r in requests]

    with jax.set_mesh(mesh):
        params = jax.jit(functools.partial(gpt.init, model))(jax.random.key(0))
        model, params = for_generation(model, params, weights, rows=rows)
        seconds, ids = _in_turns({"static": static, "continuous": continuous}, rounds)
    return {
        "gain": seconds["static"] / seconds["continuous"],
        "tokens_per_second": {name: sum(new) / s for name, s in seconds.items()},
        "seconds": seconds,
        "new_tokens": sum(new),
        "longest": max(new),
        "requests_with_the_same_tokens": sum(a == b for a, b in zip(*ids.values(), strict=True)),
    }


def speculation(run_folder: str, rounds: int):
    """A run's greedy continuation of phrases that are new to it, with and without n-gram drafts."""
    import jax

    from gpt4o_jax.run import open_run
    from gpt4o_jax.sampling.generate import generate
    from gpt4o_jax.sampling.logits import Sampling
    from gpt4o_jax.sampling.speculative import Draft

    run, greedy = open_run(run_folder), Sampling(temperature=0.0)
    symbols = dataclasses.replace(run.tokenizer.symbols, eos=())
    phrases = list(itertools.islice(_phrases(1), PROMPTS))
    beginnings = [_repeated(phrase, 5 * len(phrase.split()) // 2) for phrase in phrases]

    def write(draft: Draft | None) -> list:
        size = run.tokenizer.vocab_size
        how = dict(vocab_size=size, symbols=symbols, draft=draft)
        return [generate(run.model, run.params, [run.tokenizer.prompt(b)], NEW, greedy, **how)[0] for b in beginnings]

    with jax.set_mesh(run.mesh):
        seconds, texts = _in_turns({"plain": lambda: write(None), "drafted": lambda: write(Draft(DRAFT))}, rounds)
    wanted = [_repeated(p, 1000)[len(b) :] for p, b in zip(phrases, beginnings, strict=True)]
    written = [run.tokenizer.decode(c.ids) for c in texts["plain"]]
    same = lambda pair: pair[0] == pair[1]
    right = [sum(1 for _ in itertools.takewhile(same, zip(*pair, strict=False))) for pair in zip(wanted, written, strict=True)]
    return {
        "gain": seconds["plain"] / seconds["drafted"],
        "tokens_per_second": {name: PROMPTS * NEW / s for name, s in seconds.items()},
        "tokens_per_pass": sum(len(c.ids) for c in texts["drafted"]) / sum(c.passes for c in texts["drafted"]),
        "same_text": [c.ids for c in texts["plain"]] == [c.ids for c in texts["drafted"]],
        "copied": sum(right) / sum(map(len, written)),
    }


if __name__ == "__main__":
    arguments = [int(a) if a.isdecimal() else a for a in sys.argv[2:]]
    print(json.dumps({"batching": batching, "speculation": speculation}[sys.argv[1]](*arguments)))
