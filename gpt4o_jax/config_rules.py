"""Rules between knobs, which `config.freeze` checks once every value has its type and is in its range.

Messages name both numbers and the nearest legal value.
"""

import math

from gpt4o_jax import config_mixture
from gpt4o_jax.config_mesh import micro_batches
from gpt4o_jax.errors import RunError, did_you_mean

MOST_STEPS = 2**31 - 1  # the step of a training state is an int32
MOST_DECAY = 0.99  # of a bfloat16 average: one that moves by less than 1/256 per step would not move at all


def _nearest_divisor(value: int, of: int) -> int:
    """The divisor of `of` nearest to `value`."""
    return min((d for d in range(1, of + 1) if of % d == 0), key=lambda d: abs(d - value))


def _nearest_multiple(value: float, of: int) -> int:
    return max(of, round(value / of) * of)


def validate(c) -> None:
    """Raises RunError for the first rule that the `RunConfig` c breaks."""
    m, t = c.model, c.train
    _validate_model(m)
    if m.norm_position != "pre" and m.output_init == "zero" and not c.init.from_:
        raise RunError(
            f"config.model.norm_position={m.norm_position}: a norm on a sub-layer's output undoes output_init=zero after one"
            " step; set output_init=scaled"
        )
    if (c.eval.stride or 0) > m.context_length:
        raise RunError(
            f"config.eval.stride={c.eval.stride} is larger than model.context_length={m.context_length}: tokens between two"
            f" windows would not be scored; nearest: eval.stride={m.context_length}"
        )
    if not c.sample.prompts:
        raise RunError("config.sample.prompts=(): expected at least one; ('',) starts from the beginning of a document")
    _validate_train(t)
    _validate_optimizer(c.optimizer)
    if m.router_bias and c.optimizer.name == "schedule_free":
        raise RunError(
            "config.model.router_bias=true: optimizer.name=schedule_free averages weights by how it moved them, and does not move"
            " this one; set router_bias=false, or optimizer.name=adamw"
        )
    if m.mtp_heads and not t.mtp_weight and c.objective.method == "next_token":
        raise RunError(f"config.model.mtp_heads={m.mtp_heads} does nothing with train.mtp_weight=0; such as 0.3 (DeepSeek-V3)")
    if t.patience and not (c.checkpoint.best and c.eval.every):
        raise RunError(
            f"config.train.patience={t.patience} waits for a better checkpoint.best at each evaluation; set eval.every, and"
            " checkpoint.best, such as bits_per_byte"
        )
    _validate_intervals(c)
    _validate_finetuning(c)
    _validate_data(c.data)
    _validate_mesh(c.mesh)


def _validate_train(t) -> None:
    number, unit = parse_length(t.length)
    if unit == "steps":
        validate_steps(t.length, number)
    if unit == "steps" and number % t.steps_per_dispatch:
        raise RunError(
            f"config.train.length={t.length!r} is not a whole multiple of train.steps_per_dispatch={t.steps_per_dispatch};"
            f" nearest: '{_nearest_multiple(number, t.steps_per_dispatch)} steps'"
        )
    if t.batch_size % t.accumulate:
        raise RunError(
            f"config.train.accumulate={t.accumulate} does not divide batch_size={t.batch_size};"
            f" nearest: accumulate={_nearest_divisor(t.accumulate, t.batch_size)}"
        )
    if t.batch_warmup_steps and t.batch_warmup_start >= t.accumulate:
        nearest = (
            f"batch_warmup_start={t.accumulate - 1}"
            if t.accumulate > 1
            else f"accumulate={next((d for d in range(2, t.batch_size + 1) if t.batch_size % d == 0), 2)}"
        )
        raise RunError(
            f"config.train.batch_warmup_start={t.batch_warmup_start} leaves no micro-batch to add: the batch grows from it to"
            f" accumulate={t.accumulate} of them; nearest: {nearest}"
        )
    if t.batch_warmup_start > 1 and not t.batch_warmup_steps:
        raise RunError(
            f"config.train.batch_warmup_start={t.batch_warmup_start} does nothing with batch_warmup_steps=0; set both, or neither"
        )


