"""loss, perplexity, bits per byte and accuracy of a run on its hold-out, or on any text"""

from gpt4o_jax.commands.flags import Flag
from gpt4o_jax.commands.ready_flags import check_weights
from gpt4o_jax.errors import RunError

FLAGS = (
    Flag("workdir", str, "", "run folder", required=True),
    Flag("step", int, None, "checkpoint step; the newest if not given", low=0),
    Flag("text", str, "", "UTF-8 file, folder or glob to score instead of the hold-out"),
    Flag("weights", str, "", "score them again in bfloat16, int8 or int4, as generate --weights has them: what that costs"),
    Flag("stride", int, None, "tokens between windows; the run's eval.stride if not given", low=1),
)


def main(flags: dict, overrides: dict[str, str]) -> dict:
    if flags["weights"]:
        check_weights("evaluate", flags["weights"])
    import jax

    from gpt4o_jax import run as runs
    from gpt4o_jax.data import sources
    from gpt4o_jax.evaluation import perplexity
    from gpt4o_jax.model.quantization import for_generation

    texts = [sources.read_text(p) for p in sources.text_files(flags["text"])] if flags["text"] else None
    run = runs.open_run(flags["workdir"], flags["step"])
    if (flags["stride"] or 0) > run.config.model.context_length:
        raise RunError(
            f"evaluate: --stride={flags['stride']}: at most the model's context_length={run.config.model.context_length},"
            " or tokens between two windows would not be scored"
        )
    if texts is None:
        documents = list(perplexity.cached_documents(runs.holdout(run), run.tokenizer))
    else:
        documents = [perplexity.text_document(text, run.tokenizer) for text in texts]
    stride = flags["stride"] or run.config.eval.stride
    with jax.set_mesh(run.mesh):
        how = (documents, run.tokenizer, stride, run.config.eval.batch_size)
        scores = perplexity.evaluate(run.model, run.params, *how)
        if flags["weights"]:
            again = perplexity.evaluate(*for_generation(run.model, run.params, flags["weights"]), *how)
            names = ("loss", "perplexity", "bits_per_byte", "accuracy")
            scores[flags["weights"]] = {name: again[name] for name in names} | {"loss_added": again["loss"] - scores["loss"]}
    return {"workdir": str(run.workdir), "step": run.step, "text": flags["text"] or "holdout", **scores}
