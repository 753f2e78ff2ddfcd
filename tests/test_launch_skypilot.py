"""launch/skypilot.yaml against the fields of SkyPilot's tasks; tests/system/test_skypilot.py has SkyPilot itself read it.

Names and types as SkyPilot 0.14.1 checks them (sky/utils/schemas.py), without those for its own use; fields not used here,
such as mounts and services, are checked by type alone.
"""

import re

import pytest
import yaml

from tests.test_launch import LAUNCH

EXIT_CODE = range(256)
RESOURCES = {
    "infra": str, "cloud": str, "region": str, "zone": str, "accelerators": (str, dict, list), "accelerator_args": dict,
    "cpus": (str, int, float), "memory": (str, int, float), "instance_type": str, "use_spot": bool, "disk_size": (str, int),
    "disk_tier": str, "network_tier": str, "local_disk": str, "max_hourly_cost": (int, float), "image_id": (str, dict, None),
    "ports": (str, int, [(str, int)], None), "labels": dict, "autostop": (bool, int, str, dict), "priority": int,
    "priority_class": str, "volumes": list, "any_of": list, "ordered": list,
    "job_recovery": (
        str,
        {"strategy": (str, None), "max_restarts_on_errors": range(2**31), "recover_on_exit_codes": (EXIT_CODE, [EXIT_CODE])},
    ),
}  # fmt: skip
TASK = {
    "name": str, "workdir": (str, {"url": str, "ref": str}), "num_nodes": int, "resources": RESOURCES, "setup": str, "run": str,
    "envs": {re.compile("[a-zA-Z_][a-zA-Z0-9_]*"): (str, None)}, "secrets": (dict, list), "managed_secrets": list,
    "file_mounts": dict, "volumes": dict, "service": dict, "pool": dict, "config": dict, "api_server_access": bool,
    "event_callback": str,
}  # fmt: skip


def wrong(value, kind, path: str = "task") -> list[str]:
    """Paths of the values that do not match their kind.

    kind: a type, a range of numbers, None, a tuple of alternative kinds, a list with the kind of its elements, or a dict with the
    kinds of its fields, by name or by a pattern of names.
    """
    if isinstance(kind, tuple):
        tried = [wrong(value, one, path) for one in kind]
        return min(tried, key=lambda found: (path in found, len(found)))  # for an object with a wrong field, report the field
    if isinstance(kind, dict) and isinstance(value, dict):
        patterns = [name for name in kind if isinstance(name, re.Pattern)]
        kinds = {key: kind.get(key) or next((kind[p] for p in patterns if p.fullmatch(key)), ...) for key in value}
        return [p for key in value for p in wrong(value[key], kinds[key], f"{path}.{key}")]
    if isinstance(kind, list) and isinstance(value, list):
        return [p for n, element in enumerate(value) for p in wrong(element, kind[0], f"{path}[{n}]")]
    if isinstance(kind, range):
        right = type(value) is int and value in kind
    else:
        right = value is None if kind is None else isinstance(kind, type) and type(value) is kind  # in YAML True is not an int
    return [] if right else [path]


def task() -> dict:
    return yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())


def test_every_field_is_one_of_skypilot():
    assert wrong(task(), TASK) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("num_node", 2),
        ("num_nodes", "2"),
        ("num_nodes", True),
        ("envs.A-B", "x"),
        ("envs.N", 1),
        ("resources.use_spott", True),
        ("resources.use_spot", "yes"),
        ("resources.accelerator", "H100:8"),
        ("resources.ports", [8482.0]),
        ("resources.job_recovery.max_restarts", 20),
        ("resources.job_recovery.max_restarts_on_errors", -1),
        ("resources.job_recovery.recover_on_exit_codes", [75, 256]),
        ("run", None),
    ],
)
def test_a_mistake_in_a_field_is_seen(path, value):
    mistaken = task()
    *folders, name = path.split(".")
    place = mistaken
    for folder in folders:
        place = place[folder]
    place[name] = value
    (found,) = wrong(mistaken, TASK)
    assert found.startswith(f"task.{path}")