def _validate_intervals(c) -> None:
    """Of checkpoints among themselves, and of everything that happens between two dispatches."""
    every, keep = c.checkpoint.every, c.checkpoint.keep_every
    if every and keep and keep % every and every % keep:
        raise RunError(
            f"config.checkpoint.keep_every={keep} is not a multiple of checkpoint.every={every}: of the checkpoints only those at"
            f" multiples of {math.lcm(keep, every)} would stay; nearest: keep_every={_nearest_multiple(keep, every)}"
        )
    k = c.train.steps_per_dispatch
    for name in ("log", "eval", "sample", "checkpoint"):
        every = getattr(c, name).every
        if every % k:
            raise RunError(
                f"config.{name}.every={every} is not a multiple of train.steps_per_dispatch={k};"
                f" nearest: {name}.every={_nearest_multiple(every, k)}"
            )


def _validate_mesh(mesh) -> None:
    sizes = mesh.wanted()
    if sum(v == -1 for v in sizes.values()) > 1:
        raise RunError(f"config.mesh={sizes}: at most one axis takes what is left (-1); give the others their sizes")
    for name, default in (("pipeline_microbatches", 0), ("pipeline_repeats", 1)):
        if sizes["stage"] == 1 and getattr(mesh, name) != default:
            raise RunError(
                f"config.mesh.{name}={getattr(mesh, name)} does nothing without stages; set mesh.stage, such as 2, or leave it"
                f" at {default}"
            )


_ROWS = ("data", "fsdp", "expert")  # mesh axes that the batch is split over


