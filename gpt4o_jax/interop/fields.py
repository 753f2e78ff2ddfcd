"""Kinds of entries in a family's table of config fields: each converts keys of config.json to knobs of ModelConfig, and back."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from gpt4o_jax.config import ModelConfig
from gpt4o_jax.errors import data_error, did_you_mean

REQUIRED = object()
LARGEST = 2**63  # magnitude of a number; more would overflow
MOST_LAYERS = 10_000


class Values:
    """The contents of a config.json; `seen` collects the keys that were read."""

    def __init__(self, values: dict, family: str, where: str = "config.json"):
        self.values, self.family, self.where = values, family, where
        self.seen: set[str] = set()

    def get(self, key: str, kind: type | tuple[type, ...] = object, default: Any = REQUIRED) -> Any:
        """The value under `key`; null counts as absent. Raises RunError if it is missing with no default, or of another type."""
        self.seen.add(key)
        value = self.values.get(key)
        if value is None:
            if default is REQUIRED:
                raise data_error(f"{self.where}: {key} is missing; family {self.family} needs it")
            return default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if float in kinds:
            kinds += (int,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds and object not in kinds):
            expected = " or ".join(k.__name__ for k in kinds)
            raise data_error(f"{self.where}: {key}={value!r:.60}, expected {expected}")
        if isinstance(value, int) and abs(value) > LARGEST:
            raise data_error(f"{self.where}: {key}={value}, expected a number of at most 63 bits")
        return value

    def refuse(self, key: str, expected: str):
        raise data_error(f"{self.where}: {key}={self.values.get(key)!r} is not supported for {self.family}; expected {expected}")


class Field(NamedTuple):
    """read(values) -> knobs; write(model) -> keys. What one writes the other reads."""

    read: Callable[[Values], dict]
    write: Callable[[ModelConfig], dict]


def same(ours: str, theirs: str, kind: type, default: Any = REQUIRED) -> Field:
    """A knob and a key with the same meaning."""

    def read(v: Values) -> dict:
        value = v.get(theirs, kind, default)
        return {ours: float(value) if kind is float else value}

    return Field(read, lambda m: {theirs: getattr(m, ours)})


def choice(ours: str, theirs: str, names: dict[str, str], default: Any = REQUIRED) -> Field:
    """A knob and a key with different names for their values. names: theirs -> ours; of several for one, the first is written."""

    def read(v: Values) -> dict:
        value = v.get(theirs, str, default)
        if value not in names:
            v.refuse(theirs, f"one of {', '.join(names)}{did_you_mean(value, names)}")
        return {ours: names[value]}

    def write(m: ModelConfig) -> dict:
        value = getattr(m, ours)
        return {theirs: next((t for t, o in names.items() if o == value), next(iter(names)))}

    return Field(read, write)


def always(**knobs) -> Field:
    """Knobs that are fixed for the family and have no key."""
    return Field(lambda v: knobs, lambda m: {})


def fixed(theirs: str, value: Any, default: Any = None) -> Field:
    """A key of which we support only one value. default: what its absence means; None: that value."""

    def read(v: Values) -> dict:
        if v.get(theirs, object, value if default is None else default) != value:
            v.refuse(theirs, repr(value))
        return {}

    return Field(read, lambda m: {theirs: value})


def idle(theirs: str, *values: Any) -> Field:
    """A key of published files that has no effect if it has one of these values; it is not written."""

    def read(v: Values) -> dict:
        value = v.get(theirs, object, None)
        if value is not None and not any(type(value) is type(x) and value == x for x in values):
            v.refuse(theirs, " or ".join(map(repr, values)))
        return {}

    return Field(read, lambda m: {})


def off_is_null(ours: str, theirs: str, default: Any = REQUIRED) -> Field:
    """A soft cap: null with them is 0 with us. default: what its absence means."""

    def read(v: Values) -> dict:
        v.seen.add(theirs)
        value = v.values.get(theirs, default)
        return {ours: 0.0 if value is None else float(v.get(theirs, float, default))}

    return Field(read, lambda m: {theirs: getattr(m, ours) or None})


def heads(default_head_dim: int | None = None) -> Field:
    """Heads, key/value heads and their width. default_head_dim: if head_dim is absent; None: width / heads."""

    def read(v: Values) -> dict:
        n_heads = v.get("num_attention_heads", int)
        default = default_head_dim or v.get("hidden_size", int) // max(n_heads, 1)
        kv_heads = v.get("num_key_value_heads", int, n_heads)
        return {"n_heads": n_heads, "n_kv_heads": kv_heads, "head_dim": v.get("head_dim", int, default)}

    def write(m: ModelConfig) -> dict:
        return {"num_attention_heads": m.n_heads, "num_key_value_heads": m.kv_heads, "head_dim": m.head_width}

    return Field(read, write)


def experts(*names: str, default: Any = REQUIRED) -> Field:
    """Number of experts, read from the first of `names` that is present; the last is written."""

    def read(v: Values) -> dict:
        name = next((n for n in names if v.get(n, object, None) is not None), names[-1])
        n = v.get(name, int, default)
        if n < 1:  # with us 0 means a model without experts
            v.refuse(name, "at least 1")
        return {"n_experts": n}

    return Field(read, lambda m: {names[-1]: m.n_experts})


def query_scalar(theirs: str, default: float) -> Field:
    """Attention scores are multiplied by its power -1/2 (Gemma)."""

    def read(v: Values) -> dict:
        scalar = v.get(theirs, float, default)
        if not scalar > 0:
            v.refuse(theirs, "a number above 0")
        return {"attention_scale": float(scalar) ** -0.5}

    def write(m: ModelConfig) -> dict:
        if m.score_scale == 0:
            return {}  # no scalar has the power 0: what is read back differs, and the model is refused
        scalar = m.head_width if m.score_scale is None else m.score_scale**-2
        return {theirs: round(scalar) if math.isclose(scalar, round(scalar), rel_tol=1e-9) else scalar}

    return Field(read, write)


# ---------------------------------------------------------------- rotary positions


def rope(default_theta: float = 10_000.0) -> Field:
    """rope_theta and rope_scaling (transformers 4), or both in rope_parameters (5); both are written."""

    def read(v: Values) -> dict:
        new, scaling = v.get("rope_parameters", dict, None), v.get("rope_scaling", dict, None)
        theta = float(v.get("rope_theta", float, default_theta))
        context = v.get("max_position_embeddings", int)
        older = read_rope(v, "rope_scaling", scaling or {}, theta, context)
        if new is None:
            return older
        newer = read_rope(v, "rope_parameters", new, theta, context)
        if _contradicts(v, newer, older):
            v.refuse("rope_parameters", "what rope_theta and rope_scaling beside it say")
        return newer

    def write(m: ModelConfig) -> dict:
        stretch = write_rope(m)
        scaling = None if m.rope_scaling == "none" else stretch
        return {
            "rope_theta": m.rope_theta,
            "rope_scaling": scaling,
            "rope_parameters": {"rope_theta": m.rope_theta, **stretch},
        }

    return Field(read, write)


def read_rope(v: Values, key: str, given: dict, theta: float, context: int) -> dict:
    """Knobs from one dict of rotary parameters. Raises RunError for kinds and parameters that are not supported."""
    if not isinstance(given, dict):
        v.refuse(key, "parameters by name")
    given = {k: x for k, x in given.items() if x is not None}
    kind = given.pop("rope_type", given.pop("type", "default"))
    given.pop("type", None)
    knobs = {"rope_theta": float(_number(v, key, given, "rope_theta", theta)), "rope_scaling": "none"}
    if kind != "default":
        known = ("linear", "yarn", "llama3")
        if kind not in known:
            v.refuse(key, f"rope_type default, {', '.join(known)}")
        knobs |= {"rope_scaling": kind, "rope_factor": float(_number(v, key, given, "factor"))}
        if knobs["rope_factor"] < 1:
            v.refuse(key, "a factor of 1 or more")
    if kind in ("yarn", "llama3"):
        original = _number(v, key, given, "original_max_position_embeddings", context)
        if original != int(original):
            v.refuse(key, "a whole number under original_max_position_embeddings")
        knobs["rope_original_context"] = int(original)
        low, high = ("beta_slow", "beta_fast") if kind == "yarn" else ("low_freq_factor", "high_freq_factor")
        defaults = (1.0, 32.0) if kind == "yarn" else (None, None)
        knobs["rope_low"], knobs["rope_high"] = (
            float(_number(v, key, given, k, d)) for k, d in zip((low, high), defaults, strict=True)
        )
    if kind == "yarn":
        usual = 0.1 * math.log(knobs["rope_factor"]) + 1
        if not math.isclose(_number(v, key, given, "attention_factor", usual), usual, rel_tol=1e-6):
            v.refuse(key, f"attention_factor 0.1 ln(factor) + 1 = {usual:.6g}, or none")
        if given.pop("truncate", True) is not True:
            v.refuse(key, "truncate true")
    if given.pop("partial_rotary_factor", 1.0) != 1:
        v.refuse(key, "partial_rotary_factor 1")
    if given:
        v.refuse(key, f"no {', '.join(sorted(given))} with rope_type {kind}")
    return knobs


def _contradicts(v: Values, newer: dict, older: dict) -> bool:
    """Whether rope_parameters disagrees with the older keys that are present."""
    said = [k for key, k in (("rope_theta", "rope_theta"), ("rope_local_base_freq", "rope_local_theta")) if v.values.get(key)]
    return any(newer.get(k) != older.get(k) for k in said) or (bool(v.values.get("rope_scaling")) and newer != older)


def _number(v: Values, key: str, given: dict, name: str, default: float | None = None) -> float:
    value = given.pop(name, default)
    known = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not known or not -LARGEST <= value <= LARGEST:
        v.refuse(key, f"a number under {name}")
    return value


def write_rope(m: ModelConfig) -> dict:
    """The dict of rotary parameters of a model, without theta."""
    if m.rope_scaling == "none":
        return {"rope_type": "default"}
    out = {"rope_type": m.rope_scaling, "factor": m.rope_factor}
    if m.rope_scaling in ("yarn", "llama3"):
        low, high = ("beta_slow", "beta_fast") if m.rope_scaling == "yarn" else ("low_freq_factor", "high_freq_factor")
        out |= {"original_max_position_embeddings": m.rope_original_context, low: m.rope_turns[0], high: m.rope_turns[1]}
    return out


# ---------------------------------------------------------------- windows

KINDS = {"sliding_attention": "local", "full_attention": "global"}


def _pattern(v: Values, types: list[str], window: int | None) -> dict:
    """Knobs from the type of each layer: the shortest pattern that repeats over them."""
    n = _layers(v)
    if len(types) != n or not all(isinstance(t, str) and t in KINDS for t in types):
        v.refuse("layer_types", f"{n} of {', '.join(KINDS)}")
    kinds = tuple(KINDS[t] for t in types)
    if "local" in kinds and window is None:
        v.refuse("sliding_window", "a number of tokens, for some layers are of sliding_attention")
    period = next(p for p in range(1, n + 1) if all(kinds[i] == kinds[i % p] for i in range(n)))
    return {"layer_pattern": kinds[:period], "window": window if "local" in kinds else None}


def _layers(v: Values) -> int:
    n = v.get("num_hidden_layers", int)
    if not 1 <= n <= MOST_LAYERS:
        v.refuse("num_hidden_layers", f"1 to {MOST_LAYERS}")
    return n


def _window(v: Values, default: int | None) -> int | None:
    """sliding_window; null: no window; absent: `default`, that of the family's class in transformers."""
    v.seen.add("sliding_window")
    return v.get("sliding_window", int, None) if "sliding_window" in v.values else default


