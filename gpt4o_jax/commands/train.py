"""starts a training run in --workdir, or resumes the one that is there"""

import os

from gpt4o_jax.commands.flags import Flag
from gpt4o_jax.errors import RunError, did_you_mean

FLAGS = (
    Flag("config", str, "", "config file: FILE[:ARG], a Python file with get_config()", required=True),
    Flag("workdir", str, "", "run folder", required=True),
    Flag("profile", str, "", "FIRST:LAST, steps to trace into WORKDIR/profile"),
    Flag("coordinator", str, "", "several processes: HOST:PORT of process 0; detected under Slurm, in JobSets and on TPUs"),
    Flag("num_processes", int, 0, "number of processes; 1: train alone, ignoring the environment", low=0),
    Flag("process_id", int, -1, "several processes: index of this one, from 0", low=-1),
    Flag("start_timeout", float, 300.0, "seconds to wait for all processes to join", low=1),
    Flag(
        "peer_timeout",
        float,
        600.0,
        "seconds without progress until a process counts as lost; ten times that to start, evaluate or save, 36 to prepare data",
        low=1,
    ),
)


def main(flags: dict, overrides: dict[str, str]) -> dict:
    from gpt4o_jax.commands import config_file

    config = config_file.read(flags["config"], overrides)
    profile = _profile(flags["profile"])

    from gpt4o_jax.length import in_epochs, total_steps

    if profile and not in_epochs(config) and profile[0] >= total_steps(config, 0):
        raise RunError(f"train: --profile={flags['profile']}: the run has {total_steps(config, 0)} steps; begin before its end")

    from gpt4o_jax import parallel
    from gpt4o_jax.parallel import cluster
    from gpt4o_jax.paths import Hold

    job = cluster.find(flags["coordinator"], flags["num_processes"], flags["process_id"], os.environ)
    with parallel.joined(job, flags["start_timeout"], flags["peer_timeout"]) as peers, Hold() as hold:
        return _run(config, flags["workdir"], profile, peers, hold)


def _run(config, workdir: str, profile: tuple[int, int] | None, peers, hold) -> dict | None:
    """Trains; returns the report in the leading process, else None."""
    from gpt4o_jax import origin, parallel, report, run
    from gpt4o_jax.console import say
    from gpt4o_jax.data import conversations
    from gpt4o_jax.data import corpus as corpora
    from gpt4o_jax.evaluation import generation, perplexity
    from gpt4o_jax.paths import run_folder
    from gpt4o_jax.sampling.logits import Sampling
    from gpt4o_jax.sampling.text import complete
    from gpt4o_jax.training.guards import StopSignal
    from gpt4o_jax.training.loop import train
    from gpt4o_jax.training.metrics import check_wandb
    from gpt4o_jax.training.objective import Objective

    if config.log.wandb:
        parallel.share("Weights & Biases", lambda: check_wandb(config))  # reported before anything is written or compiled
    workdir = run_folder("--workdir", workdir)
    mesh = parallel.make_mesh(config.mesh)
    asked = generation.tasks(config.eval.tasks, config.data, config.eval.task_items, choosing=True)
    best, known = config.checkpoint.best, (*_scores(config), *generation.numbers(asked))
    if best and best not in known:
        raise RunError(f"config.checkpoint.best={best}: no such number{did_you_mean(best, known)}; there are {', '.join(known)}")
    method = _method(config)
    prepare = method.prepare if method else corpora.prepare
    peers.at("the run folder", times=36)  # process 0 may tokenise a corpus for hours, and the others wait for it
    config, corpus = parallel.leader_first("run folder", lambda: run.open_folder(workdir, config, mesh, prepare, hold.take))
    peers.at("the start of training", times=10)
    held_out = None if method else perplexity.holdouts(corpus)
    for line in corpus.too_long(config.model.context_length) if not method and config.data.rows == "first_fit" else ():
        say(line)
    template = conversations.template_of(config.data, corpus.tokenizer) if asked else None

    def score_text(model, params, whole: bool) -> dict:
        limit = None if whole else config.eval.max_tokens
        how = (config.eval.stride, config.eval.batch_size, config.train.loss_chunk)
        return perplexity.evaluate_each(model, params, held_out, corpus.tokenizer, *how, max_tokens=limit)

    def evaluate(model, params, whole: bool) -> dict:
        tasks = generation.evaluate(model, params, corpus.tokenizer, template, asked, config.eval.batch_size)
        return score(model, params, whole) | tasks

    def sample(model, params) -> str:
        prompts, how = config.sample.prompts, Sampling(config.sample.temperature)
        done = complete(model, params, corpus.tokenizer, prompts, config.sample.max_new_tokens, how, config.seed)
        return "\n\n".join(f"[{i}] {p}{text}" for i, (p, (text, _)) in enumerate(zip(prompts, done, strict=True))) + "\n"

    def initial_params(model) -> dict:
        choose = lambda: origin.base_of(workdir, config) if method else origin.find(config.init.from_)
        start = base or origin.agreed(choose)
        say(f"weights from {start.folder} at step {start.step}")
        return run.load_params(start.store, start.step, model, mesh)

    reference = origin.reference(workdir) if method else None
    # Once it has begun, an objective without adapters may no longer need the other run.
    needed = config.lora.rank or (method and reference is None)
    base = origin.agreed(lambda: origin.base_of(workdir, config)) if needed else None
    reference = base.reference if base else reference
    kept = {"base": reference | {"rank": config.lora.rank}} if reference else None
    start_from = initial_params if config.init.from_ else None
    objective, score = Objective(), score_text
    if method:
        theirs = workdir / "reference" / reference["digest"][:16]  # the other run may continue before this one has begun
        objective, score = method.begin(config, corpus, theirs, mesh, initial_params)
    with StopSignal(say) as stop:
        train(config, workdir, corpus, mesh, evaluate, sample, start_from, profile, stop, peers, kept, objective)
    return report.write(workdir) if parallel.is_leader() else None


def _scores(config) -> list[str]:
    """Names of the numbers in every evaluation of a run, except those of its tasks."""
    from gpt4o_jax.data import corpus, mixture, sources

    scores, data = list(config.objective.scores), config.data
    members = [corpus.name_of(alone) for _, alone in mixture.members(data)]
    if len(members) > 1:
        scores += [f"{name}/bits_per_byte" for name in members]
    if config.objective.method == "grpo":
        scores += [f"reward/{row}" for row in sources.world(data.path, data.holdout_fraction).slices]
    return scores


def _method(config):
    """The module that prepares the data of an objective and begins its runs; None for ordinary training."""
    if config.objective.method == "next_token":
        return None

    import jax

    from gpt4o_jax.finetuning import preference, reinforced

    if jax.process_count() > 1:
        raise RunError(f"config.objective.method={config.objective.method} runs in one process so far, got {jax.process_count()}")
    return {"dpo": preference, "grpo": reinforced}[config.objective.method]


def _profile(text: str) -> tuple[int, int] | None:
    if not text:
        return None
    try:
        first, last = map(int, text.split(":"))
        if not 0 <= first < last:
            raise ValueError
    except ValueError:
        raise RunError(f"train: --profile={text}: expected FIRST:LAST with FIRST below LAST, for example 10:15") from None
    return first, last
