"""The knobs of fine-tuning (config.py has all others)."""

import dataclasses

from gpt4o_jax.config_model import knob


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Adapters of low rank beside the weights of init.from, which then stay as they are (arXiv:2106.09685)."""

    rank: int = knob(0, "Rank of the adapters; 0: none, all weights are trained.", low=0, high=4096)
    alpha: float = knob(32.0, "What the adapters add is multiplied by alpha / rank.", low=0.0)
    targets: tuple[str, ...] = knob(
        ("*",), "Weights with adapters: patterns on their paths, such as '*/attention/query'; '*': hidden matrices but routers."
    )

    @property
    def scale(self) -> float:
        """What the product of an adapter's matrices is multiplied by."""
        return self.alpha / max(self.rank, 1)


# By objective: what its evaluations tell.
_SCORES = {
    "next_token": ("bits_per_byte", "loss", "perplexity", "accuracy"),
    "dpo": ("preference_accuracy", "loss", "preference_margin"),
    "grpo": ("reward",),
}


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """What training minimises."""

    method: str = knob(
        "next_token",
        "dpo: preferences between two answers (finetuning/preference.py); grpo: rewards of its own answers"
        " (finetuning/reinforced.py).",
        tuple(_SCORES),
    )
    beta: float = knob(
        0.1, "dpo: margins of log-probability are multiplied by it; grpo: weight of the KL divergence to init.from.", low=0.0
    )
    group: int = knob(8, "grpo: answers to a question, compared with each other; divides train.batch_size.", low=2)
    clip: float = knob(
        0.2, "grpo: how far the ratio of new to old probability is followed, to both sides of 1.", low=0.0, high=1.0
    )
    answer_tokens: int = knob(64, "grpo: most tokens of an answer.", low=1)
    held_out: int = knob(200, "Of a world: held-out items that an evaluation scores.", low=1)

    @property
    def scores(self) -> tuple[str, ...]:
        """The numbers of an evaluation."""
        return _SCORES[self.method]

    @property
    def measure(self) -> str:
        """The one of them, which records of training have too, that tells how good a model is."""
        return self.scores[0]
