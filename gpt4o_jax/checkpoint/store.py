"""Checkpoints: all use of Orbax.

checkpoints/STEP/ holds the items `params`, `opt_state`, `ema` (if there is one) and `counters`, written asynchronously by Orbax,
and manifest.json, written last.
"""

import concurrent.futures
import errno

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from gpt4o_jax.checkpoint import manifest
from gpt4o_jax.errors import ExitCode, RunError, data_error, storage_error, unreachable
from gpt4o_jax.paths import absolute, is_local

_CORRUPT = ".corrupt"  # suffix of a checkpoint found damaged
_SAVE_SECONDS = 1800  # limit for all processes of a job to write a checkpoint


class Store:
    """The checkpoints of one run. Close it, or use it as a context manager."""

    def __init__(self, folder: epath.Path, keep_last: int = 2, keep_every: int = 0):
        self.folder = absolute(folder)  # required by Orbax
        self.keep_last, self.keep_every = keep_last, keep_every
        self._checkpointer = None  # created at the first save: readers need none
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: concurrent.futures.Future | None = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
        """Waits for the background save. Raises as `finish` does."""
        try:
            self.finish()
        finally:
            self._shutdown()

    def _shutdown(self):
        self._thread.shutdown()
        if self._checkpointer is not None:
            self._checkpointer.close()

    # ------------------------------------------------------------ reading

    def steps(self) -> list[int]:
        """Steps of finished checkpoints, ascending."""
        if not self.folder.is_dir():
            return []
        found = (p for p in self.folder.iterdir() if p.name.isdigit() and (p / manifest.NAME).exists())
        return sorted(int(p.name) for p in found)

    def chosen(self) -> int | None:
        """The step to use: the best, if the newest checkpoint names one that still exists, else the newest; None if none."""
        steps = self.steps()
        best = self.meta(steps[-1]).get("best") if steps else None
        return best if best in steps else max(steps, default=None)

    def path(self, step: int) -> epath.Path:
        return self.folder / str(step)

    def newest_intact(self, say=lambda message: None) -> int | None:
        """The newest step whose every file matches its digest, or None.

        Damaged checkpoints are renamed STEP.corrupt and reported through `say`.
        """
        for step in reversed(self.steps()):
            try:
                manifest.verify(self.path(step))
                return step
            except RunError as e:
                aside = self.folder / f"{step}{_CORRUPT}"
                if aside.exists():
                    aside.rmtree()
                self.path(step).rename(aside)
                say(f"{e}; moved to {aside.name}, trying the checkpoint before it")
        return None

    def has_corrupt(self) -> bool:
        """Whether `newest_intact` has set a checkpoint aside, now or in an earlier process."""
        return self.folder.is_dir() and any(p.name.endswith(_CORRUPT) for p in self.folder.iterdir())

    def meta(self, step: int) -> dict:
        return manifest.read(self.path(step))

    def restore(self, step: int, item: str, like):
        """One item of a checkpoint as the tree `like` (of ShapeDtypeStructs with shardings).

        Raises RunError if it is missing, has other leaves, shapes or dtypes, or the storage cannot be reached.
        """
        folder = self.check(step, item, like)
        try:
            return ocp.StandardCheckpointHandler().restore(folder, args=ocp.args.StandardRestore(like))
        except ValueError as e:  # TensorStore cannot read: `check` has found that everything fits
            if is_local(folder):
                raise
            raise unreachable(str(folder), str(e).splitlines()[0]) from e

    def check(self, step: int, item: str, like) -> epath.Path:
        """The folder of one item. Raises RunError if it is missing or has other leaves, shapes or dtypes than `like`."""
        folder = self.path(step) / item
        if not folder.exists():
            raise data_error(f"{folder}: no such item in this checkpoint")
        stored, wanted = _by_path(ocp.StandardCheckpointHandler().metadata(folder).tree), _by_path(like)
        for name in sorted(set(stored) | set(wanted)):
            if stored.get(name) != wanted.get(name):
                raise data_error(
                    f"{folder}: {name} is {_describe(stored.get(name))} in the checkpoint but"
                    f" {_describe(wanted.get(name))} in the model; the config must be the one it was trained with"
                )
        return folder

    def has(self, step: int, item: str) -> bool:
        return (self.path(step) / item).exists()

    # ------------------------------------------------------------ writing

    def save(self, step: int, items: dict, meta: dict, copy: bool = True) -> None:
        """Starts writing `items`, trees by name; returns once the arrays are copied. Failures are raised later, at the latest by
        `finish`.

        meta: stored with it; "best" in it is the step of a checkpoint to keep when newer ones come. copy: whether a donated step
        may overwrite the arrays before `finish`. Raises RunError (exit code 5) as `finish` does.
        """
        self.finish()
        try:
            if self._checkpointer is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._checkpointer = _checkpointer()
            target = self.path(step)
            # It has no manifest: an interrupted save that nothing refers to.
            if jax.process_index() == 0 and target.exists():
                target.rmtree()
            if copy:
                items = jax.tree.map(lambda x: jnp.copy(x) if _on_host(x) else x, items)
            saves = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
            self._checkpointer.save(target, args=ocp.args.Composite(**saves))
        except Exception as e:
            if not _of_storage(e):
                raise
            raise _storage_error(self.path(step), e) from e
        self._pending = self._thread.submit(self._commit, step, meta)

    def poll(self) -> None:
        """Raises the error of a background save that has failed, if any."""
        if self._pending is not None and self._pending.done():
            self.finish()

    def finish(self) -> None:
        """Waits for the background save. Raises RunError (exit code 5) if it failed, JaxRuntimeError if a process is missing."""
        pending, self._pending = self._pending, None
        if pending is not None:
            try:
                pending.result()
            except (RunError, jax.errors.JaxRuntimeError):
                raise  # the latter: another process did not take part
            except Exception as e:
                if not _of_storage(e):
                    raise
                raise _storage_error(self.folder, e) from e

    def _commit(self, step: int, meta: dict) -> None:
        self._checkpointer.wait_until_finished()
        if jax.process_index() == 0:
            manifest.write(self.path(step), meta)
            self._retain(meta.get("best"))

    def _retain(self, best: int | None) -> None:
        steps = self.steps()
        for step in steps[: -self.keep_last]:
            if step != best and not (self.keep_every and step % self.keep_every == 0):
                (self.path(step) / manifest.NAME).unlink()  # first: a half-removed checkpoint must not look finished
                self.path(step).rmtree()

    def clean(self) -> None:
        """Removes what a killed process left of its last save. For the training process, before it starts."""
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                unfinished = path.name.isdigit() and not (path / manifest.NAME).exists()
                if unfinished or ".orbax-checkpoint-tmp" in path.name:
                    path.rmtree()


