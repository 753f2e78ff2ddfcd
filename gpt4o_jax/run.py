"""A run folder, opened: what every command but `train` starts from.

config.json  tokenizer.model  metrics.jsonl  tensorboard/  checkpoints/STEP/  samples/STEP.txt  report.md  loss.png
"""

import dataclasses
import json

import jax
from etils import epath

from gpt4o_jax import parallel
from gpt4o_jax.checkpoint.store import Store
from gpt4o_jax.config import RunConfig, flatten, freeze, to_dict
from gpt4o_jax.data import corpus as corpora
from gpt4o_jax.data import tokenizer as tokenizers
from gpt4o_jax.data.corpus import Corpus
from gpt4o_jax.data.tokenizer import Tokenizer
from gpt4o_jax.errors import ExitCode, RunError, data_error
from gpt4o_jax.model import gpt
from gpt4o_jax.ops.compute import Compute, resolve_dtype


@dataclasses.dataclass
class Run:
    """A trained model with all that is needed to use it. Use it under `with jax.set_mesh(run.mesh):`."""

    workdir: epath.Path
    config: RunConfig
    tokenizer: Tokenizer
    mesh: jax.sharding.Mesh
    model: gpt.GPT
    params: dict
    step: int


def open_run(workdir, step: int | None = None) -> Run:
    """Opens `workdir` at `step` (None: the newest checkpoint). Averaged weights where the run keeps them.

    Raises RunError where the folder is missing, foreign, without a checkpoint, or does not fit together.
    """
    workdir = epath.Path(workdir)
    config = read_config(workdir)
    tokenizer = tokenizers.load(workdir / "tokenizer.model")
    if tokenizer.vocab_size > config.model.vocab_size:
        raise data_error(
            f"{workdir}: tokenizer.model has {tokenizer.vocab_size} pieces, but the model only"
            f" {config.model.vocab_size}; the tokenizer is not the one this run was trained with"
        )
    store = Store(workdir / "checkpoints")
    steps = store.steps()
    if not steps:
        raise data_error(f"{workdir}: no finished checkpoint yet; train first, or wait for the first one")
    step = steps[-1] if step is None else step
    if step not in steps:
        raise data_error(f"{workdir}: no checkpoint of step {step}; there are {', '.join(map(str, steps))}")
    stored = store.meta(step)["tokenizer"]
    if stored != tokenizer.digest:
        raise data_error(
            f"{workdir}: tokenizer.model (digest {tokenizer.digest}) is not the one that checkpoint {step} was"
            f" trained with (digest {stored}); put the original file back"
        )
    mesh = parallel.make_mesh(config.mesh if _fits(config.mesh) else type(config.mesh)())
    with jax.set_mesh(mesh):
        compute = Compute(mesh.devices.flat[0].platform, config.model.compute_dtype)
        model = gpt.GPT(config.model, compute)
        params = load_params(store, step, model, mesh)
    return Run(workdir, config, tokenizer, mesh, model, params, step)


def load_params(store: Store, step: int, model: gpt.GPT, mesh: jax.sharding.Mesh) -> dict:
    """The weights of a checkpoint, averaged ones where there are, directly in their shards. Needs the mesh in force."""
    shapes = jax.eval_shape(lambda k: gpt.init(model, k), jax.random.key(0))
    shardings = parallel.shardings(gpt.logical_axes(model), mesh)
    like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    return store.restore(step, "ema" if store.has(step, "ema") else "params", like)


def open_folder(workdir: epath.Path, config: RunConfig, platform: str) -> tuple[RunConfig, Corpus]:
    """Makes a run folder, or opens one to go on in it. Returns the config with nothing left open, and the corpus.

    Raises RunError where the folder holds something else, or a run of another config.
    """
    if workdir.exists() and not workdir.is_dir():
        raise RunError(f"--workdir={workdir}: a file, expected a folder")
    resumed = (workdir / "config.json").exists()
    if not resumed and workdir.exists() and any(workdir.iterdir()):
        raise RunError(f"--workdir={workdir}: not empty and no run folder (no config.json); give a new or empty folder")
    stored = read_config(workdir) if resumed else None
    tokenizer = tokenizers.load(workdir / "tokenizer.model") if resumed else None
    corpus = corpora.prepare(config, tokenizer)
    config = _resolved(config, corpus.tokenizer, platform, stored)
    if stored is not None:
        _check_same(stored, config, workdir)
        return config, corpus
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        corpus.tokenizer.save(workdir / "tokenizer.model")
        write_config(workdir, config)  # last: it makes the folder a run folder
    except OSError as e:
        raise RunError(f"--workdir={workdir}: cannot write ({e.strerror or e})", ExitCode.STORAGE) from None
    return config, corpus


def _resolved(config: RunConfig, tokenizer: Tokenizer, platform: str, stored: RunConfig | None) -> RunConfig:
    """The config with model.vocab_size and model.compute_dtype as values; "auto" stays what it was when the run began."""
    size = config.model.vocab_size or tokenizer.vocab_size
    if size < tokenizer.vocab_size:
        raise RunError(
            f"config.model.vocab_size={size} is smaller than the tokenizer's {tokenizer.vocab_size} pieces;"
            f" nearest: {tokenizer.vocab_size}, or None to take it over"
        )
    dtype = resolve_dtype(config.model.compute_dtype, platform)
    if stored is not None and config.model.compute_dtype == "auto":
        dtype = stored.model.compute_dtype
    model = dataclasses.replace(config.model, vocab_size=size, compute_dtype=dtype)
    return dataclasses.replace(config, model=model)


# What may differ between two commands that go on with one run: how it is watched, kept and fed, not what it computes.
_FREE = ("log.", "eval.", "sample.", "checkpoint.", "data.prefetch", "data.cache_dir", "data.path", "mesh.")


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
    """config.json of a run folder. Raises RunError where there is none or it is damaged."""
    path = epath.Path(workdir) / "config.json"
    if not epath.Path(workdir).exists():
        raise data_error(f"{workdir}: no such folder; --workdir takes the folder that `train` wrote")
    if not path.exists():
        raise data_error(f"{workdir}: not a run folder (no config.json); --workdir takes the folder that `train` wrote")
    try:
        values = json.loads(path.read_text())
    except ValueError:
        raise data_error(f"{path}: damaged (not JSON)") from None
    try:
        return freeze(values)
    except RunError as e:
        raise data_error(f"{path}: {e}") from None


def write_config(workdir: epath.Path, config: RunConfig) -> None:
    temporary = workdir / "config.json.tmp"
    temporary.write_text(json.dumps(to_dict(config), indent=1) + "\n")
    temporary.replace(workdir / "config.json")


def _fits(mesh_config) -> bool:
    """Whether the mesh a run was trained on can be made here: a model is often used on fewer devices."""
    try:
        parallel.make_mesh(mesh_config)
    except RunError:
        return False
    return True


def holdout(run: Run):
    """The token cache of the run's held-out documents. Raises RunError where its source is not the same here."""
    stored = Store(run.workdir / "checkpoints").meta(run.step)["corpus"]
    corpus = corpora.prepare(run.config, run.tokenizer)
    if corpus.name != stored:
        raise data_error(
            f"{run.workdir}: the hold-out cannot be rebuilt here: {run.config.data.source} gives corpus {corpus.name},"
            f" the run was trained on {stored} (another Python version, or another file); use --text=FILE"
        )
    return corpus.holdout
