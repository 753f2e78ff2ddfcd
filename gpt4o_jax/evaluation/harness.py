"""Tasks of the Language Model Evaluation Harness (lm-eval, arXiv:2405.14782), answered by a run.

lm-eval 0.4 is imported only if one of its tasks is asked for, and needs no torch for that; the three methods it calls accept
anything with `.args`.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path

from gpt4o_jax.errors import RunError, data_error, did_you_mean
from gpt4o_jax.evaluation.continuations import encode_pair, rolling, score
from gpt4o_jax.run import Run
from gpt4o_jax.sampling.logits import Sampling
from gpt4o_jax.sampling.text import complete

MAX_GEN_TOKS = 256  # lm-eval's own default


class Harness:
    """A run as a model for lm-eval. Use it under `with jax.set_mesh(run.mesh):`."""

    def __init__(self, run: Run, batch_size: int = 16):
        self.run, self.batch_size = run, batch_size
        self._batches = 0  # generated so far: each has its own seed

    def loglikelihood(self, requests: Sequence, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """args (context, continuation) -> (log-probability of the continuation, whether greedy decoding gives it)."""
        pairs = [encode_pair(self.run.tokenizer, *r.args) for r in requests]
        return score(self.run.model, self.run.params, pairs, self.batch_size)

    def loglikelihood_rolling(self, requests: Sequence, disable_tqdm: bool = False) -> list[float]:
        """args (text,) -> its log-probability from the first token on, each token counted once."""
        tokenizer, T = self.run.tokenizer, self.run.model.config.context_length
        windows = [rolling(tokenizer.encode(text), tokenizer.symbols.bos, T) for (text,) in (r.args for r in requests)]
        logprobs = iter(score(self.run.model, self.run.params, [pair for w in windows for pair in w], self.batch_size))
        return [sum(next(logprobs)[0] for _ in w) for w in windows]

    def generate_until(self, requests: Sequence, disable_tqdm: bool = False) -> list[str]:
        """args (context, settings) -> the generated continuation, up to the first of settings["until"]."""
        results = [""] * len(requests)
        lengths = [len(self.run.tokenizer.prompt(r.args[0])) for r in requests]
        groups: dict[str, list[int]] = {}
        for i in sorted(range(len(requests)), key=lambda i: -lengths[i]):
            groups.setdefault(repr(sorted(requests[i].args[1].items())), []).append(i)
        for members in groups.values():
            settings = _settings(requests[members[0]].args[1])
            for begin in range(0, len(members), self.batch_size):
                batch = members[begin : begin + self.batch_size]
                for i, text in zip(batch, self._generate([requests[i].args[0] for i in batch], *settings), strict=True):
                    results[i] = text
        return results

    def _generate(self, contexts: list[str], until: list[str], max_new_tokens: int, sampling: Sampling) -> list[str]:
        run = self.run
        room = run.model.config.context_length - max_new_tokens
        if room < 1:
            raise RunError(
                f"a task wants {max_new_tokens} new tokens, but model.context_length={run.model.config.context_length} holds"
                " them and the question together; nearest: a task with generation_kwargs.max_gen_toks below that"
            )
        prompts = [run.tokenizer.prompt(c)[-room:] for c in contexts]
        prompts += [prompts[-1]] * (self.batch_size - len(prompts))  # one shape, one compilation
        seed = (run.config.seed + self._batches) % 2**31
        self._batches += 1
        done = complete(run.model, run.params, run.tokenizer, prompts, max_new_tokens, sampling, seed, until)
        # Without the space that SentencePiece puts before a first word, as in transformers' decoder.
        return [text.removeprefix(run.tokenizer.prefix.decode()) for text, _ in done[: len(contexts)]]


def _settings(given: dict) -> tuple[list[str], int, Sampling]:
    """(stop strings, most new tokens, sampling) from transformers' names of settings. Raises RunError for an unknown one."""
    left = dict(given)
    until = left.pop("until", None) or []
    until = [until] if isinstance(until, str) else list(until)
    lengths = [left.pop(name) for name in ("max_gen_toks", "max_new_tokens", "max_tokens") if name in left]
    temperature = float(left.pop("temperature", 1.0))
    drawn = left.pop("do_sample", temperature > 0 and "temperature" in given) and temperature > 0
    known = {"top_p": float(left.pop("top_p", 1.0)), "top_k": int(left.pop("top_k", 0)), "min_p": float(left.pop("min_p", 0.0))}
    if left:
        name = next(iter(left))
        raise RunError(
            f"a task sets generation_kwargs.{name}={left[name]!r}, which is not known here; expected until, max_gen_toks,"
            " do_sample, temperature, top_k, top_p or min_p"
        )
    sampling = Sampling(temperature=temperature, **known) if drawn else Sampling(temperature=0.0)
    return until, int(lengths[0]) if lengths else MAX_GEN_TOKS, sampling


def find(tasks: Sequence[str], task_dir: str = "", known: Sequence[str] = ()):
    """lm-eval's TaskManager, which knows all of `tasks`.

    task_dir: folder of task YAML files; with one, lm-eval works offline. known: names of our own tasks, for messages.
    Raises RunError if lm-eval is not installed, or a task or the folder does not exist.
    """
    if task_dir:
        task_dir = os.path.expanduser(task_dir)
        if not Path(task_dir).is_dir():
            raise RunError(f"--task_dir={task_dir}: no such folder; expected one with task YAML files")
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as e:
        meant = "".join(f"; {name}{near}" for name in tasks if (near := did_you_mean(name, known)))
        hint = f"{meant}; without it there are {', '.join(known)}" if known else ""
        raise RunError(f"--tasks={','.join(tasks)} needs lm-eval ({e}): pip install -r requirements-eval.txt{hint}") from None
    manager = TaskManager(include_path=task_dir or None)
    for name in tasks:
        if name not in manager.all_tasks:
            hint = did_you_mean(name, [*known, *manager.all_tasks])
            raise data_error(f"--tasks: lm-eval has no task {name!r}{hint}; see --task_dir, or take one of {', '.join(known)}")
    return manager


def evaluate(run: Run, tasks: Sequence[str], manager, shots: int | None = None, limit: int | None = None) -> dict:
    """Runs tasks with the manager from `find`; returns {task: {metric: value}}. Needs an active mesh.

    shots: solved examples per question; None: each task's default. limit: questions per task; None: all.
    """
    import lm_eval
    from lm_eval.api.model import LM

    class Model(Harness, LM):
        def __init__(self, run: Run, batch_size: int):
            LM.__init__(self)
            Harness.__init__(self, run, batch_size)

    model = Model(run, run.config.eval.batch_size)
    found = lm_eval.simple_evaluate(
        model=model, tasks=list(tasks), num_fewshot=shots, limit=limit, task_manager=manager, bootstrap_iters=0, log_samples=False
    )
    return {name: _metrics(values) for name, values in found["results"].items()}


def _metrics(values: dict) -> dict[str, float]:
    """lm-eval's numbers: "acc,none" (no filter) becomes "acc", and those that could not be computed are left out."""
    numbers = {k: v for k, v in values.items() if isinstance(v, int | float) and not math.isnan(v)}
    return {k.removesuffix(",none"): float(v) for k, v in numbers.items()}
