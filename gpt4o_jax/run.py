"""A run folder, opened: the starting point of every command but `train`.

config.json  tokenizer.model  metrics.jsonl  tensorboard/  checkpoints/STEP/  samples/STEP.txt
report.md  loss.png  training.png; with data.lanes, lanes/: tokens of what was read

With a published tokenizer: tokenizer.extra.json, and tokenizer.json instead of tokenizer.model. chat_template.jinja, and
additional_chat_templates/ if there are more: conversation formats of the tokenizer's model.
"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable

import jax
from etils import epath

from gpt4o_jax import origin, parallel
from gpt4o_jax.checkpoint import manifest
from gpt4o_jax.checkpoint.store import Store
from gpt4o_jax.config import RunConfig, flatten, freeze, to_dict
from gpt4o_jax.config_finetune import LoraConfig
from gpt4o_jax.config_rules import validate_model_sizes, validate_router, validate_sizes
from gpt4o_jax.data import corpus as corpora
from gpt4o_jax.data import tokenizer as tokenizers
from gpt4o_jax.data import tokenizer_published as published
from gpt4o_jax.data.corpus import Corpus
from gpt4o_jax.data.tokenizer import Tokenizer
from gpt4o_jax.errors import ExitCode, RunError, data_error
from gpt4o_jax.model import gpt, lora
from gpt4o_jax.model.attention import implementation
from gpt4o_jax.ops.compute import Compute, resolve_dtype
from gpt4o_jax.paths import entries, of_user, run_folder


@dataclasses.dataclass
class Run:
    """A trained model with everything needed to use it. Use it under `with jax.set_mesh(run.mesh):`."""

    workdir: epath.Path
    config: RunConfig
    tokenizer: Tokenizer
    mesh: jax.sharding.Mesh
    model: gpt.GPT
    params: dict
    step: int


def open_run(workdir, step: int | None = None) -> Run:
    """Opens `workdir` at `step` (None: the best checkpoint if the run keeps one, else the newest).

    Weights are averaged ones if the run keeps them; adapters are merged into their base weights. Raises RunError if the folder is
    missing, not a run, damaged, inconsistent, or without that checkpoint.
    """
    workdir = run_folder("--workdir", workdir)
    config = read_config(workdir)
    tokenizer = tokenizers.load(workdir)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise data_error(
            f"{workdir}: the tokenizer has {tokenizer.vocab_size} pieces, but the model only"
            f" {config.model.vocab_size}; the tokenizer is not the one this run was trained with"
        )
    store = Store(workdir / "checkpoints")
    steps = store.steps()
    if not steps:
        raise data_error(f"{workdir}: no finished checkpoint yet; train first, or wait for the first one")
    step = store.chosen() if step is None else step
    if step not in steps:
        raise data_error(f"{workdir}: no checkpoint of step {step}; there are {', '.join(map(str, steps))}")
    manifest.verify(store.path(step))
    stored = store.meta(step)["tokenizer"]
    if stored != tokenizer.digest:
        raise data_error(
            f"{workdir}: the tokenizer (digest {tokenizer.digest}) is not the one that checkpoint {step} was"
            f" trained with (digest {stored}); put the original file back"
        )
    mesh = parallel.make_mesh(config.mesh if _fits(config) else type(config.mesh)())
    with jax.set_mesh(mesh):
        dtype = resolve_dtype(config.model.compute_dtype, mesh.devices.flat[0].platform)  # "auto": an imported run
        # The attention implementation belongs to the hardware of the training, not to the model.
        model = gpt.GPT(dataclasses.replace(config.model, attention="auto"), Compute.on(mesh, dtype))
        if config.lora.rank:
            base = origin.base_of(workdir, config, step)
            adapters = load_adapters(store, step, config.lora, model, mesh)
            params = lora.merged(load_params(base.store, base.step, model, mesh), adapters, config.lora.scale)
        else:
            params = load_params(store, step, model, mesh)
    return Run(workdir, config, tokenizer, mesh, model, params, step)


def load_params(store: Store, step: int, model: gpt.GPT, mesh: jax.sharding.Mesh) -> dict:
    """A checkpoint's weights, averaged if it has those, loaded into their shards. Needs the mesh set. Raises RunError."""
    return _in_shards(store, step, gpt.logical_axes(model), gpt.shapes(model), mesh)


