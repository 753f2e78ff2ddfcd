"""The run that another starts from: finding it, and recognising it by its checkpoint's digest."""

import dataclasses
from collections.abc import Callable

from etils import epath

from gpt4o_jax import parallel
from gpt4o_jax.checkpoint import manifest
from gpt4o_jax.checkpoint.store import Store
from gpt4o_jax.config import RunConfig
from gpt4o_jax.errors import RunError, data_error
from gpt4o_jax.paths import run_folder


@dataclasses.dataclass(frozen=True)
class Origin:
    """One checkpoint of a run."""

    folder: epath.Path
    store: Store
    step: int

    @property
    def reference(self) -> dict:
        """What a checkpoint of adapters stores about the weights it belongs to."""
        return {"folder": str(self.folder), "step": self.step, "digest": manifest.digest(self.store.path(self.step))}


def find(folder: str) -> Origin:
    """The checkpoint meant by config.init.from=folder. Raises RunError if there is none, it is damaged, or it holds adapters."""
    run = run_folder("config.init.from", folder)
    store = Store(run / "checkpoints")
    if not store.steps():
        raise data_error(f"config.init.from={folder}: no finished checkpoint there; expected the folder of a run")
    step = store.chosen()
    manifest.verify(store.path(step))
    if (store.meta(step).get("base") or {}).get("rank"):
        raise data_error(
            f"config.init.from={folder}: a run of adapters, not of weights; make weights of it first:"
            f" convert merge --workdir={folder} --to=FOLDER"
        )
    return Origin(run, store, step)


def agreed(choose: Callable[[], Origin]) -> Origin:
    """The Origin that choose() returns in process 0, in all processes of the job.

    The run may write another checkpoint meanwhile; each choosing for itself, some processes could load that one. Raises RunError
    if choose() does, or if this process sees other weights in that folder than process 0.
    """
    chosen = parallel.share("initial weights", lambda: choose().reference)
    folder = epath.Path(chosen["folder"])
    start = Origin(folder, Store(folder / "checkpoints"), chosen["step"])
    found = start.reference["digest"]
    if found != chosen["digest"]:
        raise data_error(
            f"config.init.from={folder}: at step {start.step} process 0 sees the weights {chosen['digest'][:12]}, this one"
            f" {found[:12]}; give a folder that all processes share"
        )
    return start


def base_of(workdir: epath.Path, config: RunConfig, step: int | None = None) -> Origin:
    """The weights that the adapters in `workdir` belong to. step: of the adapters; None: the newest. Before the first: as `find`.

    Looked for at config.init.from, then beside `workdir`, for runs that were moved together. Raises RunError if they are missing
    or damaged, or are not the weights that the adapters were trained on.
    """
    wanted = reference(workdir, step)
    if wanted is None:
        return find(config.init.from_)
    named = run_folder("config.init.from", config.init.from_)
    folder = next((f for f in (named, workdir.parent / named.name) if (f / "config.json").exists()), named)
    store, step = Store(folder / "checkpoints"), wanted["step"]
    whose = f"{workdir}: its adapters belong to the weights of {wanted['folder']} at step {step} (digest {wanted['digest'][:12]})"
    if step not in store.steps():
        there = ", ".join(map(str, store.steps())) or "no checkpoints"
        raise data_error(f"{whose}, and {folder} has {there}; put that checkpoint back")
    found = manifest.digest(store.path(step))
    if found != wanted["digest"]:
        raise data_error(f"{whose}, and those of {folder} are others (digest {found[:12]}); put back the run they belong to")
    manifest.verify(store.path(step))
    return Origin(folder, store, step)


def reference(workdir: epath.Path, step: int | None = None) -> dict | None:
    """What a checkpoint in `workdir` (default: the newest readable one) stores about its base weights; None if nothing."""
    own = Store(workdir / "checkpoints")
    for at in reversed(own.steps() if step is None else [step]):
        try:
            return own.meta(at).get("base")
        except RunError:
            continue  # damaged: training falls back to the checkpoint before it
    return None
