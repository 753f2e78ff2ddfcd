"""Every setting (knob) of a run: type, default, description. Those of model, mesh and fine-tuning are in config_*.py.

Each default is defined once, there or here. `base_config()` returns them as an ml_collections ConfigDict, which the files in
configs/ override, and the command line overrides those; `freeze()` turns the result into a validated, immutable `RunConfig`.
"""

import ast
import dataclasses
import math
import types
import typing
from typing import Any

from gpt4o_jax.config_finetune import LoraConfig, ObjectiveConfig
from gpt4o_jax.config_mesh import MeshConfig
from gpt4o_jax.config_mixture import SOURCES
from gpt4o_jax.config_model import ModelConfig, knob
from gpt4o_jax.config_rules import MOST_STEPS, validate
from gpt4o_jax.errors import RunError, did_you_mean


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    kind: str = knob(
        "bpe", "SentencePiece BPE trained on the run's own source, raw bytes, or characters.", ("bpe", "byte", "char")
    )
    vocab_size: int = knob(
        2048, "Vocabulary size of a bpe tokenizer, including reserved ids and 256 byte tokens.", low=300, high=2**20
    )
    path: str = knob(
        "", "An existing tokenizer to use instead of training one: a file, or the folder of a run or of a published model."
    )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    source: str = knob("python_docs", "Where documents come from.", (*SOURCES, "mixture"))
    path: str = knob(
        "",
        "A file, folder, glob or gs:// address of text, jsonl, parquet or conversations files; for tfds: NAME/CONFIG:SPLIT; for"
        " world: its name.",
    )
    field: str = knob("text", "For jsonl, parquet and tfds: the key, column or feature that holds a document.")
    reader: str = knob(
        "",
        "For jsonl, parquet and tfds: how a record becomes a conversation (tasks/readers.py); empty: data.field is text.",
    )
    template: str = knob("", "Chat template: own, chatml, llama3, ...; empty: that of the tokenizer's model, else own.")
    loss_on: str = knob("answers", "Tokens of a conversation in the loss: the assistant's turns, or all.", ("answers", "all"))
    world_items: int = knob(100_000, "For world: number of generated training items.", low=1)
    tfds_dir: str = knob("", "For tfds: folder of prepared datasets; empty: TFDS_DATA_DIR, else ~/tensorflow_datasets.")
    mixture: tuple[str, ...] = knob(
        (), "For mixture: its members as SOURCE:PATH=WEIGHT or SOURCE:PATH@FIELD=WEIGHT; weights are relative shares of the rows."
    )
    separator: str = knob("", "For text: split files into documents at this string; empty: one file, one document.")
    holdout: str = knob(
        "hash", "Held-out documents: chosen by a hash of their text, or the tail of the corpus.", ("hash", "tail")
    )
    holdout_fraction: float = knob(0.05, "Share of documents (hash, world) or of characters (tail) held out.", low=1e-4, high=0.9)
    holdout_path: str = knob("", "A separate hold-out instead, written like data.path, such as a dataset's validation split.")
    shingle_bytes: int = knob(
        50,
        "Length of the byte runs (shingles) by which near-duplicates of the hold-out are found and dropped; 0: keep all.",
        low=0,
    )
    shingle_share: float = knob(
        0.5,
        "A training document is a near-duplicate if it shares this part of its own or a held-out one's shingles; 0: any shingle.",
        low=0.0,
        high=1.0,
    )
    rows: str = knob(
        "packed",
        "packed: shuffled documents laid end to end and cut into rows; first_fit: whole documents side by side, with padding;"
        " windows: random contiguous windows.",
        ("packed", "first_fit", "windows"),
    )
    lanes: int = knob(
        0,
        "For text too large to tokenise in advance: number of streams of documents that are tokenised while training, with rows"
        " taken from each in turn (data/lanes.py); 0: tokenise once, into data.cache_dir.",
        low=0,
        high=2**16,
    )
    prefetch: int = knob(2, "Number of dispatches whose batches data.workers build in advance.", low=1, high=64)
    workers: int = knob(
        1,
        "Threads that build batches, at most data.prefetch; 0: build each batch when it is needed.",
        low=0,
        high=64,
    )
    cache_dir: str = knob("", "Folder of tokenised corpora; empty: gpt4o_jax/ in the user's cache folder.")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    name: str = knob(
        "adamw",
        "muon: Muon on hidden matrices, AdamW on everything else; schedule_free: Schedule-Free AdamW, evaluated at its average.",
        ("adamw", "muon", "lion", "adafactor", "schedule_free"),
    )
    peak_lr: float = knob(
        1e-3, "Peak learning rate, except for Muon's matrices; Lion needs 3 to 10 times less than AdamW.", low=0.0
    )
    muon_lr: float = knob(0.02, "muon: peak learning rate of hidden matrices.", low=0.0)
    muon_momentum: float = knob(0.95, "muon: Nesterov momentum.", low=0.0, high=0.9999)
    b1: float = knob(
        0.9,
        "Decay of the first moment (adafactor: 0 keeps none); schedule_free: gradients at b1 * average + (1 - b1) * iterate.",
        low=0.0,
        high=0.9999,
    )
    b2: float = knob(
        0.95,
        "Decay of the second moment, and of Lion's momentum; Adafactor derives its own from the step.",
        low=0.0,
        high=0.999999,
    )
    moment_dtype: str = knob(
        "float32",
        "Storage type of the moments of adamw, muon and lion, which are computed in float32; bfloat16 halves their memory.",
        ("float32", "bfloat16"),
    )
    offload: bool = knob(
        False, "Keep the optimizer state in host memory (pinned_host) between updates, where the platform supports it."
    )
    eps: float = knob(1e-8, "adamw, muon and schedule_free: added to the square root of the second moment.", low=0.0)
    weight_decay: float = knob(0.1, "Decoupled weight decay, multiplied by the learning rate.", low=0.0)
    decay_mask: str = knob(
        "matrices",
        "Weights that decay. matrices: hidden matrices, embeddings, learned positions, head; hidden: only the first; all.",
        ("matrices", "hidden", "all"),
    )
    clip_norm: float = knob(1.0, "Global gradient norm is clipped to this; 0: no clipping.", low=0.0)
    schedule: str = knob("cosine", "Shape of the learning rate after warm-up.", ("cosine", "wsd", "inverse_sqrt", "constant"))
    warmup_steps: int = knob(100, "Steps of linear warm-up from 0.", low=0, high=MOST_STEPS)
    decay_fraction: float = knob(0.2, "wsd: final fraction of all steps, over which the rate falls linearly.", low=0.0, high=1.0)
    end_lr_fraction: float = knob(
        0.1,
        "cosine, wsd: fraction of the peak that the rate falls to, one step after the last.",
        low=0.0,
        high=1.0,
    )
    ema_decay: float = knob(0.0, "Exponential moving average of the weights, used for evaluation; 0: off.", low=0.0, high=0.99999)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    length: str = knob("2000 steps", "Length of training: 'N steps', 'N tokens' or 'N epochs'.")
    batch_size: int = knob(8, "Rows of the global batch.", low=1)
    accumulate: int = knob(1, "Gradient accumulation: micro-batches per step; divides batch_size.", low=1)
    batch_warmup_steps: int = knob(
        0,
        "Batch-size warm-up: steps over which the batch grows, by micro-batches, to batch_size; 0: full size from the start.",
        low=0,
        high=MOST_STEPS,
    )
    batch_warmup_start: int = knob(1, "Batch-size warm-up: micro-batches per step at the start.", low=1)
    steps_per_dispatch: int = knob(10, "Optimizer steps compiled into one call; cadences are multiples of it.", low=1)
    z_loss: float = knob(0.0, "Weight of the squared log-normaliser in the objective (PaLM: 1e-4); 0: off.", low=0.0)
    mtp_weight: float = knob(0.3, "Weight of the mean loss of model.mtp_heads in the objective.", low=0.0)
    balance_loss: float = knob(0.01, "Weight of the load-balancing loss of mixtures of experts (Switch); 0: off.", low=0.0)
    router_z_loss: float = knob(0.0, "Weight of the squared log-normaliser of routers (ST-MoE: 1e-3); 0: off.", low=0.0)
    router_bias_rate: float = knob(1e-3, "Update rate of model.router_bias per training step.", low=0.0)
    loss_chunk: int = knob(512, "Positions of a row whose logits are computed at once in the loss.", low=1)
    patience: int = knob(
        0, "Early stopping: evaluations without improvement of checkpoint.best before the run ends; 0: never.", low=0
    )
    max_skipped_in_a_row: int = knob(10, "Stop as diverged after this many non-finite steps in a row.", low=1)