def _types(m: ModelConfig) -> list[str]:
    theirs = {ours: t for t, ours in KINDS.items()}
    return [theirs["local" if kind.local else "global"] for kind in m.layer_kinds]


def one_window(default: int | None = None, switch: bool = False) -> Field:
    """Either every layer has the window or none (Mistral). switch: use_sliding_window says which (Qwen 3 MoE).

    With that switch published files have max_window_layers; layers below it have no window in transformers 4, but do in 5.
    """

    def read(v: Values) -> dict:
        v.seen.add("layer_types")
        window = _window(v, default)
        if switch and not v.get("use_sliding_window", bool, False):
            window = None
        if switch and v.get("max_window_layers", int, 0) > 0 and window is not None:
            v.refuse("max_window_layers", "0, or none, where use_sliding_window is true")
        kind = "full_attention" if window is None else "sliding_attention"
        types = [kind] * _layers(v)
        if v.values.get("layer_types") not in (None, types):
            v.refuse("layer_types", f"{kind} in all layers")
        return _pattern(v, types, window)

    def write(m: ModelConfig) -> dict:
        return {"sliding_window": m.window, **({"use_sliding_window": m.window is not None} if switch else {})}

    return Field(read, write)


def windows_from(first: int) -> Field:
    """Layers from max_window_layers on have the window if use_sliding_window is set (Qwen 2, 3)."""

    def read(v: Values) -> dict:
        window, start = _window(v, 4096), v.get("max_window_layers", int, first)
        if not v.get("use_sliding_window", bool, False):
            window = None
        n = _layers(v)
        types = ["full_attention" if window is None or i < start else "sliding_attention" for i in range(n)]
        return _pattern(v, v.get("layer_types", list, types), window)

    def write(m: ModelConfig) -> dict:
        types = _types(m)
        start = types.index("sliding_attention") if m.window else m.n_layers
        return {
            "use_sliding_window": m.window is not None,
            "sliding_window": m.window,
            "max_window_layers": start,
            "layer_types": types,
        }

    return Field(read, write)


