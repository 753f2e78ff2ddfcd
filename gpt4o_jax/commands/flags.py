"""Command-line flags: --name=value or --name value; every mistake is one line and exit code 2.

Not parsed by absl or argparse, because these exit with other codes, and print a usage text or a traceback where one sentence
would do.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from gpt4o_jax import config as config_lib
from gpt4o_jax.errors import RunError, did_you_mean

TYPED = "--"  # key of the parsed values for the names of the flags that were given, whatever their values


@dataclasses.dataclass(frozen=True)
class Flag:
    """One flag of a command. kind: str, int, float, bool or list (may be given several times).

    positional: its values are the arguments without a name. blank: whether it may be empty; an empty path or name usually comes
    from a shell variable that is not set.
    """

    name: str
    kind: type
    default: Any
    doc: str
    required: bool = False
    low: float | None = None
    high: float | None = None
    positional: bool = False
    blank: bool = False


def parse(command: str, flags: Sequence[Flag], argv: Sequence[str], takes_config: bool) -> tuple[dict, dict[str, str]]:
    """(values by flag name, and under TYPED the names given; overrides by dotted config key). Raises RunError for any mistake."""
    known = {f.name: f for f in flags}
    values: dict[str, Any] = {f.name: [] if f.kind is list else f.default for f in flags}
    overrides: dict[str, str] = {}
    seen: set[str] = set()
    unnamed = next((f for f in flags if f.positional), None)
    args = list(argv)
    while args:
        arg = args.pop(0)
        if unnamed and not arg.startswith("-"):
            seen.add(unnamed.name)
            values[unnamed.name].append(arg)
            continue
        if not arg.startswith("--"):
            raise RunError(f"{command}: unexpected argument {arg!r}; flags are written --name=value")
        name, given, text = arg[2:].partition("=")
        is_override = takes_config and name.startswith("config.")
        if not is_override and (name not in known or known[name].positional):
            raise RunError(f"{command}: unknown flag --{name}{did_you_mean(name, known)}; see {command} --help")
        if not given:
            if not is_override and known[name].kind is bool and (not args or args[0].startswith("--")):
                text = "true"
            elif args and not args[0].startswith("--"):
                text = args.pop(0)
            else:
                raise RunError(f"{command}: --{name} needs a value: --{name}=...")
        if is_override and name not in seen:
            overrides[name.removeprefix("config.")] = text
            seen.add(name)
            continue
        if name in seen and (is_override or known[name].kind is not list):
            raise RunError(f"{command}: --{name} is given twice")
        flag = known[name]
        seen.add(name)
        if flag.kind is list:
            if not text:
                raise RunError(f"{command}: --{name}= is empty: {flag.doc}")
            values[name].append(text)
        else:
            values[name] = _value(command, flag, text)
    for f in flags:
        if f.required and f.name not in seen:
            raise RunError(f"{command}: {_written(f)} is missing ({f.doc})")
    return values | {TYPED: frozenset(seen)}, overrides


def _written(flag: Flag) -> str:
    return flag.name.upper() if flag.positional else f"--{flag.name}"


def _value(command: str, flag: Flag, text: str):
    what = {int: "an integer", float: "a number", bool: "true or false", str: "text"}[flag.kind]
    try:
        value = {"true": True, "1": True, "false": False, "0": False}[text.lower()] if flag.kind is bool else flag.kind(text)
    except (ValueError, KeyError):
        raise RunError(f"{command}: --{flag.name}={text}: expected {what}") from None
    if text == "" and not flag.blank:
        raise RunError(f"{command}: --{flag.name}= is empty, expected {what}: {flag.doc}")
    too_low = flag.low is not None and not value >= flag.low
    too_high = flag.high is not None and not value <= flag.high
    if too_low or too_high:
        legal = f"at least {flag.low}" if flag.high is None else f"from {flag.low} to {flag.high}"
        raise RunError(f"{command}: --{flag.name}={text}: expected {what} {legal}")
    return value


def usage(command: str, doc: str, flags: Sequence[Flag], takes_config: bool) -> str:
    """The text of `COMMAND --help`."""
    lines = [f"python -m gpt4o_jax {command}: {doc.strip()}", ""]
    width = max(18, *(len(_written(f)) for f in flags))
    for f in flags:
        default = "required" if f.required else f"default {f.default!r}" if f.default not in (None, "", []) else ""
        lines.append(f"  {_written(f):<{width}} {f.doc}" + (f" ({default})" if default else ""))
    if takes_config:
        lines += ["", "Every knob of the config, as --config.NAME=VALUE:", ""]
        for name, field in config_lib.knobs().items():
            choices = f" One of: {', '.join(field.metadata['choices'])}." if field.metadata["choices"] else ""
            lines.append(f"  {name:<30} {field.metadata['doc']}{choices} (default {field.default!r})")
    return "\n".join(lines)