@dataclasses.dataclass(frozen=True)
class LogConfig:
    every: int = knob(10, "Steps between metric records.", low=1)
    tensorboard: bool = knob(True, "Also write TensorBoard event files.")
    wandb: str = knob("", "Weights & Biases project that also gets the records (requirements-wandb.txt); empty: off.")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    every: int = knob(500, "Steps between evaluations on the hold-out; 0: only at the end.", low=0)
    max_tokens: int = knob(
        50_000,
        "Hold-out tokens, shared evenly by the sources, after which a periodic evaluation begins no other document (for dpo: as"
        " many whole rows as they fill); the final one uses all.",
        low=1,
    )
    stride: int | None = knob(None, "Tokens between evaluation windows; None: half the context.", low=1)
    batch_size: int = knob(16, "Batch size of evaluation: windows, or prompts of tasks.", low=1)
    tasks: tuple[str, ...] = knob(
        (),
        "Tasks answered greedily at each evaluation: applications, worlds (tasks/worlds), or holdout (held-out conversations).",
    )
    task_items: int = knob(50, "Items per slice of a task, in evaluations during training.", low=1)


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    every: int = knob(500, "Steps between samples written to samples/STEP.txt; 0: only at the end.", low=0)
    prompts: tuple[str, ...] = knob(("",), "Prompts, with one sample each.")
    max_new_tokens: int = knob(100, "Maximum length of a sample, in tokens.", low=1)
    temperature: float = knob(0.8, "Sampling temperature; 0: greedy.", low=0.0, high=100.0)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every: int = knob(500, "Steps between checkpoints; the last step is always saved. 0: only the last.", low=0)
    keep_last: int = knob(2, "Newest checkpoints kept.", low=1)
    best: str = knob(
        "", "Evaluation metric, such as numbers/exact_match: the best checkpoint by it is kept, and used by other commands."
    )
    keep_every: int = knob(0, "Checkpoints at multiples of this many steps are kept permanently; 0: none.", low=0)


