"""The collectives of a compiled program, by mesh axis, read from the text of its HLO."""

import collections
import math
import re
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2} | {
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8
}  # fmt: skip
_HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_OP = re.compile(rf"^\s*(?:ROOT )?%\S+ = (.*?) ({'|'.join(KINDS)})(-start)?\(")
# Between slices, libtpu sends through the hosts what the groups of devices in each slice have prepared.
_FROM_SLICE_TO_SLICE = re.compile(r'^\s*(?:ROOT )?%\S+ = \((\w+\[[\d,]*\]).* (send|recv)\(.*_xla_megascale_transfer_type="(\w+)"')
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_SCALAR = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (?:pred|[su]\d+)\[\]\S* ([\w-]+)\((.*?)\)(.*)")


def collectives(hlo: str, mesh_shape: dict[str, int], device_ids: np.ndarray) -> list[dict]:
    """[{"kind", "axes", "count", "bytes"}] of one call, largest first.

    mesh_shape: sizes by axis name; device_ids: of the mesh, in its shape. axes: those along which the devices of a group differ,
    joined by "+"; "slices" for transfers between slices. count: number of executions, loops included. bytes: of the whole array,
    before a reduction or after a gather, times count; how much of it one device sends depends on the algorithm.
    Raises ValueError if it cannot read a replica group, or the trip count of a loop that communicates.
    """
    lines = _computations(hlo)
    times = _times(lines)
    place = {int(d): index for index, d in np.ndenumerate(device_ids)}
    sums, seen = collections.Counter(), set()
    counts = collections.Counter()
    for name, body in lines.items():
        for line in body:
            if crossing := _crossing(line):
                kind, size = crossing
                counts[kind, "slices"] += times[name]
                sums[kind, "slices"] += times[name] * size
            if not (match := _OP.match(line)):
                continue
            # TPUs split an asynchronous collective into fusions (start, steps, done) of one chain: count it once.
            if chain := re.search(r'chain_id="(\d+)"', line):
                channel = re.search(r"channel_id=(\d+)", line)
                key = (chain[1], channel and channel[1])
                if key in seen:
                    continue
                seen.add(key)
            shapes, kind, started = match.groups()
            members = _members(line, kind, device_ids.size)
            axes = _axes(members, place, list(mesh_shape))
            if not axes:
                continue
            size = _size(shapes, kind, bool(started)) * (len(members) if kind == "reduce-scatter" else 1)
            if name.startswith("all-reduce-scatter"):  # TPUs' name for a fusion that keeps, and sends, a part of the sum
                kind = "reduce-scatter"
            counts[kind, axes] += times[name]
            sums[kind, axes] += times[name] * size
    found = [{"kind": k, "axes": a, "count": counts[k, a], "bytes": sums[k, a]} for k, a in counts if counts[k, a]]
    return sorted(found, key=lambda c: -c["bytes"])


def _crossing(line: str) -> tuple[str, int] | None:
    """(kind, bytes of the whole array) of a transfer to other slices; None for any other line."""
    if not (match := _FROM_SLICE_TO_SLICE.match(line)):
        return None
    shape, way, kind = match.groups()
    kind = kind.lower().replace("_", "-").replace("one-to-one", "collective-permute")
    whole = "recv" if kind == "all-gather" else "send"
    return (kind, _size(shape, kind, False)) if way == whole else None


def _computations(hlo: str) -> dict[str, list[str]]:
    """Lines by computation; the program itself is "ENTRY"."""
    lines, name = {}, None
    for line in hlo.splitlines():
        if head := _HEAD.match(line):
            name = "ENTRY" if head[1] else head[2]
            lines[name] = []
        elif name:
            lines[name].append(line)
    return lines


def _called(line: str) -> list[str]:
    branches = _BRANCHES.search(line)
    return _CALLED.findall(line) + ([b.strip().lstrip("%") for b in branches[1].split(",")] if branches else [])


def _times(lines: dict[str, list[str]]) -> collections.Counter:
    """How often each computation that communicates, itself or in one it calls, runs in one call.

    The others do not matter, and only they have loops whose end depends on computed values.
    """
    callers, senders = collections.defaultdict(set), set()
    for name, body in lines.items():
        for line in body:
            for called in _called(line):
                callers[called].add(name)
    queue = [name for name, body in lines.items() if any(_OP.match(line) or _FROM_SLICE_TO_SLICE.match(line) for line in body)]
    while queue:
        if (name := queue.pop()) not in senders:
            senders.add(name)
            queue += callers[name]
    times, queue = collections.Counter(), [("ENTRY", 1)]
    while queue:
        name, n = queue.pop()
        times[name] += n
        for line in lines.get(name, ()):
            if sending := [called for called in _called(line) if called in senders]:
                queue += [(called, n * (_trips(line, lines) if " while(" in line else 1)) for called in sending]
    return times


