"""scores a run: loss and bits per byte on its hold-out or other text; generated answers; multiple choice; lm-eval tasks"""

from gpt4o_jax.commands.flags import Flag
from gpt4o_jax.commands.ready_flags import check_ready
from gpt4o_jax.errors import RunError

FLAGS = (
    Flag("workdir", str, "", "run folder", required=True),
    Flag("step", int, None, "checkpoint step; default: the best, where the run keeps it, else the newest", low=0),
    Flag("text", str, "", "UTF-8 file, folder or glob to score instead of the hold-out"),
    Flag("weights", str, "", "also score with weights in bfloat16, int8 or int4 (generate --weights), to measure the cost"),
    Flag("kv_cache", str, "", "also score through a KV cache in float32, bfloat16 or int8 (generate --kv_cache)"),
    Flag("stride", int, None, "tokens between windows; default: the run's eval.stride", low=1),
    Flag("choice", str, "", "JSONL of multiple-choice questions (question, choices, answer) to score instead"),
    Flag(
        "tasks",
        str,
        "",
        "NAME[,NAME] to score instead: applications (qa, translation, ...), worlds, holdout (held-out conversations"
        " of the run's own data), or tasks of lm-evaluation-harness (requirements-eval.txt)",
    ),
    Flag("task_dir", str, "", "for lm-eval tasks: folder with their YAML files; nothing is then downloaded"),
    Flag("num_fewshot", int, None, "for --choice and lm-eval tasks: solved examples before each question", low=0),
    Flag(
        "limit",
        int,
        None,
        "for --choice and --tasks: questions per task, or per slice of our own tasks (default 200)",
        low=1,
    ),
    Flag(
        "temperature",
        float,
        None,
        "for our own tasks: draw each answer at this temperature, with the run's seed; default: 0, greedily",
        low=0.0,
        high=100.0,
    ),
)
_FOR = {
    "stride": ("text", ""),
    "weights": ("text", ""),
    "kv_cache": ("text", ""),
    "task_dir": ("tasks",),
    "num_fewshot": ("choice", "tasks"),
    "limit": ("choice", "tasks"),
    "temperature": ("tasks",),
}


def main(flags: dict, overrides: dict[str, str]) -> dict:
    what = [name for name in ("text", "choice", "tasks") if flags[name]] or [""]
    if len(what) > 1:
        raise RunError(f"evaluate: --{what[0]} and --{what[1]}: expected one of them")
    for name, kinds in _FOR.items():
        if flags[name] not in (None, "") and what[0] not in kinds:
            needed = " or ".join(f"--{k}" if k else "the hold-out" for k in kinds)
            # Only one of --text, --choice and --tasks may be given: a flag for another of them has to go.
            mend = f"leave it or --{what[0]} out" if what[0] else "give that too, or leave it out"
            raise RunError(f"evaluate: --{name}={flags[name]} is for {needed}; {mend}")
    check_ready("evaluate", _ready(flags))
    import jax

    from gpt4o_jax import run as runs

    score = {"choice": _choice, "tasks": _tasks}.get(what[0], _perplexity)
    ready = score(flags)  # reads the user's files before the model
    run = runs.open_run(flags["workdir"], flags["step"])
    with jax.set_mesh(run.mesh):
        return {"workdir": str(run.workdir), "step": run.step, **ready(run)}


def _ready(flags: dict) -> dict[str, str]:
    """The precision flags that were given, to score with again."""
    return {name: flags[name] for name in ("weights", "kv_cache") if flags[name]}


def _perplexity(flags: dict):
    from gpt4o_jax import run as runs
    from gpt4o_jax.data import sources
    from gpt4o_jax.evaluation import perplexity
    from gpt4o_jax.model.quantization import for_generation

    texts = [sources.read_text(p) for p in sources.text_files(flags["text"])] if flags["text"] else None

    def score(run) -> dict:
        if (flags["stride"] or 0) > run.config.model.context_length:
            raise RunError(
                f"evaluate: --stride={flags['stride']}: at most the model's context_length={run.config.model.context_length},"
                " or tokens between two windows would not be scored"
            )
        if texts is None and run.config.objective.method != "next_token":
            return _objective(run, {name: flags[name] for name in ("stride", "weights", "kv_cache") if flags[name]})
        if texts is None:
            groups = perplexity.holdouts(runs.corpus(run))
            if run.config.checkpoint.best in (*run.config.objective.scores, *(f"{name}/bits_per_byte" for name in groups)):
                _tell_that_it_chose(run)
        else:
            groups = {"text": [perplexity.text_document(text, run.tokenizer) for text in texts]}
        stride = flags["stride"] or run.config.eval.stride
        how = (groups, run.tokenizer, stride, run.config.eval.batch_size)
        scores = perplexity.evaluate_each(run.model, run.params, *how)
        kinds = _ready(flags)
        if kinds:
            ready = for_generation(run.model, run.params, **kinds)
            again = perplexity.evaluate_each(*ready, *how, through_cache="kv_cache" in kinds)
            names = ("loss", "perplexity", "bits_per_byte", "accuracy")
            added = {f"{name}_added": again[name] - scores[name] for name in ("loss", "bits_per_byte")}
            scores["as_generated"] = kinds | {name: again[name] for name in names} | added
        return {"text": flags["text"] or "holdout", **scores}

    return score


