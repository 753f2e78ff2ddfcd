"""Measures the targets of targets.py: `python benchmarks/measure.py NAME ...`, or `--report` to write BENCHMARKS.md.

Each measurement runs the project's own commands in fresh processes and appends a record (value, date, commit,
machine) to results.jsonl. Stop other work on the machine first: measurements are short and wall time is noisy. --folder=DIR keeps
the runs of worlds and of fine-tuning in DIR, so that an interrupted measurement can be resumed.
"""

import concurrent.futures
import contextlib
import datetime
import functools
import json
import lzma
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).parent))
import applications
import fast_path
import finetuning
import generation_speed
import report
import request_speed
import training_speed
from commits import current_commit
from targets import TARGETS

from gpt4o_jax.config import DataConfig
from gpt4o_jax.data import sources

ROOT = Path(__file__).resolve().parent.parent


def gpt4o_jax(*args: str, prefix: list[str] | None = None, **environment: str) -> dict:
    """Runs a command of the project; returns the JSON object in its last line of stdout."""
    out = subprocess.run(
        [*(prefix or []), sys.executable, "-m", "gpt4o_jax", *args],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        check=True,
    )
    lines = out.stdout.decode().splitlines()
    return json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}


# ---------------------------------------------------------------- what can be measured: name -> (value, details)


def quickstart(folder: Path) -> dict:
    """launch/quickstart.sh in a fresh clone, with an empty cache: minutes, result, whether a second run gives the same bits."""
    clone = folder / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    start = time.monotonic()
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache")}
    subprocess.run(["bash", str(clone / "launch" / "quickstart.sh")], check=True, env=environment, stdout=sys.stderr)
    minutes = (time.monotonic() - start) / 60
    first, second = clone / "runs" / "quickstart", folder / "second"
    assert (first / "report.md").exists()
    again = gpt4o_jax("train", "--config=configs/quickstart.py", f"--workdir={second}")["bits_per_byte"]
    bits_per_byte = [r for r in map(json.loads, (first / "metrics.jsonl").open()) if r["kind"] == "eval"][-1]["bits_per_byte"]
    digests = [digest(run) for run in (first, second)]
    return {
        "quickstart_minutes": (minutes, {}),
        "quickstart_bits_per_byte": (bits_per_byte, {"second_run": again, "xz": xz_bits_per_byte()}),
        "quickstart_same_digest": (float(digests[0] == digests[1]), {"digests": digests}),
    }


def xz_bits_per_byte() -> float:
    """Bits per byte of `xz -9e` on the hold-out of the embedded corpus, after the training text."""
    training, held = sources.split(sources.load(DataConfig()), DataConfig())
    size = lambda texts: len(lzma.compress("\n\n".join(texts).encode(), preset=9 | lzma.PRESET_EXTREME))
    return 8 * (size(training + held) - size(training)) / sum(len(text.encode()) for text in held)


def char(variant: str):
    def measure(folder: Path) -> dict:
        text = os.environ["TINY_SHAKESPEARE"]  # path to karpathy/char-rnn's data/tinyshakespeare/input.txt

        def run(seed: int) -> float:
            # A model this small keeps one core busy: one seed per core, side by side.
            core = ["taskset", "-c", str(seed % os.cpu_count())] if shutil.which("taskset") else []
            flags = [f"--workdir={folder / str(seed)}", f"--config.data.path={text}", f"--config.seed={seed}"]
            return gpt4o_jax("train", f"--config=configs/shakespeare.py:{variant}", *flags, prefix=core)["loss"]

        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            losses = list(pool.map(run, range(3)))
        return {f"{variant}_loss": (statistics.mean(losses), {"losses": losses, "stdev": statistics.stdev(losses)})}

    return measure