@dataclasses.dataclass(frozen=True)
class InitConfig:
    from_: str = knob("", "A run folder to take initial weights from (its best checkpoint, if it keeps one, else the newest).")
    model: bool = knob(
        False, "Also take the model config and tokenizer of init.from, except where the command line overrides them."
    )


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """All settings of a run, saved as config.json in its folder."""

    seed: int = knob(0, "Seeds initialisation, data order and dropout.", low=0, high=2**31 - 1)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    sample: SampleConfig = dataclasses.field(default_factory=SampleConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    init: InitConfig = dataclasses.field(default_factory=InitConfig)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)


# ---------------------------------------------------------------- to and from plain dicts


def _key(field: dataclasses.Field) -> str:
    return field.name.rstrip("_")  # `from` is a Python keyword: the field is `from_`


def to_dict(config: Any) -> dict:
    """A dataclass of this file as nested plain dicts, as written to config.json."""
    return {
        _key(f): to_dict(v) if dataclasses.is_dataclass(v := getattr(config, f.name)) else v for f in dataclasses.fields(config)
    }


def knobs(cls: type = RunConfig, prefix: str = "") -> dict[str, dataclasses.Field]:
    """Every knob by its dotted name: {'seed': Field, 'model.d_model': Field, ...}."""
    found = {}
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(f.type):
            found |= knobs(f.type, f"{prefix}{_key(f)}.")
        else:
            found[prefix + _key(f)] = f
    return found


def base_config():
    """The defaults as a locked ml_collections ConfigDict, for files in configs/ to override."""
    from ml_collections import config_dict

    def build(cls):
        out = {}
        for f in dataclasses.fields(cls):
            if dataclasses.is_dataclass(f.type):
                out[_key(f)] = build(f.type)
            elif f.default is None:
                out[_key(f)] = config_dict.placeholder(_scalar_type(f.type))
            else:
                out[_key(f)] = f.default
        return out

    return config_dict.ConfigDict(build(RunConfig)).lock()