def _on_host(x: jax.Array) -> bool:
    """Whether Orbax's host copy is the buffer itself, which the next donated step overwrites."""
    return jax.default_backend() == "cpu" or x.sharding.memory_kind == "pinned_host"


def _of_storage(e: Exception) -> bool:
    """Whether the error is about storage, for which TensorStore raises ValueError."""
    return isinstance(e, (OSError, ValueError)) or storage_error(e) is not None


def _checkpointer() -> ocp.AsyncCheckpointer:
    """Given the processes, Orbax waits for them on the host, with a limit; otherwise it would run collectives of devices, also
    from its own thread, between those of training steps.
    """
    n = jax.process_count()
    among = ocp.options.MultiprocessingOptions(active_processes=set(range(n)) if n > 1 else None)
    handler = ocp.CompositeCheckpointHandler(composite_options=ocp.CompositeOptions(multiprocessing_options=among))
    limited = ocp.AsyncOptions(timeout_secs=_SAVE_SECONDS)
    return ocp.AsyncCheckpointer(handler, async_options=limited, multiprocessing_options=among)


def _by_path(tree) -> dict[str, tuple]:
    """'layers.mlp.up' -> (shape, dtype name) for every leaf, whatever the tree's containers."""

    def name(path):
        return ".".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)

    return {name(path): (tuple(x.shape), jnp.dtype(x.dtype).name) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def _describe(entry) -> str:
    return "absent" if entry is None else f"{entry[1]}{list(entry[0])}"


def _storage_error(where, e: Exception) -> RunError:
    full = getattr(e, "errno", None) == errno.ENOSPC or "RESOURCE_EXHAUSTED" in str(e) or "No space left" in str(e)
    reason = "no space left on the device" if full else str(e).splitlines()[0] if str(e) else type(e).__name__
    mend = "free space" if is_local(where) else "check the network and who you are logged in as"
    return RunError(f"{where}: cannot write a checkpoint ({reason}); {mend} and run the same command again", ExitCode.STORAGE)
