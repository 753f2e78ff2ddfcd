"""Tasks answered with generated text: questions, translations, summaries, chats; answered in batches and scored."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

from gpt4o_jax.config import DataConfig
from gpt4o_jax.console import say
from gpt4o_jax.data import conversations, mixture, sources
from gpt4o_jax.data.tokenizer import Tokenizer
from gpt4o_jax.errors import RunError, data_error, did_you_mean
from gpt4o_jax.model.gpt import GPT
from gpt4o_jax.sampling.generate import generate
from gpt4o_jax.sampling.logits import Sampling
from gpt4o_jax.tasks import metrics, readers
from gpt4o_jax.tasks.chat import Template, question, symbols_of_answers
from gpt4o_jax.tasks.item import Item
from gpt4o_jax.tasks.worlds import APPLICATIONS, docstrings

TOO_LONG = "\u2205"  # answer to a prompt that is too long: no letters, so it has nothing in common with any reference
HOLDOUT = "holdout"  # the task of answering the held-out conversations of a run's own data


@dataclasses.dataclass(frozen=True)
class Task:
    """Items to answer, and the names of the metrics (tasks/metrics.py) that score the answers, the leading one first."""

    name: str
    items: Sequence[Item]
    metrics: tuple[str, ...]
    baseline: Callable[[Item], str] | None = None  # an answer that needs no model


def known(name: str) -> bool:
    """Whether `name` is one of our own tasks."""
    return name in names()


def names() -> list[str]:
    """The names of all our own tasks."""
    return [*APPLICATIONS, *sources.WORLD_NAMES, HOLDOUT]


def tasks(asked: Sequence[str], data: DataConfig, limit: int, choosing: bool = False) -> list[Task]:
    """The tasks asked for: worlds, applications (all their worlds), or "holdout", for a run trained on `data`.

    limit: number of held-out items per slice of a world, and of the hold-out. choosing: the items for checkpoint selection
    during training, which differ from those of the final evaluation. Raises RunError if a task does not exist or cannot be
    held out from `data`, or if the library of a metric is missing.
    """
    found: dict[str, Task] = {}
    for name in asked:
        if not known(name):
            raise RunError(f"task {name!r} does not exist{did_you_mean(name, names())}; there are {', '.join(names())}")
        if name == HOLDOUT:
            found[name] = _holdout(data, limit, choosing)
            continue
        asked_worlds = APPLICATIONS.get(name, (name,))
        if (
            docstrings.NAME in asked_worlds
            and data.holdout == "tail"
            and any(c.source == "python_docs" for _, c in mixture.members(data))
        ):
            raise RunError(
                f"task {name}: its held-out docstrings are documents that this run was trained on (data.holdout=tail of"
                " python_docs holds out others); ask for other worlds, or train with data.holdout=hash"
            )
        for world in (sources.world(each, data.holdout_fraction) for each in asked_worlds):
            items = conversations.held_out(world, limit * len(world.slices), choosing)
            baseline = docstrings.lead if world.name == docstrings.NAME else None
            found[world.name] = Task(world.name, items, world.metrics, baseline)
    for task in found.values():
        for metric in task.metrics:  # a missing library is reported now, not after everything is answered
            for item in itertools.islice((item for item in task.items if metrics.can_score(metric, item)), 1):
                metrics.each(metric, [""], [item])
    return list(found.values())


def numbers(asked: Sequence[Task]) -> list[str]:
    """Names of the scores that `evaluate` returns: "TASK/METRIC", and "TASK/SLICE/METRIC" for the leading metric."""
    whole = [f"{task.name}/{metric}" for task in asked for metric in task.metrics]
    return whole + [f"{task.name}/{row}/{metric}" for task in asked for row, metric in leading(task).items() if row]


def leading(task: Task) -> dict[str, str]:
    """slice -> the first metric of the task that can score its items."""
    samples = {item.slice: item for item in reversed(task.items)}
    slices = dict.fromkeys(item.slice for item in task.items)
    can = lambda row, metric: metrics.can_score(metric, samples[row]) and metrics.METRICS[metric].of_slices
    return {row: next(m for m in task.metrics if can(row, m)) for row in slices}


def _holdout(data: DataConfig, limit: int, choosing: bool) -> Task:
    """Held-out conversations of the first source that has conversations and is not a world (worlds are separate tasks)."""
    for _, alone in mixture.members(data):
        if conversations.are_documents_of(alone) and alone.source != "world":
            own = sources.apart(alone)
            if own is None:
                own = (d for d in sources.load(alone) if sources.is_held(d, alone.holdout_fraction))
            found = [d.item for d in itertools.islice((d for d in own if d.strip()), 3 * limit)]
            if not found:
                raise data_error(f"task {HOLDOUT}: no conversation of {alone.path} is held out; raise data.holdout_fraction")
            items = conversations.one_part(found, choosing, f"task {HOLDOUT}")[:limit]
            scores = readers.METRICS[alone.reader or "conversations"]
            return Task(HOLDOUT, items, tuple(name for name in scores if metrics.tells(name, items)))
    raise RunError(f"task {HOLDOUT}: the run was trained on no conversations of files; expected one of {', '.join(names()[:-1])}")


# ---------------------------------------------------------------- answers


def answer(
    model: GPT,
    params,
    tokenizer: Tokenizer,
    template: Template,
    items: Sequence[Item],
    batch_size: int,
    sampling: Sampling = Sampling(temperature=0.0),
    seed: int = 0,
) -> list[str]:
    """The model's answer to the prompt of each item; TOO_LONG if the prompt does not fit. Needs an active mesh.

    An answer has at most twice the tokens of the longest reference plus 8: a longer one would be wrong.
    """
    symbols = symbols_of_answers(template, tokenizer)
    prompts = [question(template, item.messages, tokenizer) for item in items]
    most = [2 * max(len(tokenizer.encode(text)) for text in item.references) + 8 for item in items]
    fitting = [i for i in range(len(items)) if len(prompts[i]) < model.config.context_length]
    said = [TOO_LONG] * len(items)
    if len(fitting) < len(items):
        missing = f"{len(items) - len(fitting)} of {len(items)} prompts"
        say(f"{missing} do not fit in model.context_length: not answered, and scored as wrong")
    order = sorted(fitting, key=lambda i: (len(prompts[i]), most[i]))
    for begin in range(0, len(order), batch_size):
        chosen = order[begin : begin + batch_size]
        rows = chosen + chosen[-1:] * (batch_size - len(chosen))  # one shape, one compilation
        done = generate(
            model,
            params,
            [prompts[i] for i in rows],
            max(most[i] for i in rows),
            sampling,
            (seed + begin) % 2**31,  # other batches draw with other seeds
            should_stop=lambda row, ids: len(ids) if len(ids) >= most[rows[row]] else None,
            vocab_size=tokenizer.vocab_size,
            symbols=symbols,
        )
        for i, completion in zip(chosen, done, strict=False):
            said[i] = template.said(tokenizer.decode(completion.ids))
    return said


# ---------------------------------------------------------------- scores


def evaluate(
    model: GPT, params, tokenizer: Tokenizer, template: Template, asked: Sequence[Task], batch_size: int
) -> dict[str, float]:
    """Scores of greedy answers, keyed by the names of `numbers`. Needs an active mesh."""
    found = {}
    for task in asked:
        said = answer(model, params, tokenizer, template, task.items, batch_size)
        *slices, (_, whole) = metrics.table(task.metrics, said, task.items, resamples=1).items()
        found |= {f"{task.name}/{name}": score.value for name, score in whole.items()}
        first = leading(task)
        found |= {f"{task.name}/{row}/{first[row]}": scores[first[row]].value for row, scores in slices}
    return found