def validate_sizes(c, mesh: dict[str, int]) -> None:
    """Raises RunError if something does not divide into its shards on a mesh of these sizes. c: with model.vocab_size set."""
    t = c.train
    _validate_division(mesh, "train.batch_size", t.batch_size, _ROWS, t.accumulate, "train.accumulate")
    validate_model_sizes(c, mesh)
    if mesh["stage"] > 1:
        _validate_pipeline(c, mesh["stage"], t.batch_size // t.accumulate // math.prod(mesh[a] for a in _ROWS))


def validate_model_sizes(c, mesh: dict[str, int]) -> None:
    """`validate_sizes` for a model that is used, not trained: with batches of any size."""
    m, repeats = c.model, c.mesh.pipeline_repeats
    twice = 2 if mesh["context"] > 1 else 1
    layers = "layers of a period" + (" * mesh.pipeline_repeats" if repeats > 1 else "")
    _validate_division(mesh, "model.d_model", m.d_model, ("fsdp",))
    _validate_division(mesh, "model.n_heads", m.n_heads, ("tensor",))
    _validate_division(mesh, "model.n_kv_heads", m.kv_heads, ("tensor",))
    _validate_division(mesh, "model.d_ff", m.ff_width, ("tensor",))
    _validate_division(mesh, "model.expert_d_ff", m.expert_width, ("tensor",))
    _validate_division(mesh, "model.vocab_size", m.vocab_size, ("tensor",))
    _validate_division(mesh, "model.context_length", m.context_length, ("context", "tensor"), twice, "chunks a device")
    _validate_division(mesh, "model.n_experts", m.n_experts, ("expert",))
    _validate_division(mesh, "model.n_layers", m.n_layers, ("stage",), len(m.period) * repeats, layers)


def _validate_division(mesh: dict[str, int], name: str, value: int, axes, unit: int = 1, of: str = "") -> None:
    """Raises RunError if the knob's value does not divide into whole multiples of `unit` (named by `of`) per shard."""
    axes = [a for a in axes if mesh[a] > 1]
    ways = math.prod(mesh[a] for a in axes)
    parts = unit * ways
    if ways > 1 and (value % parts or not value):
        times = f", {of}={unit}" if unit > 1 else ""
        legal = [d for d in range(1, value // unit + 1) if value % (d * unit) == 0 and d <= ways] or [1]
        raise RunError(
            f"config.{name}={value} is not a multiple of {parts} (mesh axes {' * '.join(axes)}{times}); nearest:"
            f" {name}={max(1, -(-value // parts)) * parts}, or {' * '.join(f'mesh.{a}' for a in axes)} one of"
            f" {', '.join(map(str, legal))}"
        )


def _validate_pipeline(c, stages: int, rows: int) -> None:
    """rows: per device."""
    wanted, repeats = c.mesh.pipeline_microbatches, c.mesh.pipeline_repeats
    if wanted and rows % wanted:
        raise RunError(
            f"config.mesh.pipeline_microbatches={wanted} does not divide the {rows} rows of a device (train.batch_size="
            f"{c.train.batch_size} over train.accumulate and the mesh axes data, fsdp and expert); nearest:"
            f" pipeline_microbatches={_nearest_divisor(wanted, rows)}"
        )
    found = micro_batches(rows, stages, wanted)
    if repeats > 1 and found < stages:
        raise RunError(
            f"config.mesh.pipeline_repeats={repeats} needs as many micro-batches as stages, {stages}, and {found} come from the"
            f" {rows} rows of a device; nearest: pipeline_repeats=1, or train.batch_size={c.train.batch_size // rows * stages}"
        )


def _validate_model(m) -> None:
    if m.head_dim is None and m.d_model % m.n_heads:
        raise RunError(
            f"config.model.d_model={m.d_model} is not a multiple of n_heads={m.n_heads};"
            f" nearest: d_model={_nearest_multiple(m.d_model, m.n_heads)}, or set head_dim"
        )
    if m.n_heads % m.kv_heads:
        raise RunError(
            f"config.model.n_kv_heads={m.kv_heads} does not divide n_heads={m.n_heads};"
            f" nearest: n_kv_heads={_nearest_divisor(m.kv_heads, m.n_heads)}"
        )
    if 2 * m.value_embeddings > m.n_layers:
        raise RunError(
            f"config.model.value_embeddings={m.value_embeddings}: the first and the last as many layers overlap with"
            f" n_layers={m.n_layers}; nearest: value_embeddings={m.n_layers // 2}"
        )
    if m.mtp_heads >= m.context_length:
        raise RunError(
            f"config.model.mtp_heads={m.mtp_heads} looks beyond context_length={m.context_length};"
            f" nearest: mtp_heads={m.context_length - 1}"
        )
    if not m.qk_norm and m.qk_norm_over != "head":
        raise RunError(f"config.model.qk_norm_over={m.qk_norm_over} does nothing with qk_norm=false; set qk_norm=true, or head")
    if m.positions == "rope":
        _validate_rope(m)
    elif m.rope_scaling != "none":
        raise RunError(f"config.model.rope_scaling={m.rope_scaling} needs positions=rope, got positions={m.positions}")
    if m.rope_local_theta is not None and (m.positions != "rope" or "local" not in m.layer_pattern):
        raise RunError(
            f"config.model.rope_local_theta={m.rope_local_theta:g} needs positions=rope and local layers, got"
            f" positions={m.positions} and layer_pattern={m.layer_pattern}; set it to None"
        )
    if m.mup_base_head_dim and not m.mup_base_width:
        raise RunError(
            f"config.model.mup_base_head_dim={m.mup_base_head_dim} does nothing without muP; set mup_base_width, or leave it None"
        )
    for name in ("d_ff", "expert_d_ff") if m.mup_base_width else ():
        width = getattr(m, name)
        if width and width * m.mup_base_width % m.d_model:
            raise RunError(
                f"config.model.{name}={width}: muP grows all widths alike, and no whole {name} is to mup_base_width="
                f"{m.mup_base_width} as {width} to d_model={m.d_model}; nearest:"
                f" {name}={_nearest_multiple(width, m.d_model // math.gcd(m.d_model, m.mup_base_width))}"
            )
    if m.mup_base_head_dim and m.attention_scale is not None:
        raise RunError(
            f"config.model.mup_base_head_dim={m.mup_base_head_dim} does nothing with attention_scale={m.attention_scale:g};"
            " set one of them to None"
        )
    _validate_experts(m)
    _validate_pattern(m)


def _validate_experts(m) -> None:
    if not m.n_experts:
        for name in ("expert_d_ff", "n_shared_experts", "expert_chunk", "router_bias"):
            if getattr(m, name):
                raise RunError(f"config.model.{name}={getattr(m, name)} does nothing without experts; set n_experts, such as 8")
        if m.moe_every > 1:
            raise RunError(f"config.model.moe_every={m.moe_every} does nothing without experts; set n_experts, such as 8")
        return
    if m.experts_per_token > m.n_experts:
        raise RunError(
            f"config.model.experts_per_token={m.experts_per_token} is more than n_experts={m.n_experts};"
            f" nearest: experts_per_token={m.n_experts}"
        )
    if m.bias:
        raise RunError(
            "config.model.bias=true: experts have no biases; set bias=false (and qkv_bias=true for those of attention)"
        )


def validate_router(m) -> None:
    """Raises RunError if the router of a new model could not learn. Imported models of this kind can be used."""
    if m.n_experts and m.experts_per_token == 1 and m.router_normalise:
        raise RunError(
            "config.model.router_normalise=true: with experts_per_token=1 every weight is 1, and the router learns nothing from"
            " the task; set router_normalise=false (Switch), or experts_per_token=2"
        )


def _validate_pattern(m) -> None:
    kinds = ("global", "local")
    for kind in m.layer_pattern or ("",):
        if kind not in kinds:
            hint = did_you_mean(kind, kinds)
            raise RunError(f"config.model.layer_pattern={m.layer_pattern}: got {kind!r}, expected {' or '.join(kinds)}{hint}")
    period = max(len(m.layer_pattern), m.moe_every)
    if m.n_layers < period:
        raise RunError(
            f"config.model.n_layers={m.n_layers} is less than the {period} layers of layer_pattern or moe_every;"
            f" nearest: n_layers={period}"
        )
    period = len(m.period)
    if m.n_layers // period % m.scan_unroll:
        of = f"n_layers={m.n_layers}" if period == 1 else f"the {m.n_layers // period} whole periods of {period} layers"
        raise RunError(
            f"config.model.scan_unroll={m.scan_unroll} does not divide {of};"
            f" nearest: scan_unroll={_nearest_divisor(m.scan_unroll, m.n_layers // period)}"
        )
    if "local" in m.layer_pattern and m.window is None:
        raise RunError("config.model.window=None: local layers in layer_pattern need a width in tokens, such as window=1024")
    if m.window is not None and "local" not in m.layer_pattern:
        raise RunError(f"config.model.window={m.window} does nothing without local layers; set layer_pattern=('local',)")


def _validate_rope(m) -> None:
    if m.rope_fraction == 1 and m.head_width % 2:
        raise RunError(f"config.model.head_dim={m.head_width}: rotary positions need an even width; nearest: {m.head_width + 1}")
    if m.rotary_width < 2 or m.rotary_width % 2:
        even = max(2, m.rotary_width // 2 * 2)
        raise RunError(
            f"config.model.rope_fraction={m.rope_fraction} rotates {m.rotary_width} of {m.head_width} coordinates, expected an"
            f" even number from 2 on; nearest: rope_fraction={math.ceil(1e6 * even / m.head_width) / 1e6:.8g}"
        )
    if m.rope_scaling == "none" and m.rope_factor != 1:
        raise RunError(
            f"config.model.rope_factor={m.rope_factor:g} does nothing with rope_scaling=none; choose linear, ntk, yarn or"
            " llama3, or leave rope_factor at 1"
        )
    if m.rope_scaling == "ntk" and m.rotary_width < 4:
        raise RunError(f"config.model.rope_scaling=ntk needs two pairs, got {m.rotary_width} rotated coordinates; nearest: 4")
    ramp = {name: getattr(m, name) for name in ("rope_original_context", "rope_low", "rope_high")}
    if m.rope_scaling not in ("yarn", "llama3"):
        for name, value in ramp.items():
            if value is not None:
                raise RunError(f"config.model.{name}={value:g} does nothing with rope_scaling={m.rope_scaling}; set it to None")
        return
    if m.rope_original_context is None:
        raise RunError(
            f"config.model.rope_original_context=None: rope_scaling={m.rope_scaling} needs the context before stretching;"
            f" nearest: context_length / rope_factor = {max(1, round(m.context_length / m.rope_factor))}"
        )
    if m.rope_scaling == "yarn" and m.rope_theta == 1:
        raise RunError("config.model.rope_theta=1: all pairs turn alike, and rope_scaling=yarn tells them apart; expected more")
    low, high = m.rope_turns
    if not 0 < low < high:
        raise RunError(f"config.model.rope_low={low:g}, rope_high={high:g}: expected 0 < rope_low < rope_high, such as 1 and 4")


def _validate_optimizer(o) -> None:
    if o.moment_dtype == "bfloat16":
        validate_moments(o)
    if o.name != "schedule_free":
        return
    free = "config.optimizer.name=schedule_free"
    if o.schedule in ("cosine", "wsd"):
        raise RunError(f"{free} takes the place of schedule={o.schedule}; nearest: optimizer.schedule=constant")
    if o.ema_decay:
        raise RunError(f"{free} averages the weights itself, ema_decay={o.ema_decay} would do it twice; set ema_decay=0")
    if not o.b1:
        raise RunError(f"{free} needs b1 above 0 (got {o.b1}); nearest usual value: b1=0.9")


def validate_moments(o) -> None:
    """Raises RunError if this optimizer's moments cannot be kept in bfloat16."""
    given = "config.optimizer.moment_dtype=bfloat16"
    averages = {"adamw": ("b1", "b2"), "muon": ("b1", "b2", "muon_momentum"), "lion": ("b2",)}
    if o.name not in averages:
        raise RunError(f"{given} does nothing with optimizer.name={o.name}; set it to float32, or take {', '.join(averages)}")
    for name in averages[o.name]:
        if getattr(o, name) > MOST_DECAY:
            raise RunError(
                f"{given}: of 8 bits a step of 1 - {name} = {1 - getattr(o, name):.2g} is rounded away; nearest:"
                f" {name}={MOST_DECAY}, or moment_dtype=float32"
            )


def parse_length(text: str) -> tuple[float, str]:
    """'2000 steps' -> (2000.0, 'steps'); units are steps, tokens, epochs. Raises RunError."""
    parts = text.split()
    try:
        number, unit = float(parts[0].replace("_", "")), parts[1]
        if len(parts) != 2 or unit not in ("steps", "tokens", "epochs") or not 0 < number < math.inf:
            raise ValueError
    except (ValueError, IndexError):
        raise RunError(f"config.train.length={text!r}: expected 'N steps', 'N tokens' or 'N epochs', N above 0") from None
    return number, unit


def validate_steps(length: str, steps: float) -> None:
    """Raises RunError if train.length is more steps than can be counted."""
    if steps > MOST_STEPS:
        raise RunError(f"config.train.length={length!r} is {steps:.4g} steps; nearest: {MOST_STEPS}, the most that 32 bits count")


def _validate_finetuning(c) -> None:
    if c.lora.rank and not c.init.from_:
        raise RunError(
            f"config.lora.rank={c.lora.rank}: adapters belong to the weights of a run; set init.from to its folder, or rank=0"
        )
    if c.lora.rank and not c.lora.targets:
        raise RunError("config.lora.targets=(): expected at least one pattern; ('*',) gives every hidden matrix an adapter")
    o, sources = c.objective, {"dpo": ("conversations", "world"), "grpo": ("world",)}.get(c.objective.method)
    if sources is None:
        return
    given = f"config.objective.method={o.method}"
    if not c.init.from_:
        raise RunError(f"{given} goes on from a model that answers already; set init.from to the folder of its run")
    if c.data.source not in sources:
        what = {"dpo": "pairs of answers", "grpo": "questions whose answers can be checked"}[o.method]
        raise RunError(f"{given} needs {what}: data.source={' or '.join(sources)}, got {c.data.source}")
    if c.model.mtp_heads and c.train.mtp_weight:
        raise RunError(
            f"config.train.mtp_weight={c.train.mtp_weight}: {given} trains no heads of multi-token prediction; set mtp_weight=0,"
            f" which leaves the model's mtp_heads={c.model.mtp_heads} as they are"
        )
    for name, value, legal, why in (
        ("train.z_loss", c.train.z_loss, (0.0,), "has no such part"),
        ("data.loss_on", c.data.loss_on, ("answers",), "learns from answers, not from what stands before them"),
        ("data.rows", c.data.rows, ("packed", "first_fit"), "keeps every conversation whole"),
    ):
        if value not in legal:
            raise RunError(f"config.{name}={value}: {given} {why}; leave it at {legal[0]}")
    if o.method == "dpo" and not o.beta > 0:
        raise RunError(f"config.objective.beta={o.beta}: {given} learns nothing with it; expected above 0, such as 0.1")
    if o.method == "grpo" and c.train.batch_size % o.group:
        raise RunError(
            f"config.objective.group={o.group} does not divide train.batch_size={c.train.batch_size}; nearest:"
            f" group={_nearest_divisor(o.group, c.train.batch_size)}"
        )
    if o.method == "grpo" and parse_length(c.train.length)[1] == "epochs":
        raise RunError(f"{given}: train.length={c.train.length!r}: questions never end; give steps, such as '200 steps'")
    if o.method == "grpo" and c.data.world_items != (default := type(c.data).world_items):
        raise RunError(f"config.data.world_items={c.data.world_items}: {given} asks ever new questions; leave it at {default}")
    if o.method == "grpo" and c.train.batch_warmup_steps:
        raise RunError(f"{given} samples whole batches; set train.batch_warmup_steps=0")


def _validate_data(d) -> None:
    if d.mixture and d.source != "mixture":
        raise RunError(f"config.data.mixture={d.mixture!r} needs data.source=mixture, got data.source={d.source}")
    if d.source == "mixture":
        if not d.mixture:
            raise RunError(
                "config.data.mixture is empty; data.source=mixture needs it: --config.data.mixture=\"('python_docs=1',)\""
            )
        if d.path:
            raise RunError(f"config.data.path={d.path!r}: the members of a mixture name their own paths; set data.path=''")
        config_mixture.parse_all(d.mixture, d.field)
    elif d.source != "python_docs" and not d.path:
        example = {"tfds": "NAME/CONFIG:SPLIT", "world": "NAME"}.get(d.source, "FILE")
        raise RunError(f"config.data.path is empty; data.source={d.source} needs it: --config.data.path={example}")
    _validate_conversations(d)
    for name, needed in (("holdout_path", ""), ("rows", "packed"), ("holdout", "hash"), ("shingle_bytes", 0)):
        if d.lanes and getattr(d, name) != needed:
            raise RunError(
                f"config.data.{name}={getattr(d, name)} needs the whole text before training, and data.lanes={d.lanes} never"
                f" holds it; set data.{name}={needed}"
            )
    if d.workers > d.prefetch:
        raise RunError(
            f"config.data.workers={d.workers} is more than data.prefetch={d.prefetch}: the rest would have nothing to build;"
            f" nearest: data.prefetch={d.workers}"
        )
    if d.holdout == "tail" and d.shingle_bytes:
        raise RunError(
            f"config.data.shingle_bytes={d.shingle_bytes}: near-duplicates can be dropped only with"
            " data.holdout=hash; set shingle_bytes=0"
        )


def _validate_conversations(d) -> None:
    alone = (d.source, config_mixture.READER if d.reader else "")
    sources = [(m.source, m.field) for m in config_mixture.parse_all(d.mixture, d.field)] or [alone]
    talks = [s for s, field in sources if s in ("conversations", "world") or field.startswith(config_mixture.READER)]
    if d.reader and d.source not in ("jsonl", "parquet", "tfds"):
        hint = "write @reader:NAME behind the path of a member" if d.source == "mixture" else "leave it empty"
        raise RunError(f"config.data.reader={d.reader} is for data.source=jsonl, parquet or tfds, got {d.source}; {hint}")
    for name, default in (("template", ""), ("loss_on", "answers")):
        if getattr(d, name) != default and not talks:
            raise RunError(f"config.data.{name}={getattr(d, name)} does nothing without conversations; leave it at {default!r}")
    if talks and d.lanes:
        raise RunError(f"config.data.lanes={d.lanes}: lanes read texts, and {talks[0]} gives conversations; set data.lanes=0")
    if talks and d.holdout == "tail":
        raise RunError(f"config.data.holdout=tail cuts documents, and {talks[0]} gives conversations; set data.holdout=hash")
    given = f"config.data.holdout_path={d.holdout_path!r}"
    if d.holdout_path and d.source in ("mixture", "python_docs", "world"):
        raise RunError(f"{given}: data.source={d.source} has hold-outs of its own; set data.holdout_path=''")
    if d.holdout_path and d.holdout == "tail":
        raise RunError(f"{given} takes the place of data.holdout=tail; set data.holdout=hash")