def load_adapters(store: Store, step: int, c: LoraConfig, model: gpt.GPT, mesh: jax.sharding.Mesh) -> dict:
    """The adapters of a checkpoint, otherwise as `load_params`."""
    axes = gpt.logical_axes(model)
    shapes = jax.eval_shape(functools.partial(lora.init, c, axes, gpt.shapes(model)), jax.random.key(0))
    return _in_shards(store, step, lora.logical_axes(c, axes), shapes, mesh)


def _in_shards(store: Store, step: int, axes, shapes, mesh) -> dict:
    shardings = parallel.shardings(axes, mesh)
    like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    return store.restore(step, _weights(store, step), like)


def _weights(store: Store, step: int) -> str:
    return "ema" if store.has(step, "ema") else "params"


def open_folder(
    workdir: epath.Path,
    config: RunConfig,
    mesh: jax.sharding.Mesh,
    prepare: Callable = corpora.prepare,
    hold: Callable[[epath.Path], None] = lambda folder: None,
) -> tuple[RunConfig, Corpus]:
    """Creates a run folder, or opens one to resume. Returns the config with everything resolved, and the corpus.

    A start that was killed before it wrote config.json is begun again.

    prepare(config, tokenizer or None): builds the corpus. hold(folder): locks the folder for the process that writes.
    Raises RunError if the folder is in use or holds something else, or a run of another config or text; and, before anything is
    written, if config, text, tokenizer and mesh do not fit together.
    """
    if workdir.exists() and not workdir.is_dir():
        raise RunError(f"--workdir={workdir}: a file, expected a folder")
    if (workdir / "config.json").exists():
        return _reopen(workdir, config, mesh, prepare, hold)
    return _begin(workdir, config, mesh, prepare, hold)


def _reopen(workdir: epath.Path, config: RunConfig, mesh, prepare: Callable, hold: Callable) -> tuple[RunConfig, Corpus]:
    """`open_folder` for a folder with config.json: config, text and tokenizer must be those that the run began with."""
    if parallel.is_leader():
        hold(workdir)
    stored, tokenizer = read_config(workdir), tokenizers.load(workdir)
    config = _resolved(config, tokenizer, mesh, stored)
    _check_same(stored, config, workdir)
    corpus = prepare(config, tokenizer)
    _check_fit(config, corpus, mesh)
    _check_corpus(workdir, corpus)
    if config != stored and parallel.is_leader():  # so that other commands find a moved text, for example
        write_config(workdir, config)
    return config, corpus


def _begin(workdir: epath.Path, config: RunConfig, mesh, prepare: Callable, hold: Callable) -> tuple[RunConfig, Corpus]:
    """`open_folder` for a folder that is missing, empty, or left by a start that was killed before it wrote config.json."""
    _check_unused(workdir)
    start = origin.find(config.init.from_) if config.init.from_ else None
    trained_with = start.store.meta(start.step)["tokenizer"] if start else None
    if start is None:
        validate_router(config.model)
    corpus = prepare(config)
    if trained_with not in (None, corpus.tokenizer.digest):
        raise data_error(
            f"config.init.from={config.init.from_}: its weights were trained with another tokenizer (digest {trained_with}, here"
            f" {corpus.tokenizer.digest}); add --config.tokenizer.path={config.init.from_}, no other knob of it"
        )
    config = _resolved(config, corpus.tokenizer, mesh, None)
    _check_fit(config, corpus, mesh)
    if start is not None:
        with jax.set_mesh(mesh):
            model = gpt.GPT(config.model, Compute.on(mesh, config.model.compute_dtype))
            start.store.check(start.step, _weights(start.store, start.step), gpt.shapes(model))
            if config.lora.rank:
                lora.chosen(config.lora, gpt.logical_axes(model))  # raises if a pattern matches nothing
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if parallel.is_leader():
            hold(workdir)
    except OSError as e:
        raise _unwritable(workdir, e) from None
    if (workdir / "config.json").exists():  # another process began the run, and ended, while this one prepared the text
        return _reopen(workdir, config, mesh, prepare, hold)
    _check_unused(workdir)
    try:
        _remove_start(workdir)  # an earlier one may have had another kind of tokenizer
        staged = _stage_config(workdir, config)  # first: by it the next start knows the folder if this process is killed here
        corpus.tokenizer.save_in(workdir)
        staged.replace(workdir / "config.json")  # last: it makes the folder a run folder
    except OSError as e:
        with contextlib.suppress(OSError):
            if not (workdir / "config.json").exists():  # a store that renames by copying may fail after it
                _remove_start(workdir)
        raise _unwritable(workdir, e) from None
    return config, corpus


