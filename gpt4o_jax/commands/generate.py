"""continues a prompt, streaming the text, or many prompts with continuous batching"""

import json
import sys

from gpt4o_jax.commands import sampling_flags
from gpt4o_jax.commands.flags import TYPED, Flag
from gpt4o_jax.commands.ready_flags import READY, check_ready, ready
from gpt4o_jax.errors import RunError, data_error

FLAGS = (
    Flag("workdir", str, "", "run folder", required=True),
    Flag("prompt", str, "", "text to continue; empty: start a new document", blank=True),
    Flag("prompts", str, "", "file of prompts instead: one per line, or in a .jsonl file one JSON object with a prompt per line"),
    Flag("rows", int, None, "--prompts: batch size; default: 8", low=1, high=1024),
    Flag("step", int, None, "checkpoint step; default: the best, where the run keeps it, else the newest", low=0),
    Flag("max_new_tokens", int, 100, "maximum number of new tokens", low=1),
    *sampling_flags.FLAGS,
    *READY,
    Flag("num_samples", int, 1, "number of continuations of the prompt", low=1, high=1024),
    Flag("seed", int, 0, "same seed, same text", low=0, high=2**31 - 1),
    Flag("stop", list, None, "end before this string; may be given several times"),
    Flag("draft", str, "", "speculative decoding: run folder of a smaller model, or ngram (looks up earlier occurrences)"),
    Flag("draft_tokens", int, None, "tokens that --draft proposes at a time; default: 4", low=1, high=16),
    Flag("beams", int, 0, "beam search with this many beams instead of sampling; 0: sample", low=0, high=1024),
    Flag("length_penalty", float, None, "--beams: score = log-probability / tokens^penalty; default: 1", low=-10.0, high=10.0),
)


def main(flags: dict, overrides: dict[str, str]) -> dict:
    sampling = sampling_flags.sampling("generate", flags)
    _check(flags)
    check_ready("generate", flags)
    prompts = _read_prompts(flags["prompts"]) if flags["prompts"] else None
    import jax

    from gpt4o_jax import run as runs
    from gpt4o_jax.data import conversations

    run = ready(runs.open_run(flags["workdir"], flags["step"]), flags, _rows(flags))
    if conversations.knows_only_published(run.config.data, run.tokenizer):
        print(f"{conversations.UNRENDERED}: a prompt is continued as it stands", file=sys.stderr, flush=True)
    with jax.set_mesh(run.mesh):
        if prompts:
            results = _draw_each(run, flags, sampling, prompts)
            return {"workdir": str(run.workdir), "step": run.step, "prompts": flags["prompts"], "results": results}
        samples = _search(run, flags, sampling.stop_ids) if flags["beams"] else _draw(run, flags, sampling)
    return {"workdir": str(run.workdir), "step": run.step, "prompt": flags["prompt"], "samples": samples}


def _rows(flags: dict) -> int:
    """How many tokens a pass computes."""
    if flags["prompts"]:
        return flags["rows"] or 8
    return max(flags["beams"], flags["num_samples"]) * (1 + _draft_tokens(flags))


def _draft_tokens(flags: dict) -> int:
    return (flags["draft_tokens"] or 4) if flags["draft"] else 0


def _check(flags: dict) -> None:
    """Raises RunError for flags that do nothing together."""
    if flags["draft_tokens"] is not None and not flags["draft"]:
        raise RunError("generate: --draft_tokens needs --draft=RUN_DIR or --draft=ngram")
    if flags["rows"] is not None and not flags["prompts"]:
        raise RunError("generate: --rows needs --prompts=FILE")
    for name in ("prompt", "draft", "beams"):
        if flags["prompts"] and flags[name]:
            raise RunError(f"generate: --{name} and --prompts do not go together; leave one out")
    if not flags["beams"]:
        if flags["length_penalty"] is not None:
            raise RunError("generate: --length_penalty needs --beams, such as --beams=4")
        return
    drawing = [f for f in FLAGS if f in sampling_flags.FLAGS or f.name in ("seed", "stop", "draft")]
    for f in drawing:
        if f.name != "stop_ids" and f.name in flags[TYPED]:
            raise RunError(f"generate: --{f.name} does nothing with --beams, which searches and does not draw; leave one out")
    if flags["num_samples"] > flags["beams"]:
        raise RunError(
            f"generate: --num_samples={flags['num_samples']} is more than --beams={flags['beams']}; nearest:"
            f" --beams={flags['num_samples']}"
        )


