"""The settings of fine-tuning. All other settings are in config.py."""

import dataclasses

from gpt4o_jax.config_model import knob


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """LoRA (arXiv:2106.09685): low-rank adapters on the frozen weights of init.from."""

    rank: int = knob(0, "Rank of the adapters; 0: no adapters, all weights are trained.", low=0, high=4096)
    alpha: float = knob(32.0, "The adapters' contribution is multiplied by alpha / rank.", low=0.0)
    targets: tuple[str, ...] = knob(
        ("*",),
        "Weights with adapters: patterns on their paths, such as '*/attention/query'; '*': all hidden matrices except routers.",
    )

    @property
    def scale(self) -> float:
        """Multiplier of the product of an adapter's two matrices."""
        return self.alpha / max(self.rank, 1)


# By objective: the metrics of its evaluations, the main one first.
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
        "next_token: cross-entropy; dpo: preferences between two answers (finetuning/preference.py); grpo: rewards of the model's"
        " own answers (finetuning/reinforced.py).",
        tuple(_SCORES),
    )
    beta: float = knob(
        0.1, "dpo: multiplier of the log-probability margins; grpo: weight of the KL divergence from init.from.", low=0.0
    )
    nll: float = knob(
        0.0,
        "dpo: weight of the per-token cross-entropy of the preferred answers, which keeps them too from becoming unlikely.",
        low=0.0,
    )
    group: int = knob(8, "grpo: answers sampled per question, whose rewards are compared; divides train.batch_size.", low=2)
    clip: float = knob(0.2, "grpo: the ratio of new to old probability is clipped to 1 - clip and 1 + clip.", low=0.0, high=1.0)
    answer_tokens: int = knob(64, "grpo: maximum length of an answer, in tokens.", low=1)
    held_out: int = knob(200, "dpo, grpo: held-out items of a world that an evaluation scores.", low=1)

    @property
    def scores(self) -> tuple[str, ...]:
        """Names of the metrics of an evaluation."""
        return _SCORES[self.method]

    @property
    def measure(self) -> str:
        """The main metric, which training records also have."""
        return self.scores[0]