def _trips(line: str, lines: dict[str, list[str]]) -> int:
    """Trip count of a loop: stated by the compiler, else its condition's bound over its counter's step, counting from 0."""
    if known := re.search(r'known_trip_count"?:\{"n":"(\d+)"', line):
        return int(known[1])
    of = lambda what: lines.get(re.search(rf"{what}=%?([\w.-]+)", line)[1], [])
    condition, body = _scalars(of("condition")), _scalars(of("body"))
    compared = next((s for s in condition.values() if s.op == "compare" and s.more.startswith(", direction=L")), None)
    result = next((root for root in of("body") if root.lstrip().startswith("ROOT ") and " tuple(" in root), None)
    if compared and result:
        counter, bound = (condition.get(name) for name in compared.operands)
        place = counter and re.match(r", index=(\d+)", counter.more)
        new = place and body.get(_operands(result.partition(" tuple(")[2])[int(place[1])])
        steps = [body[name].value for name in new.operands if name in body] if new and new.op == "add" else []
        step = next(filter(None, steps), None)
        if step and bound and bound.value is not None:
            return -(-(bound.value + ("direction=LE" in compared.more)) // step)
    raise ValueError(f"a loop that sends, and does not count in a way known here how often: {line.strip()[:300]}")


class _Scalar(NamedTuple):
    op: str
    operands: list[str]
    more: str  # rest of the line
    value: int | None  # if it is a constant


def _scalars(body: list[str]) -> dict[str, _Scalar]:
    """The integer and boolean scalars that a computation defines, by name."""
    found = {}
    for name, op, inside, more in (match.groups() for match in map(_SCALAR.match, body) if match):
        value = int(inside) if op == "constant" and inside.lstrip("-").isdigit() else None
        found[name] = _Scalar(op, _operands(inside), more, value)
    return found


def _operands(text: str) -> list[str]:
    return re.findall(r"%([\w.-]+)", text.partition(")")[0])


def _members(line: str, kind: str, devices: int) -> list[int]:
    """Ids (indices in the program's device order) of the first group; for a permutation, of the first pair of two devices."""
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", line)
        found = [tuple(map(int, p.split(","))) for p in re.findall(r"\d+,\d+", pairs[1])] if pairs else []
        return list(next((p for p in found if p[0] != p[1]), (0,)))
    # TPU notation: the group's axes in a mesh of its own, over devices in order or in that of a transposed grid.
    if mesh := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}", line
    ):
        sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        ids = np.arange(math.prod(sizes.values()))
        if mesh[3]:
            ids = ids.reshape([int(n) for n in mesh[2].split(",")]).transpose([int(n) for n in mesh[3].split(",")])
        ids = ids.reshape(list(sizes.values()))
        chosen = re.findall(r"'([^']+)'", mesh[4])
        return ids[tuple(slice(None) if axis in chosen else 0 for axis in sizes)].ravel().tolist()
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return [int(i) for i in listed[1].split(",")]
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        ids = np.arange(devices).reshape([int(n) for n in iota[3].split(",")])
        if iota[4]:
            ids = ids.transpose([int(n) for n in iota[4].split(",")])
        return ids.reshape(int(iota[1]), int(iota[2]))[0].tolist()
    if "replica_groups=" in line and "replica_groups={}" not in line:
        raise ValueError(f"replica groups in a form not known here: {line.strip()[:300]}")
    return list(range(devices))


def _axes(members: list[int], place: dict[int, tuple], names: list[str]) -> str:
    """Axes along which `members` differ, joined by "+". Members index the program's device order, which is that of the mesh."""
    order = list(place.values())
    differ = [len({order[m][i] for m in members}) > 1 for i in range(len(names))]
    return "+".join(name for name, d in zip(names, differ, strict=True) if d)


def _size(shapes: str, kind: str, started: bool) -> int:
    """Bytes of the results. The start of an asynchronous gather or permutation also lists its operands, which come first."""
    sizes = [
        _BYTES[t] * math.prod(int(n) for n in dims.split(",") if n)
        for t, dims in re.findall(r"\b([a-z]+\d*\w*)\[([\d,]*)\]", shapes)
        if t in _BYTES
    ]
    if started and kind in ("all-gather", "collective-permute"):
        half = [s for s in sizes if s > 8]
        return sum(half[len(half) // 2 :])
    return sum(sizes)
