"""The one error type that ends a command, and the exit codes it can carry."""

import enum
import errno


class ExitCode(enum.IntEnum):
    """What the shell, Slurm or a Kubernetes restart policy sees."""

    DONE = 0
    CRASHED = 1  # an exception other than RunError: a bug here
    USAGE = 2  # wrong flag or config value
    DATA = 3  # bad data, tokenizer or checkpoint
    DIVERGED = 4  # the loss is no longer finite
    STORAGE = 5  # disk full, not writable, not reachable
    SIGNAL = 75  # stopped by SIGTERM or SIGINT after saving: run the same command again
    PEER_LOST = 76  # another process of the job is gone


class RunError(Exception):
    """A user error or an external failure, reported in one line.

    The message says what is wrong, where, what was found, what was expected and how to fix it. `__main__` prints it without a
    traceback (with one under --debug).
    """

    def __init__(self, message: str, code: ExitCode = ExitCode.USAGE):
        super().__init__(" ".join(message.split()))
        self.code = code


_FULL_OR_BROKEN = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
_OBJECT_STORES = ("fsspec", "gcsfs", "s3fs", "adlfs", "huggingface_hub", "etils.epath.backend")


def storage_error(e: BaseException) -> RunError | None:
    """The RunError (exit code 5) for a failure of a disk or an object store; None if `e` is something else.

    The exceptions of object store libraries have no common class, so they are recognised by the modules in their traceback.
    """
    if isinstance(e, OSError) and (e.filename is not None or e.errno in _FULL_OR_BROKEN):
        return RunError(f"{e.filename or 'storage'}: {e.strerror or e}", ExitCode.STORAGE)
    place, found, trace = "", False, e.__traceback__
    while trace is not None:
        frame = trace.tb_frame
        module = frame.f_globals.get("__name__", "")
        path = str(frame.f_locals.get("path") or getattr(frame.f_locals.get("self"), "path", ""))
        # etils' backends serve local paths too, where anything but an OSError is a bug.
        if module.startswith(_OBJECT_STORES) and ("://" in path or not module.startswith("etils")):
            found, place = True, place or path
        trace = trace.tb_next
    return unreachable(place or "the object store", e) if found and isinstance(e, Exception) else None


def unreachable(place: str, reason: object) -> RunError:
    """A RunError for an object store that does not answer, or answers with an error (exit code 5)."""
    told = " ".join(str(reason).split()) or type(reason).__name__
    told = told if len(told) <= 300 else f"{told[:300]}..."
    mend = "check the address, the network and who you are logged in as"
    return RunError(f"{place}: cannot be reached ({told}); {mend}", ExitCode.STORAGE)


def data_error(message: str) -> RunError:
    """A RunError for bad data, a bad tokenizer or a bad checkpoint (exit code 3)."""
    return RunError(message, ExitCode.DATA)


def lone_surrogate(text: str) -> str:
    """Describes the first lone surrogate, which JSON can contain but UTF-8 cannot, and its place; "" if there is none."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        return f"lone surrogate U+{ord(text[e.start]):04X} at character {e.start}"
    return ""


def did_you_mean(name: str, known) -> str:
    """' (did you mean X?)' with the nearest of `known`, or '' if none is near."""
    import difflib

    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.65)
    return f" (did you mean {near[0]}?)" if near else ""