def windows_in_turn(period: int, default: int) -> Field:
    """The last of every `period` layers is global (2 in Gemma 2, 6 in Gemma 3), unless layer_types says otherwise.

    sliding_window_size is the name from before the release of Gemma 2: published files have both.
    """

    def read(v: Values) -> dict:
        window = _window(v, default)
        if v.get("sliding_window_size", int, window) != window:
            v.refuse("sliding_window_size", f"{window}, as sliding_window has it, or none")
        every = v.get("sliding_window_pattern", int, v.get("_sliding_window_pattern", int, period))
        n = _layers(v)
        types = ["full_attention" if (i + 1) % max(every, 1) == 0 else "sliding_attention" for i in range(n)]
        types = v.get("layer_types", list, types)
        return _pattern(v, types, window)

    return Field(read, lambda m: {"sliding_window": m.window, "layer_types": _types(m)})


def rope_by_kind(local_theta: float = 10_000.0, global_theta: float = 1e6) -> Field:
    """Local layers have their own base and no scaling (Gemma 3)."""

    def read(v: Values) -> dict:
        new, scaling = v.get("rope_parameters", dict, None), v.get("rope_scaling", dict, None)
        theta = float(v.get("rope_theta", float, global_theta))
        local = float(v.get("rope_local_base_freq", float, local_theta))
        context = v.get("max_position_embeddings", int)
        older = read_rope(v, "rope_scaling", scaling or {}, theta, context) | {"rope_local_theta": local}
        if new is None:
            return older
        if not set(new) <= set(KINDS):
            v.refuse("rope_parameters", f"parameters for each of {', '.join(KINDS)}")
        inside = read_rope(v, "rope_parameters", new.get("sliding_attention") or {}, local, context)
        if inside["rope_scaling"] != "none":
            v.refuse("rope_parameters", "rope_type default under sliding_attention")
        newer = read_rope(v, "rope_parameters", new.get("full_attention") or {}, theta, context)
        newer["rope_local_theta"] = inside["rope_theta"]
        if _contradicts(v, newer, older):
            v.refuse("rope_parameters", "what rope_theta, rope_scaling and rope_local_base_freq beside it say")
        return newer

    def write(m: ModelConfig) -> dict:
        local = m.rope_theta if m.rope_local_theta is None else m.rope_local_theta
        return {
            "rope_theta": m.rope_theta,
            "rope_local_base_freq": local,
            "rope_scaling": None if m.rope_scaling == "none" else write_rope(m),
            "rope_parameters": {
                "full_attention": {"rope_theta": m.rope_theta, **write_rope(m)},
                "sliding_attention": {"rope_theta": local, "rope_type": "default"},
            },
        }

    return Field(read, write)