def char_share(folder: Path) -> dict:
    """The share of nanoGPT's 2000 steps in which a char_cpu_fast run of 700 steps reaches nanoGPT's loss; mean of 3 seeds."""

    def run(seed: int) -> float:
        flags = {"data.path": os.environ["TINY_SHAKESPEARE"], "seed": seed, "train.length": "700 steps", "eval.every": 50}
        flags |= {"eval.max_tokens": 1_000_000, "sample.every": 0, "checkpoint.every": 0}
        workdir = folder / str(seed)
        config = [f"--config.{name}={value}" for name, value in flags.items()]
        gpt4o_jax("train", "--config=configs/shakespeare.py:char_cpu_fast", f"--workdir={workdir}", *config)
        evals = [r for r in map(json.loads, (workdir / "metrics.jsonl").open()) if r["kind"] == "eval"]
        return next((r["step"] for r in evals if r["loss"] <= 1.886), 2000) / 2000

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        shares = list(pool.map(run, range(3)))
    return {"char_cpu_fast_share": (statistics.mean(shares), {"shares": shares})}


def torch_char(folder: Path) -> dict:
    """The recipe of char_cpu in torch, evaluated the same way: what the reference reaches. PEERS_PYTHON: its interpreter."""

    def run(seed: int) -> float:
        program = [os.environ.get("PEERS_PYTHON", sys.executable), "benchmarks/torch_char.py", os.environ["TINY_SHAKESPEARE"]]
        out = subprocess.run([*program, str(seed)], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
        return json.loads(out)["loss"]

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        losses = list(pool.map(run, range(3)))
    return {"torch_char_loss": (statistics.mean(losses), {"losses": losses, "stdev": statistics.stdev(losses)})}


def prefill_decode(folder: Path) -> dict:
    """The largest of the errors that tests/model/test_cache.py keeps below the target."""
    import jax

    from gpt4o_jax import parallel

    sys.path.insert(0, str(ROOT))
    from tests.model import test_cache

    with jax.set_mesh(parallel.make_mesh(devices=jax.devices()[:1])):
        return {"prefill_decode_error": (max(map(test_cache.distance_from_the_full_pass, test_cache.VARIANTS)), {})}


def agreement(folder: Path) -> dict:
    """How many of the tests that compare with transformers and lm-evaluation-harness did not pass.

    PEERS_PYTHON: the interpreter of an environment with requirements-dev.txt and requirements-peers.txt.
    """
    files = ("tests/interop/test_peers.py", "tests/interop/test_tokenizer_config.py", "tests/evaluation/test_harness_peers.py")
    python, found = os.environ.get("PEERS_PYTHON", sys.executable), folder / "tests.xml"
    subprocess.run([python, "-m", "pytest", "-q", f"--junitxml={found}", *files], cwd=ROOT, stdout=sys.stderr)
    counts = {k: int(v) for k, v in ElementTree.parse(found).find("testsuite").attrib.items() if v.isdigit()}
    bad = counts["errors"] + counts["failures"] + counts["skipped"]
    program = "import importlib.metadata as m; print(*map(m.version, ['torch', 'transformers', 'lm-eval']))"
    versions = subprocess.run([python, "-c", program], stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    return {"peers_disagree": (bad, counts | dict(zip(("torch", "transformers", "lm-eval"), versions, strict=True)))}


def fewer_bits(folder: Path) -> dict:
    """Bits per byte that quantised weights and caches add on the hold-out: for a dense model and a mixture of experts."""
    kinds = [{"weights": "int8"}, {"weights": "int4"}, {"kv_cache": "int8"}, {"weights": "int4", "kv_cache": "int8"}]
    experts = {"n_experts": 8, "experts_per_token": 2, "expert_d_ff": 512}
    costs = {}
    for name, knobs in (("dense", {}), ("experts", experts)):
        run = f"--workdir={folder / name}"
        flags = [f"--config.model.{k}={v}" for k, v in knobs.items()]
        trained = gpt4o_jax("train", "--config=configs/quickstart.py", "--config.train.length=300 steps", run, *flags)
        costs[name] = {"unrounded": trained["bits_per_byte"]}
        for kind in kinds:
            scores = gpt4o_jax("evaluate", run, *(f"--{k}={v}" for k, v in kind.items()))
            label = ", ".join(f"{v} {k}" for k, v in kind.items())
            costs[name][label] = scores["as_generated"]["bits_per_byte_added"]
    worst = lambda label: max(cost[label] for cost in costs.values())
    return {
        "int8_weights_cost": (worst("int8 weights"), costs),
        "int4_weights_cost": (worst("int4 weights"), {}),
        "int8_cache_cost": (worst("int8 kv_cache"), {}),
    }


def first_step(folder: Path) -> dict:
    """Seconds from process start to the end of the first step of nano, with the compilation cache cold and warm."""
    run = folder / "run"
    common = (
        "--config=configs/gpt4o.py:nano",
        "--config.train.length=1 steps",
        "--config.train.steps_per_dispatch=1",
        "--config.log.every=1",
        "--config.eval.max_tokens=1",
        "--config.sample.max_new_tokens=1",
    )
    cold, warm = [], []
    gpt4o_jax("train", *common, f"--workdir={run}", JAX_COMPILATION_CACHE_DIR=str(folder / "prepare"))
    for trial in range(3):
        cache = str(folder / f"xla{trial}")
        for times in (cold, warm):
            shutil.rmtree(run / "checkpoints")
            times.append(_until_first_step([*common, f"--workdir={run}"], cache))
    return {
        "first_step_cold_seconds": (statistics.median(cold), {"all": cold}),
        "first_step_warm_seconds": (statistics.median(warm), {"all": warm}),
    }


def _until_first_step(args: list[str], cache: str) -> float:
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "gpt4o_jax", "train", *args],
        cwd=ROOT,
        env=os.environ | {"JAX_COMPILATION_CACHE_DIR": cache},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    seconds = None
    for line in process.stderr:
        if seconds is None and "step 1/1" in line:
            seconds = round(time.monotonic() - start, 2)
    process.wait()
    return seconds


def help_text(folder: Path) -> dict:
    times = []
    for _ in range(5):
        start = time.monotonic()
        subprocess.run([sys.executable, "-m", "gpt4o_jax", "train", "--help"], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
        times.append(round(time.monotonic() - start, 3))
    return {"help_seconds": (statistics.median(times), {"all": times})}


def seek(folder: Path) -> dict:
    """Seconds until a dispatch at step 10^6 is ready, with the corpus prepared and open: the slowest of all kinds of rows."""
    from gpt4o_jax.commands import config_file
    from gpt4o_jax.data import corpus as corpora
    from gpt4o_jax.data.batches import dispatches
    from gpt4o_jax.data.rows import ROWS

    step, mixed = 10**6, f"('python_docs=0.7', 'text:{ROOT}/gpt4o_jax/**/[!_]*.py=0.3')"
    kinds = {kind: {"data.rows": kind} for kind in ROWS}
    kinds |= {f"mixture, {kind}": {"data.source": "mixture", "data.mixture": mixed, "data.rows": kind} for kind in ROWS}
    kinds["lanes"] = {"data.lanes": "8", "data.shingle_bytes": "0"}
    times = {}
    for kind, knobs in kinds.items():
        knobs = knobs | {"data.cache_dir": str(folder / "cache")}
        config = config_file.read(str(ROOT / "configs" / "quickstart.py"), knobs)
        K, B = config.train.steps_per_dispatch, config.train.batch_size
        trials = []
        for _ in range(4):  # the first tokenizes the text, and counts its tokens for the lanes
            corpus = corpora.prepare(config)
            start = time.monotonic()
            rows = corpora.training_rows(config, corpus)
            next(dispatches(rows, step, step + K, K, B, prefetch=1))
            trials.append(round(time.monotonic() - start, 3))
        times[kind] = {"seconds": statistics.median(trials[1:]), "epoch": round(step * B * rows.T / rows.tokens_per_epoch)}
    return {"seek_seconds": (max(t["seconds"] for t in times.values()), times)}


def mup_transfer(folder: Path) -> dict:
    """By how many factors of 2 the best learning rate changes from width 64 to 256, with and without muP."""
    import mup_transfer as transfer

    losses = transfer.table()
    mup, standard = transfer.shifts(losses).values()
    details = {"rates": transfer.RATES, "losses": losses}
    return {"mup_rate_shift": (abs(mup), details), "standard_rate_shift": (standard, {})}


def _speed(shape: str, folder: Path) -> dict:
    return training_speed.measure(shape)


def _generation(batch: int, folder: Path) -> dict:
    return generation_speed.measure(batch)


MEASUREMENTS = {
    "quickstart": quickstart,
    "char_cpu": char("char_cpu"),
    "char_cpu_fast": char("char_cpu_fast"),
    "char_share": char_share,
    "torch_char": torch_char,
    **{shape: functools.partial(_speed, shape) for shape in training_speed.SHAPES},
    **{f"generate_b{batch}": functools.partial(_generation, batch) for batch in generation_speed.BATCHES},
    "batching": request_speed.measure_batching,
    "speculation": request_speed.measure_speculation,
    **{f"world_{world}": functools.partial(applications.measure_world, world) for world in applications.WORLD_TARGETS},
    "applications": applications.measure_joint,
    "lora": finetuning.measure_lora,
    "preferences": finetuning.measure_preferences,
    "rewards": finetuning.measure_rewards,
    "agreement": agreement,
    "fewer_bits": fewer_bits,
    "prefill_decode": prefill_decode,
    "first_step": first_step,
    "help": help_text,
    "seek": seek,
    "mup_transfer": mup_transfer,
    "fast_path": lambda folder: fast_path.measure_fast_path(),
}


def digest(run: Path) -> str:
    """SHA-256 of the newest checkpoint's weights: paths, types, shapes and bytes."""
    program = (
        "import hashlib, jax, sys; from gpt4o_jax.run import open_run; r = open_run(sys.argv[1]); h = hashlib.sha256()\n"
        "for path, x in jax.tree_util.tree_leaves_with_path(r.params):\n"
        "    h.update(f'{jax.tree_util.keystr(path)} {x.dtype} {x.shape}'.encode() + jax.device_get(x).tobytes())\n"
        "print(h.hexdigest())"
    )
    out = subprocess.run([sys.executable, "-c", program, str(run)], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    return out.stdout.decode().strip()


# ---------------------------------------------------------------- records


def record(name: str, value: float, details: dict, commit: str) -> None:
    entry = {
        "name": name,
        "value": value,
        "details": details,
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "machine": f"{os.cpu_count()} cores, {_processor()}, Python {platform.python_version()}",
    }
    with report.RESULTS.open("a") as f:
        f.write(json.dumps(entry) + "\n")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def main(names: list[str]) -> None:
    kept = next((Path(n.removeprefix("--folder=")).resolve() for n in names if n.startswith("--folder=")), None)
    names = [n for n in names if not n.startswith("--folder=")]
    if names == ["--report"]:
        report.write()
        return
    unknown = set(names) - set(MEASUREMENTS)
    if unknown or not names:
        sys.exit(f"measure.py: expected --report or some of {', '.join(MEASUREMENTS)}; got {' '.join(names) or 'nothing'}")
    for name in names:
        commit = current_commit()
        with contextlib.nullcontext(kept) if kept else tempfile.TemporaryDirectory(prefix="gpt4o_jax_") as folder:
            for target, (value, details) in MEASUREMENTS[name](Path(folder)).items():
                record(target, value, details, details.pop("commit", commit))
                wanted = f" (target {TARGETS[target]})" if target in TARGETS else ""
                print(f"{target}: {value:.4g}{wanted}")


if __name__ == "__main__":
    main(sys.argv[1:])