def _objective(run, given: dict) -> dict:
    """Scores of a run trained on preferences or rewards: those of its objective, on its hold-out."""
    from gpt4o_jax import origin
    from gpt4o_jax import run as runs
    from gpt4o_jax.finetuning import preference, reinforced

    method = run.config.objective.method
    for name, value in given.items():
        raise RunError(
            f"evaluate: --{name}={value} is about text, and a run of {method} is scored by its own numbers; add --text=FILE"
        )
    if method == "grpo":
        prompts = runs.corpus(run, reinforced.prepare)
        return {"text": "holdout", **reinforced.scores(run.config, prompts, run.model, run.params, choosing=False)}
    corpus = runs.corpus(run, preference.prepare)
    base = origin.base_of(run.workdir, run.config, run.step)
    reference = runs.load_params(base.store, base.step, run.model, run.mesh)
    if run.config.checkpoint.best in run.config.objective.scores and run.config.data.source != "world":
        _tell_that_it_chose(run)
    return {"text": "holdout", **preference.last_scores(run.config, corpus, run.model, run.params, reference)}


def _tell_that_it_chose(run) -> None:
    from gpt4o_jax.console import say

    best = run.config.checkpoint.best
    say(
        f"checkpoint.best={best} chose by this hold-out, so its score is a little too good; other data: --text, --tasks, --choice"
    )


def _choice(flags: dict):
    from gpt4o_jax.evaluation import choice
    from gpt4o_jax.paths import local

    questions, shots = choice.read_questions(local("--choice", flags["choice"])), flags["num_fewshot"] or 0

    def score(run) -> dict:
        model = (run.model, run.params, run.tokenizer)
        scores = choice.evaluate(*model, questions, shots, flags["limit"], run.config.seed, run.config.eval.batch_size)
        return {"choice": flags["choice"], "num_fewshot": shots, **scores}

    return score


def _tasks(flags: dict):
    from gpt4o_jax import run as runs
    from gpt4o_jax.data import conversations
    from gpt4o_jax.evaluation import generation, harness

    names = [name for name in flags["tasks"].split(",") if name]
    if not names:
        raise RunError(f"evaluate: --tasks={flags['tasks']}: no task in it; there are {', '.join(generation.names())}")
    others = [name for name in names if not generation.known(name)]
    for name in () if others else ("task_dir", "num_fewshot"):
        if flags[name] not in (None, ""):
            raise RunError(f"evaluate: --{name}={flags[name]} is for tasks of lm-evaluation-harness; leave it out")
    temperature = flags["temperature"] or 0.0
    if temperature and len(others) == len(names):
        raise RunError(
            f"evaluate: --temperature={temperature:g} is for our own tasks, and {', '.join(names)} are not; leave it out"
        )
    data = runs.read_config(flags["workdir"]).data
    asked = generation.tasks([name for name in names if name not in others], data, flags["limit"] or conversations.SCORED)
    manager = harness.find(others, flags["task_dir"], generation.names()) if others else None  # before any task is answered

    def score(run) -> dict:
        scores = _answered(run, asked, temperature) if asked else {}
        if others:
            scores |= harness.evaluate(run, others, manager, flags["num_fewshot"], flags["limit"])
        return {"tasks": scores}

    return score


def _answered(run, asked, temperature: float) -> dict:
    """Scores of our own tasks; printed as a table, and saved in the run folder with every answer."""
    import sys

    from gpt4o_jax import task_report
    from gpt4o_jax.data import conversations
    from gpt4o_jax.evaluation import generation
    from gpt4o_jax.sampling.settings import Sampling
    from gpt4o_jax.tasks import metrics

    how = (run.model, run.params, run.tokenizer, conversations.template_of(run.config.data, run.tokenizer))
    sampling, size = Sampling(temperature=temperature), run.config.eval.batch_size
    found = []
    for task in asked:
        said = generation.answer(*how, task.items, size, sampling, run.config.seed)
        scores = metrics.table(task.metrics, said, task.items)
        if task.baseline:
            alone = [task.baseline(item) for item in task.items]
            scores = {"baseline": metrics.table(task.metrics, alone, task.items)["all"]} | scores
        found.append(task_report.Answered(task, said, scores))
    folder = run.workdir / "evaluations" / (str(run.step) + (f"_temperature_{temperature:g}" if temperature else ""))
    task_report.save(folder, found)
    print(f"{task_report.text_table(found)}\nanswers and scores.png in {folder}", file=sys.stderr)
    return {a.task.name: a.numbers for a in found}
