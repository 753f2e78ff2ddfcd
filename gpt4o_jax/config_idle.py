"""Knobs that take effect only for one choice of another knob.

Giving one on the command line, or in a variant of a sweep, without that choice is an error. Values in a config file are exempt: a
recipe that sets Muon's learning rate stays valid when the command line chooses AdamW.
"""

from collections.abc import Iterable

from gpt4o_jax import config_mixture
from gpt4o_jax.errors import RunError

_TABLES = ("jsonl", "parquet", "tfds")
_ENDS = "docstrings"  # the only finite world: a text, of which a share is held out
_COMPARED = tuple(s for s in config_mixture.SOURCES if s != "world")  # with the hold-out, to drop near-duplicates

# Knob: the knob it depends on, and the values of that for which it has an effect.
_CHOICES = {
    "tokenizer.vocab_size": ("tokenizer.kind", ("bpe",)),
    "model.rope_theta": ("model.positions", ("rope",)),
    "model.rope_fraction": ("model.positions", ("rope",)),
    "model.rope_factor": ("model.positions", ("rope",)),
    "model.rope_original_context": ("model.positions", ("rope",)),
    "model.rope_low": ("model.positions", ("rope",)),
    "model.rope_high": ("model.positions", ("rope",)),
    "optimizer.muon_lr": ("optimizer.name", ("muon",)),
    "optimizer.muon_momentum": ("optimizer.name", ("muon",)),
    "optimizer.b2": ("optimizer.name", ("adamw", "muon", "lion", "schedule_free")),
    "optimizer.eps": ("optimizer.name", ("adamw", "muon", "schedule_free")),
    "optimizer.decay_fraction": ("optimizer.schedule", ("wsd",)),
    "optimizer.end_lr_fraction": ("optimizer.schedule", ("cosine", "wsd")),
    "data.prefetch": ("objective.method", ("next_token", "dpo")),
    "data.workers": ("objective.method", ("next_token", "dpo")),
    "eval.max_tokens": ("objective.method", ("next_token", "dpo")),
    "objective.beta": ("objective.method", ("dpo", "grpo")),
    "objective.nll": ("objective.method", ("dpo",)),
    "objective.group": ("objective.method", ("grpo",)),
    "objective.clip": ("objective.method", ("grpo",)),
    "objective.answer_tokens": ("objective.method", ("grpo",)),
    "objective.held_out": ("objective.method", ("dpo", "grpo")),
}

# Knobs of next-token training only: DPO and GRPO do not compare or cache text, build rows of their own and use the tokenizer of
# init.from.
_NEXT_TOKEN = (
    "data.shingle_bytes", "data.shingle_share", "data.cache_dir", "data.rows", "eval.stride", "tokenizer.kind",
    "tokenizer.vocab_size",
)  # fmt: skip

# Knob: the values of other knobs that together make it ineffective, and a setting that makes it effective.
_TOGETHER = {
    "optimizer.end_lr_fraction": ({"optimizer.schedule": "wsd", "optimizer.decay_fraction": 0.0}, "optimizer.decay_fraction=0.2"),
    "model.rope_scaling": ({"model.rope_factor": 1.0}, "model.rope_factor=4"),
    "checkpoint.keep_every": ({"checkpoint.every": 0, "checkpoint.best": ""}, "checkpoint.every=500"),
}

# Knob: the switch that must be on (not 0, false or empty), and an example of its value.
_SWITCHES = {
    "model.experts_per_token": ("model.n_experts", "8"),
    "model.router_scores": ("model.n_experts", "8"),
    "model.router_normalise": ("model.n_experts", "8"),
    "train.balance_loss": ("model.n_experts", "8"),
    "train.router_z_loss": ("model.n_experts", "8"),
    "train.router_bias_rate": ("model.router_bias", "true"),
    "train.mtp_weight": ("model.mtp_heads", "1"),
    "optimizer.decay_mask": ("optimizer.weight_decay", "0.1"),
    "data.shingle_share": ("data.shingle_bytes", "50"),
    "data.prefetch": ("data.workers", "1"),
    "eval.task_items": ("eval.tasks", "numbers"),
    "eval.max_tokens": ("eval.every", "500"),
    "lora.alpha": ("lora.rank", "16"),
    "lora.targets": ("lora.rank", "16"),
    "init.model": ("init.from", "RUN"),
}

