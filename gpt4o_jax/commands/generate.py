"""continues a prompt, streaming the text"""

import sys

from gpt4o_jax.commands.flags import Flag

FLAGS = (
    Flag("workdir", str, "", "run folder", required=True),
    Flag("prompt", str, "", "text to continue; empty: from the beginning of a document"),
    Flag("step", int, None, "checkpoint step; the newest if not given", low=0),
    Flag("max_new_tokens", int, 100, "most tokens to add", low=1),
    Flag("temperature", float, 0.8, "0: greedy", low=0.0, high=100.0),
    Flag("top_k", int, 0, "keep the k most probable tokens; 0: all", low=0),
    Flag("top_p", float, 1.0, "keep the most probable tokens up to this much probability", low=0.0, high=1.0),
    Flag("min_p", float, 0.0, "keep tokens at least this probable, relative to the best", low=0.0, high=1.0),
    Flag("num_samples", int, 1, "continuations of the prompt", low=1, high=1024),
    Flag("seed", int, 0, "same seed, same text", low=0, high=2**31 - 1),
    Flag("stop", list, None, "end before this string; may be given several times"),
)


def main(flags: dict, overrides: dict[str, str]) -> dict:
    import jax

    from gpt4o_jax import run as runs
    from gpt4o_jax.sampling.logits import Sampling
    from gpt4o_jax.sampling.text import complete

    run = runs.open_run(flags["workdir"], flags["step"])
    sampling = Sampling(flags["temperature"], flags["top_k"], flags["top_p"], flags["min_p"])
    prompts = [flags["prompt"]] * flags["num_samples"]
    one = len(prompts) == 1

    unseen = [flags["prompt"]]  # shown with the first text, when it is known to fit

    def stream(row: int, text: str) -> None:
        sys.stderr.write("".join(unseen) + text)
        sys.stderr.flush()
        unseen.clear()

    with jax.set_mesh(run.mesh):
        results = complete(
            run.model, run.params, run.tokenizer, prompts, flags["max_new_tokens"], sampling, flags["seed"],
            flags["stop"], stream if one else None,
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
        "samples": [
            {"text": text, "tokens": len(c.ids), "finished": c.finished, "logprob": sum(c.logprobs)} for text, c in results
        ],
    }
