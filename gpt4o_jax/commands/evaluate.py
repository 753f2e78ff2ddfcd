"""loss, perplexity, bits per byte and accuracy of a run on its hold-out, or on any text"""

from gpt4o_jax.commands.flags import Flag
from gpt4o_jax.errors import RunError

FLAGS = (
    Flag("workdir", str, "", "run folder", required=True),
    Flag("step", int, None, "checkpoint step; the newest if not given", low=0),
    Flag("text", str, "", "UTF-8 file, folder or glob to score instead of the hold-out"),
    Flag("stride", int, None, "tokens between windows; the run's eval.stride if not given", low=1),
)


def main(flags: dict, overrides: dict[str, str]) -> dict:
    import jax

    from gpt4o_jax import run as runs
    from gpt4o_jax.data import sources
    from gpt4o_jax.evaluation import perplexity

    texts = [sources.read_text(p) for p in sources.text_files(flags["text"])] if flags["text"] else None
    run = runs.open_run(flags["workdir"], flags["step"])
    if (flags["stride"] or 0) > run.config.model.context_length:
        raise RunError(
            f"evaluate: --stride={flags['stride']}: at most the model's context_length={run.config.model.context_length},"
            " or tokens between two windows would not be scored"
        )
    if texts is None:
        documents = perplexity.cached_documents(runs.holdout(run), run.tokenizer)
    else:
        documents = [perplexity.text_document(text, run.tokenizer) for text in texts]
    stride = flags["stride"] or run.config.eval.stride
    with jax.set_mesh(run.mesh):
        scores = perplexity.evaluate(run.model, run.params, documents, run.tokenizer, stride, run.config.eval.batch_size)
    return {"workdir": str(run.workdir), "step": run.step, "text": flags["text"] or "holdout", **scores}