def _scalar_type(annotation: Any) -> type:
    """int for int and Optional[int]; tuple for Tuple[str, ...]."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return next(a for a in typing.get_args(annotation) if a is not type(None))
    return tuple if origin is tuple else annotation


def parse_value(name: str, text: str) -> Any:
    """A command-line string converted to the type of knob `name`. Raises RunError."""
    field = knobs()[name]
    kind = _scalar_type(field.type)
    if text == "None" and typing.get_origin(field.type) in (typing.Union, types.UnionType):
        return None
    try:
        if kind is str:
            return text
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if kind is int:
            value = float(text) if "e" in text.lower() else int(text.replace("_", ""))
            if value != int(value):
                raise ValueError
            return int(value)
        if kind is float:
            return float(text)
        value = ast.literal_eval(text)
        return value if isinstance(value, tuple) else (value,)
    except (ValueError, KeyError, SyntaxError, OverflowError, TypeError, RecursionError, MemoryError):
        example = {int: "12", float: "3e-4", bool: "true", tuple: "\"('a','b')\""}[kind]
        raise RunError(f"--config.{name}={text}: not {_article(kind)}; write for example --config.{name}={example}") from None


def _article(kind: type) -> str:
    return {int: "an integer", float: "a number", bool: "true or false", str: "a string", tuple: "a tuple of strings"}[kind]


def freeze(values: dict) -> RunConfig:
    """Plain dicts, nested or by dotted names -> RunConfig. Unknown keys, wrong types and values raise RunError."""
    known = knobs()
    if not isinstance(values, dict):
        raise RunError(f"config: got {values!r}, expected knobs by name")
    flat = flatten(values)
    for name in flat:
        if name not in known:
            raise RunError(f"config key {name!r} does not exist{did_you_mean(name, known)}")
    checked = {name: _checked(name, known[name], value) for name, value in flat.items()}

    def build(cls, prefix=""):
        args = {}
        for f in dataclasses.fields(cls):
            name = prefix + _key(f)
            if dataclasses.is_dataclass(f.type):
                args[f.name] = build(f.type, name + ".")
            elif name in checked:
                args[f.name] = checked[name]
        return cls(**args)

    config = build(RunConfig)
    validate(config)
    return config


def flatten(values: dict, prefix: str = "") -> dict:
    """{'model': {'d_model': 1}} -> {'model.d_model': 1}. Raises RunError if a section is not a dict."""
    sections = {name.split(".")[0] for name in knobs() if "." in name}
    flat = {}
    for key, value in values.items():
        if prefix == "" and key in sections:
            if not isinstance(value, dict):
                raise RunError(f"config.{key}: got {value!r}, expected a section such as config.{key}.<knob>")
            flat |= flatten(value, f"{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _checked(name: str, field: dataclasses.Field, value: Any) -> Any:
    """`value`, if it matches its knob's type, choices and range; else raises RunError."""
    kind, meta = _scalar_type(field.type), field.metadata
    if value is None:
        if field.default is None:
            return None
        raise RunError(f"config.{name}: got None, expected {_article(kind)}")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is tuple and isinstance(value, (list, tuple)):
        value = tuple(value)
        if not all(isinstance(v, str) for v in value):
            raise RunError(f"config.{name}: got {value!r}, expected a tuple of strings")
    if type(value) is not kind:
        raise RunError(f"config.{name}: got {value!r}, expected {_article(kind)}")
    if meta["choices"] and value not in meta["choices"]:
        hint = did_you_mean(value, meta["choices"])
        raise RunError(f"config.{name}: got {value!r}, expected one of {', '.join(meta['choices'])}{hint}")
    if kind in (int, float):
        low, high = meta["low"], meta["high"]
        if not math.isfinite(value) or (low is not None and value < low) or (high is not None and value > high):
            legal = f"at least {low}" if high is None else f"from {low} to {high}"
            raise RunError(f"config.{name}: got {value}, expected a number {legal}")
    return value