# Knob: the sources that read it; in a mixture, one such member is enough.
_SOURCES = {
    "data.path": tuple(s for s in config_mixture.SOURCES if s != "python_docs"),
    "data.field": _TABLES,
    "data.tfds_dir": ("tfds",),
    "data.separator": ("text",),
    "data.world_items": ("world",),
    "data.shingle_bytes": _COMPARED,
    "data.shingle_share": _COMPARED,
    "objective.held_out": ("world",),
}

# Knob: the one that replaces it when given.
_INSTEAD = {
    "data.field": "data.reader",
    "data.holdout_fraction": "data.holdout_path",
    "tokenizer.kind": "tokenizer.path",
    "tokenizer.vocab_size": "tokenizer.path",
    "model.init_std": "init.from",
    "model.output_init": "init.from",
    "train.router_bias_rate": "lora.rank",
}

# Values that turn a knob off, which is no error even if there is nothing to turn off.
_OFF = {"train.balance_loss": 0.0, "train.mtp_weight": 0.0, "init.model": False, "data.shingle_bytes": 0, "data.workers": 0}


def refuse_idle(given: Iterable[str], value, default) -> None:
    """Raises RunError for the first knob in `given` that has no effect, unless it has its default value.

    value(name), default(name): of a knob, by its dotted name.
    """
    for name in given:
        if value(name) not in (default(name), _OFF.get(name, default(name))):
            why = _idle(name, value)
            if why:
                raise RunError(f"config.{name}={_written(value(name))} does nothing {why}, or leave {name} out")


def _idle(name: str, value) -> str:
    """Why a knob has no effect, and what would give it one; empty if it has one."""
    if name in _NEXT_TOKEN and value("objective.method") != "next_token":
        return f"with objective.method={value('objective.method')}; set objective.method=next_token"
    asked_of_a_world = value("objective.method") != "next_token" and value("data.source") == "world"
    if name == "data.holdout_fraction" and asked_of_a_world and value("data.path") != _ENDS:
        return f"with data.path={value('data.path')}, which never ends; set objective.held_out"
    all_experts = value("model.n_experts") and value("model.moe_every") == 1
    if name == "model.d_ff" and all_experts and value("model.expert_d_ff"):
        return f"with experts of model.expert_d_ff={value('model.expert_d_ff')} in every layer; set model.moe_every, such as 2"
    others, such_as = _TOGETHER.get(name, ({}, ""))
    if others and all(value(other) == idle for other, idle in others.items()):
        told = " and ".join(f"{other}={_written(idle)}" for other, idle in others.items())
        return f"with {told}; set {such_as}"
    if name in _CHOICES:
        by, choices = _CHOICES[name]
        if value(by) not in choices:
            return f"with {by}={value(by)}; set {by}={' or '.join(choices)}"
    if name in _SWITCHES:
        switch, such_as = _SWITCHES[name]
        if not value(switch):
            return f"with {switch}={_written(value(switch))}; set {switch}, such as {such_as}"
    if name in _SOURCES:
        members = config_mixture.parse_all(value("data.mixture"), value("data.field"))
        # A member with its own @FIELD or @reader:NAME does not read data.field.
        fields = [m.source for m in members if not m.field] if name == "data.field" else [m.source for m in members]
        found = fields if members else [value("data.source")]
        if not set(found) & set(_SOURCES[name]):
            return f"with data.source={value('data.source')}; it is read for data.source={' or '.join(_SOURCES[name])}: set that"
    if name in _INSTEAD and value(_INSTEAD[name]):
        instead, given = _INSTEAD[name], value(_INSTEAD[name])
        return f"with {instead}={_written(given)}; set {instead}={_written(type(given)())}"
    return ""


def _written(value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, str) and not value.isalnum() else str(value)