_STAGED = "config.json.tmp"
# All that a start writes before config.json.
_OF_START = ("tokenizer.model", "tokenizer.json", published.EXTRA, published.TEMPLATE_FILE, published.MORE_TEMPLATES, _STAGED)


def _check_unused(workdir: epath.Path) -> None:
    """Raises RunError if a folder without config.json holds anything but what a killed start leaves."""
    names = {p.name for p in entries(workdir)} if workdir.exists() else set()
    if names and not (_STAGED in names and names <= set(_OF_START)):
        raise RunError(f"--workdir={workdir}: not empty and no run folder (no config.json); give a new or empty folder")


def _remove_start(workdir: epath.Path) -> None:
    """Removes what a start left, the staged config last: without it, the rest would look like something else's."""
    for path in (workdir / name for name in _OF_START):
        if path.is_dir():
            path.rmtree()
        else:
            path.unlink(missing_ok=True)


def _stage_config(workdir: epath.Path, config: RunConfig) -> epath.Path:
    staged = workdir / _STAGED
    staged.write_text(json.dumps(to_dict(config), indent=1) + "\n")
    return staged


def _unwritable(workdir: epath.Path, e: OSError) -> RunError:
    return RunError(f"--workdir={workdir}: cannot write ({e.strerror or e})", ExitCode.STORAGE)


def _resolved(config: RunConfig, tokenizer: Tokenizer, mesh: jax.sharding.Mesh, stored: RunConfig | None) -> RunConfig:
    """The config with model.vocab_size and model.compute_dtype set; "auto" stays what it was when the run began."""
    size = config.model.vocab_size or tokenizer.vocab_size
    if size < tokenizer.vocab_size:
        raise RunError(
            f"config.model.vocab_size={size} is smaller than the tokenizer's {tokenizer.vocab_size} pieces;"
            f" nearest: {tokenizer.vocab_size}, or None to take it over"
        )
    dtype = resolve_dtype(config.model.compute_dtype, mesh.devices.flat[0].platform)
    if stored is not None and config.model.compute_dtype == "auto":
        dtype = stored.model.compute_dtype
    model = dataclasses.replace(config.model, vocab_size=size, compute_dtype=dtype)
    return dataclasses.replace(config, model=model)


def _check_fit(config: RunConfig, corpus: Corpus, mesh: jax.sharding.Mesh) -> None:
    """Checks that need text, tokenizer and devices. Raises RunError."""
    m = config.model
    compute = Compute.on(mesh, m.compute_dtype)
    # Raises if the requested attention is not supported.
    implementation(m, compute, m.context_length, m.dropout > 0, mesh.shape["context"])
    corpus.rows(config)  # raises if the text is too short
    for prompt in config.sample.prompts:
        tokens = len(corpus.tokenizer.prompt(prompt))
        if tokens >= m.context_length:
            raise RunError(
                f"config.sample.prompts: {prompt!r} is {tokens} tokens with <bos>, but model.context_length={m.context_length}"
                " must leave a place for a new token; shorten the prompt"
            )
    validate_sizes(config, dict(mesh.shape))


