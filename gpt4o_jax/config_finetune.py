"""The knobs of fine-tuning (config.py has all others)."""

import dataclasses

from gpt4o_jax.config_model import knob


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Adapters of low rank beside the weights of init.from, which then stay as they are (arXiv:2106.09685)."""

    rank: int = knob(0, "Rank of the adapters; 0: none, all weights are trained.", low=0, high=4096)
    alpha: float = knob(32.0, "What the adapters add is multiplied by alpha / rank.", low=0.0)
    targets: tuple[str, ...] = knob(
        ("*",), "Weights that get an adapter: patterns on their paths, such as '*/attention/query'; '*': every hidden matrix."
    )

    @property
    def scale(self) -> float:
        """What the product of an adapter's matrices is multiplied by."""
        return self.alpha / max(self.rank, 1)
