"""continues a prompt, streaming the text"""

import sys

from gpt4o_jax.commands import sampling_flags
from gpt4o_jax.commands.flags import Flag
from gpt4o_jax.commands.ready_flags import READY, ready

FLAGS = (
    Flag("workdir", str, "", "run folder", required=True),
    Flag("prompt", str, "", "text to continue; empty: from the beginning of a document"),
    Flag("step", int, None, "checkpoint step; the newest if not given", low=0),
    Flag("max_new_tokens", int, 100, "most tokens to add", low=1),
    *sampling_flags.FLAGS,
    *READY,
    Flag("num_samples", int, 1, "continuations of the prompt", low=1, high=1024),
    Flag("seed", int, 0, "same seed, same text", low=0, high=2**31 - 1),
    Flag("stop", list, None, "end before this string; may be given several times"),
)


def main(flags: dict, overrides: dict[str, str]) -> dict:
    sampling = sampling_flags.sampling("generate", flags)
    import jax

    from gpt4o_jax import run as runs
    from gpt4o_jax.sampling.text import complete

    run = ready("generate", runs.open_run(flags["workdir"], flags["step"]), flags)
    one = flags["num_samples"] == 1

    unseen = [flags["prompt"]]  # shown with the first text, when it is known to fit

    def stream(row: int, text: str) -> None:
        sys.stderr.write("".join(unseen) + text)
        sys.stderr.flush()
        unseen.clear()

    with jax.set_mesh(run.mesh):
        results = complete(
            run.model, run.params, run.tokenizer, [flags["prompt"]], flags["max_new_tokens"], sampling, flags["seed"],
            flags["stop"], stream if one else None, flags["num_samples"],
        )  # fmt: skip
    if one:
        stream(0, "\n")
    else:
        for i, (text, _) in enumerate(results):
            sys.stderr.write(f"--- {i}\n{flags['prompt']}{text}\n")
    return {
        "workdir": str(run.workdir),
        "step": run.step,
        "prompt": flags["prompt"],
        "samples": [_sample(run.tokenizer, text, c, sampling.top_logprobs > 0) for text, c in results],
    }


def _sample(tokenizer, text: str, c, each_token: bool) -> dict:
    """One continuation, as JSON; with each_token, what the model said of every token."""
    sample = {"text": text, "tokens": len(c.ids), "finished": c.finished, "logprob": sum(c.logprobs)}
    if each_token:
        name = lambda i: {"id": i, "text": tokenizer.decode([i])}
        sample["logprobs"] = [
            name(i) | {"logprob": logprob, "top": [name(j) | {"logprob": p} for j, p in top]}
            for i, logprob, top in zip(c.ids, c.logprobs, c.top, strict=True)
        ]
    return sample
