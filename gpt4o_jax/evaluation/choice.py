"""Few-shot multiple choice: the model picks the answer it finds most probable after the question."""

import dataclasses
import json
import random
from collections.abc import Sequence

from gpt4o_jax.data.tokenizer import Tokenizer
from gpt4o_jax.errors import RunError, data_error, lone_surrogate
from gpt4o_jax.evaluation.continuations import encode_pair, score
from gpt4o_jax.model.gpt import GPT


@dataclasses.dataclass(frozen=True)
class Question:
    """A question, its possible answers, and the index of the right one."""

    question: str
    choices: tuple[str, ...]
    answer: int


def read_questions(path) -> list[Question]:
    """Questions from JSONL: {"question": ..., "choices": [...], "answer": index from 0}. Raises RunError with file and line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # JSON strings may contain other line separators
    except OSError as e:
        raise data_error(f"{path}: cannot read ({e.strerror or e})") from None
    except UnicodeDecodeError as e:
        raise data_error(f"{path}: not UTF-8 at byte {e.start}") from None
    questions = []
    for n, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            stored = json.loads(line)
            question, choices, answer = stored["question"], stored["choices"], stored["answer"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise data_error(f"{path}:{n}: expected a JSON object with question, choices and answer") from None
        texts = isinstance(question, str) and isinstance(choices, list) and all(isinstance(c, str) and c for c in choices)
        if not texts or len(choices) < 2:
            raise data_error(f"{path}:{n}: expected question a text and choices a list of two or more texts")
        if lone := next(filter(None, map(lone_surrogate, (question, *choices))), ""):
            raise data_error(f"{path}:{n}: not valid Unicode: {lone}; leave it out")
        if type(answer) is not int or not 0 <= answer < len(choices):
            raise data_error(f"{path}:{n}: answer is {answer!r}, expected a number from 0 to {len(choices) - 1}")
        questions.append(Question(question, tuple(choices), answer))
    if not questions:
        raise data_error(f"{path}: no questions in it")
    return questions


def context(questions: Sequence[Question], n: int, shots: int, seed: int) -> str:
    """The prompt for question n: `shots` other questions with their answers, drawn by seed and n, then question n."""
    others = random.Random(seed * 1_000_003 + n).sample([i for i in range(len(questions)) if i != n], shots)
    solved = (_asked(questions[i]) + " " + questions[i].choices[questions[i].answer] for i in others)
    return "\n\n".join([*solved, _asked(questions[n])])


def _asked(q: Question) -> str:
    return f"Question: {q.question}\nAnswer:"


def evaluate(
    model: GPT, params, tokenizer: Tokenizer, questions: Sequence[Question], shots=0, limit=None, seed=0, batch_size=16
) -> dict[str, float]:
    """Scores the first `limit` questions (None: all). Needs an active mesh.

    Returns accuracy (choice with the highest log-probability), accuracy_norm (with the highest log-probability per UTF-8 byte, so
    that long answers are not at a disadvantage), chance (accuracy of guessing), all from 0 to 1, and questions (their number).
    Raises RunError if there are too few for `shots`.
    """
    if shots >= len(questions):
        raise RunError(f"--num_fewshot={shots}: expected fewer than there are questions ({len(questions)})")
    asked = questions[:limit]
    texts = [(context(questions, n, shots, seed), " " + choice) for n, q in enumerate(asked) for choice in q.choices]
    logprobs = [logprob for logprob, _ in score(model, params, [encode_pair(tokenizer, *t) for t in texts], batch_size)]
    right = right_norm = at = 0
    for q in asked:
        mine = logprobs[at : at + len(q.choices)]
        at += len(mine)
        best = max(range(len(mine)), key=mine.__getitem__)
        best_norm = max(range(len(mine)), key=lambda i: mine[i] / len(q.choices[i].encode()))
        right, right_norm = right + (best == q.answer), right_norm + (best_norm == q.answer)
    return {
        "accuracy": right / len(asked),
        "accuracy_norm": right_norm / len(asked),
        "chance": sum(1 / len(q.choices) for q in asked) / len(asked),
        "questions": len(asked),
    }
