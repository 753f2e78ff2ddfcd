"""config.json of a Hugging Face folder <-> ModelConfig, by the tables of interop/families.py."""

import dataclasses
import json
import math
from pathlib import Path

from gpt4o_jax.config import MeshConfig, ModelConfig, RunConfig, freeze, to_dict
from gpt4o_jax.errors import RunError, data_error, did_you_mean
from gpt4o_jax.interop.families import FAMILIES, NEUTRAL, Family
from gpt4o_jax.interop.fields import Values


def read(folder: Path) -> tuple[Family, ModelConfig]:
    """The family and the model that config.json describes.

    Raises RunError if there is no such file, the family is unknown, or anything in the file is not understood.
    """
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise data_error(f"{folder}: no config.json; --from takes a folder as the Hugging Face Hub lays it out") from None
    except (OSError, ValueError, RecursionError) as e:
        raise data_error(f"{path}: not readable as JSON ({e})") from None
    if not isinstance(values, dict):
        raise data_error(f"{path}: expected one JSON object")
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        near = did_you_mean(str(kind), FAMILIES)
        raise data_error(f"{path}: model_type={kind!r} is not known{near}; families: {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    classes = values.get("architectures") or [family.architecture]
    if classes != [family.architecture]:
        raise data_error(f"{path}: architectures={classes}, expected {family.architecture}: language models only")
    return family, to_model(family, values, str(path))


def to_model(family: Family, values: dict, where: str) -> ModelConfig:
    """The model that `values` of a family describe. where: file name for messages. Raises RunError for unknown keys or values."""
    v = Values(values, family.name, where)
    knobs = {"output_init": "scaled"}  # irrelevant for trained weights, but "zero" is not legal with every norm_position
    for field in family.fields:
        knobs |= field.read(v)
    if "local" not in knobs.get("layer_pattern", ()):
        knobs.pop("rope_local_theta", None)
    unknown = sorted(k for k in set(values) - v.seen - NEUTRAL if values[k] is not None)
    if unknown:
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        near = did_you_mean(unknown[0], v.seen)
        raise data_error(
            f"{where}: {unknown[0]}={values[unknown[0]]!r}{more} is not known for {family.name}{near}: it may change what the"
            " model computes; remove it if it does not"
        )
    try:
        return freeze({"model": knobs}).model
    except RunError as e:
        raise data_error(f"{where}: {e}") from None


def from_model(family: Family, model: ModelConfig) -> dict:
    """The contents of config.json for `model` as one of `family`."""
    model = dataclasses.replace(model, d_ff=model.ff_width)  # with us None means four times the width
    out = {"architectures": [family.architecture], "model_type": family.name}
    for field in family.fields:
        out |= field.write(model)
    return out


def choose(model: ModelConfig, name: str = "") -> Family:
    """The family that computes what `model` does: the first that fits, or the one named. Raises RunError if none does."""
    if name and name not in FAMILIES:
        raise RunError(f"--family={name}: not known{did_you_mean(name, FAMILIES)}; families: {', '.join(FAMILIES)}")
    misfits = {f: _misfits(FAMILIES[f], model) for f in ([name] if name else FAMILIES)}
    nearest = min(misfits, key=lambda f: misfits[f][0])
    distance, differences = misfits[nearest]
    if distance:
        only = f"--family={name} does not fit" if name else f"no family fits; the nearest is {nearest}"
        raise RunError(f"this model cannot be written for Hugging Face: {only}, which differs in {', '.join(differences)}")
    return FAMILIES[nearest]


def _misfits(family: Family, model: ModelConfig) -> tuple[float, list[str]]:
    """How many knobs change when `model` is written as `family` and read back, and which: 'knob=ours (there: theirs)'."""
    try:
        back = to_model(family, from_model(family, model), "config.json")
    except RunError as e:  # not readable: farther than any difference
        return math.inf, [str(e)]
    ours, theirs = _computed(model), _computed(back)
    different = [f"{k}={ours[k]} (there: {theirs[k]})" for k in ours if ours[k] != theirs[k]]
    return len(different), different


# Knobs that do not change what a trained model computes.
_TRAINING = (
    "init_std", "output_init", "dropout", "compute_dtype", "attention", "scan_unroll", "remat", "expert_chunk",
    "mup_base_head_dim",
)  # fmt: skip


def _computed(m: ModelConfig) -> dict:
    """The knobs that determine what is computed, with defaults resolved."""
    knobs = {k: v for k, v in to_dict(m).items() if k not in _TRAINING}
    scale = m.head_width**-0.5 if m.score_scale is None else m.score_scale
    knobs |= {"n_kv_heads": m.kv_heads, "head_dim": m.head_width, "d_ff": m.ff_width, "qkv_bias": m.biased_qkv}
    knobs |= {"attention_scale": float(f"{scale:.9g}"), "rope_fraction": m.rotary_width / m.head_width}
    if m.rope_scaling in ("yarn", "llama3"):
        knobs["rope_low"], knobs["rope_high"] = m.rope_turns
    knobs["layer_pattern"] = tuple("local" if kind.local else "global" for kind in m.layer_kinds)
    if not m.n_experts:
        names = ("experts_per_token", "expert_d_ff", "n_shared_experts", "moe_every", "router_scores", "router_normalise")
        knobs |= dict.fromkeys((*names, "router_bias"))
    else:
        knobs["expert_d_ff"] = m.expert_width
        if all(kind.experts for kind in m.layer_kinds):
            knobs["d_ff"] = None  # no layer has a feed-forward of that width
    if m.positions != "rope":
        knobs |= {"rope_theta": None, "rope_fraction": None}
    if not m.qk_norm:
        knobs["qk_norm_over"] = None
    return knobs


def run_config(model: ModelConfig, mesh: MeshConfig, compute_dtype: str) -> RunConfig:
    """The config of an imported run: knobs that the files do not mention have their defaults."""
    return dataclasses.replace(freeze({"model": to_dict(model) | {"compute_dtype": compute_dtype}}), mesh=mesh)