def _read_prompts(file: str) -> list[str]:
    """The prompts in a file, at least one; empty lines are skipped. Raises RunError for a bad line or a file without text."""
    from gpt4o_jax.data.sources import read_text
    from gpt4o_jax.paths import local

    prompts = []
    for n, line in enumerate(read_text(local("--prompts", file)).replace("\r\n", "\n").split("\n"), start=1):
        if not line.strip():
            continue
        if file.endswith(".jsonl"):
            try:
                line = json.loads(line)["prompt"]
            except (ValueError, KeyError, TypeError, RecursionError):
                line = None
            if not isinstance(line, str):
                raise data_error(f'{file}:{n}: expected a JSON object with prompt, such as {{"prompt": "Return the "}}')
        prompts.append(line)
    return prompts


def _search(run, flags: dict, stop_ids) -> list[dict]:
    from gpt4o_jax.sampling.beam import beam_search

    penalty = 1.0 if flags["length_penalty"] is None else flags["length_penalty"]
    tokenizer = run.tokenizer
    (found,) = beam_search(
        run.model, run.params, [tokenizer.prompt(flags["prompt"])], flags["max_new_tokens"], flags["beams"],
        flags["num_samples"], penalty, stop_ids, tokenizer.vocab_size, tokenizer.symbols,
    )  # fmt: skip
    texts = [tokenizer.decode(h.ids) for h in found]
    _show(flags["prompt"], texts)
    return [
        {"text": text, "tokens": len(h.ids), "finished": h.finished, "logprob": h.logprob, "score": h.score}
        for text, h in zip(texts, found, strict=True)
    ]


def _draw(run, flags: dict, sampling) -> list[dict]:
    from gpt4o_jax.sampling.text import complete

    unseen = [flags["prompt"]]  # shown with the first text, once the prompt is known to fit

    def stream(row: int, text: str) -> None:
        sys.stderr.write("".join(unseen) + text)
        sys.stderr.flush()
        unseen.clear()

    one = flags["num_samples"] == 1
    results = complete(
        run.model, run.params, run.tokenizer, [flags["prompt"]], flags["max_new_tokens"], sampling, flags["seed"],
        flags["stop"], stream if one else None, flags["num_samples"], _draft(run, flags),
    )  # fmt: skip
    if one:
        stream(0, "\n")
    else:
        _show(flags["prompt"], [text for text, _ in results])
    return [_sample(run.tokenizer, text, c, sampling.top_logprobs > 0) for text, c in results]


def _draw_each(run, flags: dict, sampling, prompts: list[str]) -> list[dict]:
    from gpt4o_jax.sampling.text import complete_each

    results: list[dict] = [{}] * len(prompts)
    how = (flags["seed"], flags["stop"], flags["num_samples"], _rows(flags))
    for p, found in complete_each(run.model, run.params, run.tokenizer, prompts, flags["max_new_tokens"], sampling, *how):
        _show(prompts[p], [text for text, _ in found])
        samples = [_sample(run.tokenizer, text, c, sampling.top_logprobs > 0) for text, c in found]
        results[p] = {"prompt": prompts[p], "samples": samples}
    return results


def _draft(run, flags: dict):
    from gpt4o_jax import run as runs
    from gpt4o_jax.sampling.speculative import Draft

    tokens = _draft_tokens(flags)
    if flags["draft"] in ("", "ngram"):
        return Draft(tokens) if flags["draft"] else None
    other = runs.open_run(flags["draft"])
    if other.tokenizer.digest != run.tokenizer.digest:
        raise data_error(
            f"--draft={flags['draft']}: its tokenizer (digest {other.tokenizer.digest}) is not that of --workdir (digest"
            f" {run.tokenizer.digest}); train the draft with --config.tokenizer.path={run.workdir}"
        )
    other = ready(other, flags, flags["num_samples"])
    return Draft(tokens, other.model, other.params)


def _show(prompt: str, texts: list[str]) -> None:
    for i, text in enumerate(texts):
        sys.stderr.write(f"--- {i}\n{prompt}{text}\n")


def _sample(tokenizer, text: str, c, each_token: bool) -> dict:
    """One continuation as JSON; with each_token, also the log-probabilities at every token."""
    sample = {
        "text": text, "tokens": len(c.ids), "finished": c.finished, "logprob": sum(c.logprobs), "passes": c.passes,
    }  # fmt: skip
    if each_token:
        name = lambda i: {"id": i, "text": tokenizer.decode([i])}
        sample["logprobs"] = [
            name(i) | {"logprob": logprob, "top": [name(j) | {"logprob": p} for j, p in top]}
            for i, logprob, top in zip(c.ids, c.logprobs, c.top, strict=True)
        ]
    return sample
