"""Reading --config=FILE[:ARG] and applying --config.KEY=VALUE."""

import contextlib
import importlib.util
import inspect
import traceback
import types
from pathlib import Path

from gpt4o_jax import config as config_lib
from gpt4o_jax.config import RunConfig
from gpt4o_jax.config_idle import refuse_idle
from gpt4o_jax.errors import RunError, did_you_mean
from gpt4o_jax.paths import local


def read(spec: str, overrides: dict[str, str]) -> RunConfig:
    """FILE[:ARG] with overrides by dotted key -> a validated RunConfig. Raises RunError.

    The file is Python and is executed: use only files you trust.
    """
    path, _, argument = spec.partition(":")
    values = config_lib.flatten(_get_config(local("--config", path), argument))
    known = config_lib.knobs()
    given = {}
    for name, text in overrides.items():
        if name not in known:
            raise RunError(f"--config.{name}: no such key{did_you_mean(name, known)}")
        given[name] = config_lib.parse_value(name, text)
    values |= given
    if values.get("init.model") and values.get("init.from"):
        values |= _model_of(values["init.from"]) | given
    config = config_lib.freeze(values)
    found = config_lib.flatten(config_lib.to_dict(config))
    refuse_idle(given, found.__getitem__, lambda name: known[name].default)
    return config


def _model_of(folder: str) -> dict:
    """The knobs of a run's model, and the path of its tokenizer."""
    from gpt4o_jax.run import read_config

    model = config_lib.to_dict(read_config(folder).model)
    # How it is computed depends on the hardware and on this run, not on the model; the other run stored what "auto" was there.
    del model["attention"], model["compute_dtype"]
    return {f"model.{name}": value for name, value in model.items()} | {"tokenizer.path": folder}


def _get_config(path: Path, argument: str) -> dict:
    """What get_config() of the file returns, as plain dicts."""
    from ml_collections import ConfigDict

    with told_in_one_line("--config", path):
        get_config = load("--config", path).get_config
        takes = inspect.signature(get_config).parameters
        if argument and not takes:
            raise RunError(f"--config={path}:{argument}: this config takes no argument after the colon")
        config = get_config(argument) if argument else get_config()
        if not isinstance(config, ConfigDict):
            raise RunError(f"--config={path}: get_config() returned {type(config).__name__}, expected what base_config() gives")
        return config.to_dict()


def load(flag: str, path: Path) -> types.ModuleType:
    """Executes the file at `path` and returns its module. flag: the one that named it. Raises RunError if it is not Python."""
    if path.is_dir():
        raise RunError(f"{flag}={path}: a folder, expected a Python file with get_config()")
    if not path.is_file():
        raise RunError(f"{flag}={path}: no such file; configs of this project are in configs/, for example configs/quickstart.py")
    module_spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if module_spec is None:
        raise RunError(f"{flag}={path}: expected a Python file with get_config()")
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def told_in_one_line(flag: str, path: Path):
    """Turns whatever the code of the file raises into a RunError with its line."""
    try:
        yield
    except RunError:
        raise
    except SyntaxError as e:
        raise RunError(f"{flag}={path}: line {e.lineno}: {e.msg}") from e
    except (Exception, SystemExit) as e:
        lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == str(path)]
        where = f"line {lines[-1]}: " if lines else ""
        raise RunError(f"{flag}={path}: {where}{_reason(e)}") from e


def _reason(e: BaseException) -> str:
    """The message of `e`, without the list of all keys that ml_collections adds for an unknown one."""
    text = e
    while isinstance(text, BaseException) and text.args:  # ml_collections raises AttributeError(KeyError(text))
        text = text.args[0]
    first, *rest = str(text).splitlines() or [""]
    name = "" if isinstance(e, AttributeError) else f"{type(e).__name__}: "
    return " ".join([name + first.partition(" Other fields present")[0], *rest[-1:]])