def _check_corpus(workdir: epath.Path, corpus: Corpus) -> None:
    store = Store(workdir / "checkpoints")
    for step in reversed(store.steps()):
        try:
            stored = store.meta(step)["corpus"]
        except RunError:
            continue  # damaged: training falls back to the checkpoint before it
        if not store.has(step, "opt_state"):
            raise RunError(
                f"--workdir={workdir}: imported or merged weights; train on in a new folder: --config.init.from={workdir}"
            )
        if stored != corpus.name:
            raise data_error(
                f"{workdir}: the run was trained on corpus {stored}, this command gives {corpus.name} (other text, tokenizer"
                " or Python version); give back the same text, or start a new folder with --config.init.from"
            )
        return


# Knobs that may change when a run is resumed: how it is logged, kept, fed and divided among devices, which changes no more than
# rounding, and the tokens over which a balance loss averages. config.json has the last command's values. Another text or share
# under data.path or data.mixture is another corpus, and reported as that.
_FREE = (
    "log.", "eval.", "sample.", "checkpoint.", "mesh.", "train.accumulate", "model.remat",
    "data.prefetch", "data.workers", "data.cache_dir", "data.path", "data.tfds_dir", "data.mixture",
)  # fmt: skip


def check_same(workdir: epath.Path, config: RunConfig) -> None:
    """Raises RunError if the run in `workdir` has another config; what `config` leaves open is taken from the run."""
    stored = read_config(workdir)
    before, model = stored.model, config.model
    dtype = before.compute_dtype if model.compute_dtype == "auto" else model.compute_dtype
    model = dataclasses.replace(model, vocab_size=model.vocab_size or before.vocab_size, compute_dtype=dtype)
    _check_same(stored, dataclasses.replace(config, model=model), workdir)


def _check_same(stored: RunConfig, config: RunConfig, workdir) -> None:
    before, now = flatten(to_dict(stored)), flatten(to_dict(config))
    changed = [k for k in now if before[k] != now[k] and not k.startswith(_FREE)]
    if changed:
        k = changed[0]
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise RunError(
            f"--workdir={workdir}: this run has {k}={before[k]!r}, the command asks for {now[k]!r}{more};"
            " repeat the config of the run, or give a new folder"
        )


def read_config(workdir: epath.Path) -> RunConfig:
    """config.json of a run folder. Raises RunError if it is missing or damaged."""
    workdir = of_user(workdir)
    path = workdir / "config.json"
    if not workdir.exists():
        raise data_error(f"{workdir}: no such folder; expected that of a run, as `train` and `convert import` write it")
    if not path.exists():
        raise data_error(f"{workdir}: not a run folder (no config.json); expected one that `train` or `convert import` wrote")
    try:
        values = json.loads(path.read_text())
    except ValueError:
        raise data_error(f"{path}: damaged (not JSON)") from None
    if isinstance(values, dict) and "model_type" in values:
        raise data_error(f"{workdir}: a Hugging Face folder; make a run of it first: convert import --from={workdir}")
    try:
        config = freeze(values)
    except RunError as e:
        raise data_error(f"{path}: {e}") from None
    if config.model.vocab_size is None:
        raise data_error(f"{path}: model.vocab_size is not set; this is not the file that `train` wrote")
    return config


def write_config(workdir: epath.Path, config: RunConfig) -> None:
    _stage_config(workdir, config).replace(workdir / "config.json")


def _fits(config: RunConfig) -> bool:
    """Whether the mesh a run was trained on can be made here and splits its model evenly: runs are often used elsewhere."""
    try:
        validate_model_sizes(config, dict(parallel.make_mesh(config.mesh).shape))
    except RunError:
        return False
    return True


def corpus(run: Run, prepare: Callable = corpora.prepare) -> Corpus:
    """The tokenised text of the run. prepare: as for `open_folder`. Raises RunError if the run has none or it differs here."""
    stored = Store(run.workdir / "checkpoints").meta(run.step)["corpus"]
    if stored is None:
        raise data_error(
            f"{run.workdir}: imported weights have no hold-out, nor have those merged of a run of preferences or rewards;"
            " use --text=FILE or --tasks"
        )
    found = prepare(run.config, run.tokenizer)
    if found.name != stored:
        raise data_error(
            f"{run.workdir}: the hold-out cannot be rebuilt here: {run.config.data.source} gives corpus {found.name},"
            f" the run was trained on {stored} (another file, or another version of Python or gpt4o_jax); use --text=FILE"
        )
    return found
