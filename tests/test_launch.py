"""The launch scripts: what is restarted and what is not, what tpu_vm.sh would run, and that the YAML files are consistent."""

import contextlib
import importlib.util
import itertools
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parents[1] / "launch"
AGAIN, FOR_GOOD = (75, 76, 137, 143), (0, 1, 2, 3, 4, 5, 127)


def bash(script: str | Path, *args: str, **variables: str) -> subprocess.CompletedProcess:
    command = ["bash", str(LAUNCH / script), *args]
    variables = {"JAX_PLATFORMS": ""} | variables
    return subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("path", [*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"], ids=lambda p: p.name)
def test_every_script_parses(path):
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True).returncode == 0


@pytest.mark.parametrize("path", [*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"], ids=lambda p: p.name)
def test_every_script_runs_in_the_bash_of_macos(path):
    """bash 3.2, where -u treats an empty array as unset, and BSD's mktemp, which has no long options."""
    text = path.read_text()
    for name in set(re.findall(r"\b(\w+)=\(\)", text)):
        expanded = text.replace(f'${{{name}[@]+"${{{name}[@]}}"}}', "")
        guarded = f"((${{#{name}[@]}}))" in text
        assert guarded or f"${{{name}[@]}}" not in expanded, f'{name} may be empty: ${{{name}[@]+"${{{name}[@]}}"}}'
    assert "mktemp --" not in text


@pytest.mark.parametrize("code", [*AGAIN, *FOR_GOOD])
def test_restart_runs_again_what_can_go_on(tmp_path, code):
    count = tmp_path / "count"
    script = f'echo x >> "{count}"; [ $(wc -l < "{count}") -ge 3 ] && exit 0; exit {code}'
    done = bash("restart.sh", "bash", "-c", script, BACKOFF="0")
    assert done.returncode == (0 if code in AGAIN else code)
    assert len(count.read_text().split()) == (3 if code in AGAIN else 1)


def test_restart_gives_up_after_so_many(tmp_path):
    done = bash("restart.sh", "bash", "-c", f'echo x >> "{tmp_path / "count"}"; exit 76', BACKOFF="0", RESTARTS="2")
    assert done.returncode == 76 and "no restart left" in done.stderr
    assert len((tmp_path / "count").read_text().split()) == 3


@pytest.mark.parametrize(
    ("script", "name", "value"),
    [
        *itertools.product(["restart.sh", "tpu_vm.sh"], ["RESTARTS", "BACKOFF"], ["two", "0.5", "-1", "x[$(touch here)]"]),
        *itertools.product(["slurm.sbatch"], ["RESTARTS"], ["two", "x[$(touch here)]"]),
    ],
)
def test_numbers_of_restarts_are_checked_before_anything_is_run(tmp_path, script, name, value):
    program = tmp_path / "program"
    program.write_text(f'#!/bin/sh\ntouch "{tmp_path}/ran"\nexit 75\n')
    program.chmod(0o755)
    for called in ("gcloud", "srun"):
        (tmp_path / called).symlink_to(program)
    args = (str(program),) if script == "restart.sh" else ("--workdir=gs://b/r",)
    job = {"TPU": "pod", "ZONE": "z", "TYPE": "v5p-16", "SLURM_SUBMIT_DIR": str(LAUNCH.parent), "SLURM_JOB_ID": "1"}
    done = bash(script, *args, PATH=f"{tmp_path}:{os.environ['PATH']}", **job, **{name: value})
    assert (done.returncode, done.stderr) == (2, f"{script}: {name}={value}: expected a whole number\n")
    assert not (tmp_path / "ran").exists()


def test_numbers_of_restarts_with_zeros_in_front_are_no_octal_ones(tmp_path):
    done = bash("restart.sh", "bash", "-c", f'echo x >> "{tmp_path / "count"}"; exit 76', BACKOFF="00", RESTARTS="08")
    assert done.returncode == 76 and "(RESTARTS=8)" in done.stderr
    assert len((tmp_path / "count").read_text().split()) == 9


def test_restart_passes_a_signal_on_and_then_ends(tmp_path):
    script = f'trap "sleep 0.2; exit 75" TERM; echo x >> "{tmp_path / "count"}"; while :; do sleep 0.05; done'
    process = subprocess.Popen(["bash", str(LAUNCH / "restart.sh"), "bash", "-c", script], env={**os.environ, "BACKOFF": "0"})
    while not (tmp_path / "count").exists():
        time.sleep(0.02)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 75
    assert len((tmp_path / "count").read_text().split()) == 1


@pytest.fixture
def alone(tmp_path):
    """A copy of the launch folder without a .venv, so that local.sh uses $PYTHON."""
    return shutil.copytree(LAUNCH, tmp_path / "repository" / "launch")


def interrupt(tmp_path: Path, script: Path, *args: str, pids: int = 1, **variables: str) -> int:
    """The exit code of a script after Ctrl-C, sent to all processes of the terminal once the script's commands have written
    `pids` files PID.*. Fails if one of these processes survives."""
    process = subprocess.Popen(
        ["bash", str(script), *args],
        env={**os.environ, **variables},
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # as a shell would start it, however pytest was started
    )
    try:
        while len(list(tmp_path.glob("PID.*"))) < pids:
            time.sleep(0.02)
        time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        code = process.wait(15)
        for path in tmp_path.glob("PID.*"):
            with pytest.raises(ProcessLookupError):
                os.kill(int(path.suffix[1:]), 0)
        return code
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_ctrl_c_ends_a_command_that_does_not_listen_yet(tmp_path):
    """Like Python before training: bash's background processes ignore SIGINT."""
    assert interrupt(tmp_path, LAUNCH / "restart.sh", "bash", "-c", f'touch "{tmp_path}/PID.$$"; exec sleep 60') == 143


def test_ctrl_c_lets_a_command_that_listens_end_well(tmp_path):
    command = f'trap "exit 75" TERM; touch "{tmp_path}/PID.$$"; while :; do sleep 0.05; done'
    assert interrupt(tmp_path, LAUNCH / "restart.sh", "bash", "-c", command) == 75


def test_ctrl_c_ends_the_pause_before_a_restart(tmp_path):
    command = f'touch "{tmp_path}/PID.$$"; exit 76'
    begun = time.monotonic()
    assert interrupt(tmp_path, LAUNCH / "restart.sh", "bash", "-c", command, BACKOFF="60") == 76
    assert time.monotonic() - begun < 15


@pytest.mark.parametrize("n", [1, 3])
def test_ctrl_c_ends_every_process_of_local(alone, tmp_path, n):
    program = tmp_path / "python"
    program.write_text(f'#!/usr/bin/env bash\ntouch "{tmp_path}/PID.$$"\nexec sleep 60\n')
    program.chmod(0o755)
    assert interrupt(tmp_path, alone / "local.sh", str(n), pids=n, PYTHON=str(program), PORT="1234") == 143


@pytest.mark.parametrize("codes, expected", [("75 75 75", 75), ("3 75 75", 3)])
def test_local_gives_the_code_of_each_process_after_ctrl_c(alone, tmp_path, codes, expected):
    program = tmp_path / "python"
    program.write_text(
        '#!/usr/bin/env bash\nfor a in "$@"; do case $a in --process_id=*) i=${a#*=} ;; esac; done\n'
        f'codes=({codes})\ntrap \'sleep "0.$i"; exit "${{codes[$i]}}"\' TERM\ntouch "{tmp_path}/PID.$$"\n'
        "while :; do sleep 0.05; done\n"
    )
    program.chmod(0o755)
    assert interrupt(tmp_path, alone / "local.sh", "3", pids=3, PYTHON=str(program), PORT="1234") == expected


@pytest.fixture
def pretended(tmp_path):
    """A fake python that, as process i of a job, exits with the i-th code in $CODES."""
    program = tmp_path / "python"
    program.write_text(
        "#!/usr/bin/env bash\n"
        'for a in "$@"; do case $a in --process_id=*) i=${a#*=} ;; esac; done\n'
        f'echo "$*" >> "{tmp_path}/told"\necho "${{CUDA_VISIBLE_DEVICES-unset}}" > "{tmp_path}/gpus.${{i:-0}}"\n'
        'codes=($CODES)\nexit "${codes[${i:-0}]}"\n'
    )
    program.chmod(0o755)
    return {"PYTHON": str(program), "PORT": "1234", "RESTARTS": "0"}


@pytest.mark.parametrize(
    "codes, expected", [("0 0", 0), ("75 75", 75), ("76 2", 2), ("3 76", 3), ("137 76", 137), ("76 75", 75), ("1 76", 1)]
)
def test_local_gives_the_code_of_the_process_that_knows_best(alone, pretended, tmp_path, codes, expected):
    done = bash(alone / "local.sh", "2", "--config=c.py", "--workdir=w", CODES=codes, **pretended)
    assert done.returncode == expected, done.stderr
    told = sorted((tmp_path / "told").read_text().splitlines())
    job = "--coordinator=127.0.0.1:1234 --num_processes=2 --process_id="
    assert told == [f"-m gpt4o_jax train --config=c.py --workdir=w {job}{i}" for i in (0, 1)]


def with_gpus(folder: Path, n: int) -> str:
    """A PATH whose nvidia-smi lists n GPUs, the first one split in two (MIG); with n=0 it reports that it found no driver."""
    lines = [f"GPU {i}: NVIDIA H100 (UUID: GPU-1{i})" for i in range(n)] or ["NVIDIA-SMI has failed"]
    lines[1:1] = ["  MIG 3g.40gb Device 0: (UUID: MIG-1)", "  MIG 3g.40gb Device 1: (UUID: MIG-2)"] if n else []
    folder.mkdir()
    (folder / "nvidia-smi").write_text("#!/bin/sh\ncat <<END\n" + "\n".join(lines) + f"\nEND\nexit {0 if n else 9}\n")
    (folder / "nvidia-smi").chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.mark.parametrize(
    "here, named, shares",
    [
        (4, None, ["0,1", "2,3"]),
        (4, "2,3", ["2", "3"]),
        (8, "GPU-10, GPU-1f,MIG-7,GPU-13", ["GPU-10,GPU-1f", "MIG-7,GPU-13"]),
        (4, "3,1,-1,0", ["3", "1"]),
        (4, "", ["", ""]),
        (4, "-1", ["-1", "-1"]),
        (0, None, ["unset", "unset"]),
    ],
)
def test_local_shares_out_the_gpus_that_it_may_use(alone, pretended, tmp_path, monkeypatch, here, named, shares):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    variables = {} if named is None else {"CUDA_VISIBLE_DEVICES": named}
    done = bash(alone / "local.sh", "2", CODES="0 0", PATH=with_gpus(tmp_path / "bin", here), **pretended, **variables)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"gpus.{i}").read_text().strip() for i in (0, 1)] == shares


def test_local_leaves_gpus_alone_where_cpus_are_asked_for(alone, pretended, tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    path = with_gpus(tmp_path / "bin", 3)
    done = bash(alone / "local.sh", "2", CODES="0 0", PATH=path, JAX_PLATFORMS="cpu", **pretended)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"gpus.{i}").read_text().strip() for i in (0, 1)] == ["unset", "unset"]


def test_local_tells_of_gpus_that_cannot_be_shared(alone, pretended, tmp_path):
    path = with_gpus(tmp_path / "bin", 4)
    done = bash(alone / "local.sh", "2", CODES="0 0", PATH=path, CUDA_VISIBLE_DEVICES="0,1,3", **pretended)
    told = "local.sh: CUDA_VISIBLE_DEVICES=0,1,3: 3 GPU(s) cannot be shared by 2 processes; nearest: 1 or 3\n"
    assert (done.returncode, done.stderr) == (2, told)


@pytest.mark.parametrize("args", [(), ("x",), ("0",), ("08",)])
def test_local_wants_a_number(args):
    done = bash("local.sh", *args)
    assert done.returncode == 2 and "launch/local.sh N TRAIN_FLAGS" in done.stderr and "too great for base" not in done.stderr


TPU_VM = "gcloud compute tpus tpu-vm"


def test_tpu_vm_prints_each_command():
    variables = dict(TPU="pod", ZONE="us-z", TYPE="v5p-16", SPOT="1")
    done = bash("tpu_vm.sh", "--dry-run", "--workdir=gs://b/r", "--config.train.length=20 steps", **variables)
    assert done.returncode == 0, done.stderr
    create, _archive, scp, prepare, train = done.stdout.splitlines()
    assert create.strip() == f"{TPU_VM} create pod --zone=us-z --accelerator-type=v5p-16 --version=v2-alpha-tpuv5 --spot"
    assert " scp " in scp and "pod:gpt4o_jax.tar.gz --zone=us-z --worker=all" in scp
    assert "requirements-tpu.txt" in prepare and "--command=set\\ -euo\\ pipefail\\;" in prepare
    (command,) = re.findall(r"--command=(.*)$", train)
    spoken = subprocess.run(["bash", "-c", f"printf %s {command}"], capture_output=True, text=True).stdout
    train = "JAX_PLATFORMS=tpu,cpu bash launch/alone.sh .venv/train.pid .venv/bin/python -m gpt4o_jax train"
    assert spoken == f"cd gpt4o_jax && {train} --workdir=gs://b/r --config.train.length=20\\ steps"


@pytest.mark.parametrize(
    ("type", "version"),
    [("v6e-16", "v2-alpha-tpuv6e"), ("v5litepod-8", "v2-alpha-tpuv5-lite"), ("v4-32", "tpu-ubuntu2204-base"), ("v9-8", None)],
)
def test_tpu_vm_takes_the_software_of_its_type(type, version):
    where = dict(TPU="pod", ZONE="z", TYPE=type)
    done = bash("tpu_vm.sh", "--dry-run", "--workdir", "gs://b/r", **where)
    if version:
        assert f"--accelerator-type={type} --version={version}" in done.stdout
    else:
        assert done.returncode == 2 and done.stderr == f"tpu_vm.sh: TYPE={type}: set VERSION to the TPU software version for it\n"
        assert "--version=new" in bash("tpu_vm.sh", "--dry-run", "--workdir=gs://b/r", VERSION="new", **where).stdout


def test_tpu_vm_does_not_take_dry_run_for_a_flag_of_train(cloud, tmp_path):
    done = bash("tpu_vm.sh", "--workdir=gs://b/r", "--dry-run", TPU="pod", ZONE="z", TYPE="v5p-16", PATH=cloud)
    assert done.returncode == 2 and "--dry-run comes first" in done.stderr and not (tmp_path / "told").exists()


@pytest.fixture
def cloud(tmp_path):
    """A PATH with a fake gcloud that logs its actions to a file: ssh and create exit with the next code in the file `codes` (or
    0), and code 9 also preempts the slice; describe reports the state of the slice.
    """
    bin = tmp_path / "bin"
    bin.mkdir()
    (bin / "gcloud").write_text(f"""#!/usr/bin/env bash
cd "{tmp_path}"
case $4 in
  describe) cat state 2>/dev/null; exit ;;
  delete) rm -f state ;;
  create | ssh)
    read -r code < codes
    sed -i.old 1d codes
    [[ $4 == ssh || $code != 0 ]] || echo READY > state
    [[ $code != 9 ]] || echo PREEMPTED > state ;;
esac
echo "$4" >> told
exit "${{code:-0}}"
""")
    (bin / "gcloud").chmod(0o755)
    return f"{bin}:{os.environ['PATH']}"


@pytest.mark.parametrize(
    "codes, expected, told",
    [
        ("0 0 0", 0, "create scp ssh ssh"),
        ("1", 1, "create"),  # such as a mistake in the name
        ("0 1", 1, "create scp ssh"),  # the install fails
        ("0 9 0 0 0", 0, "create scp ssh delete create scp ssh ssh"),  # the slice is lost during the install
        ("0 0 9 1 0 0 0", 0, "create scp ssh ssh delete create create scp ssh ssh"),  # and there is no new one right away
        ("0 0 75 0 0", 0, "create scp ssh ssh scp ssh ssh"),
        ("0 0 2", 2, "create scp ssh ssh"),
    ],
)
def test_tpu_vm_makes_a_lost_slice_again(cloud, tmp_path, codes, expected, told):
    (tmp_path / "codes").write_text("\n".join(codes.split()) + "\n")
    done = bash("tpu_vm.sh", "--workdir=gs://b/r", TPU="pod", ZONE="z", TYPE="v5p-16", PATH=cloud, BACKOFF="0")
    assert (done.returncode, (tmp_path / "told").read_text().split()) == (expected, told.split()), done.stderr


def test_tpu_vm_wants_storage_that_all_workers_see():
    done = bash("tpu_vm.sh", "--dry-run", "--workdir=runs/x", TPU="pod", ZONE="z", TYPE="v5p-8")
    assert done.returncode == 2 and "--workdir=gs://" in done.stderr


def test_alone_ends_what_an_earlier_call_left_running(tmp_path):
    program = tmp_path / "gpt4o_jax"
    program.write_text(
        '#!/usr/bin/env bash\ntrap "touch saved; exit 75" TERM\necho begun >> told\nwhile :; do sleep 0.05; done\n'
    )
    program.chmod(0o755)
    pid, told = tmp_path / "pid", tmp_path / "told"
    first = subprocess.Popen(["bash", str(LAUNCH / "alone.sh"), str(pid), str(program)], cwd=tmp_path)
    while not told.exists():
        time.sleep(0.02)
    assert int(pid.read_text()) == first.pid
    command = ["bash", str(LAUNCH / "alone.sh"), str(pid), "bash", "-c", "[[ -f saved ]] && exit 3"]
    threading.Thread(target=first.wait).start()  # as init does for orphans
    assert subprocess.run(command, cwd=tmp_path, timeout=60).returncode == 3
    assert first.returncode == 75


def test_alone_leaves_other_programs_alone(tmp_path):
    with subprocess.Popen(["sleep", "60"]) as other:
        (tmp_path / "pid").write_text(f"{other.pid}\n")
        assert bash("alone.sh", str(tmp_path / "pid"), "bash", "-c", "exit 4").returncode == 4
        assert other.poll() is None
        other.kill()


def test_skypilot_has_what_it_requires():
    """Its fields: tests/test_launch_skypilot.py."""
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert task["run"]
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == list(AGAIN)
    for part in ("setup", "run"):
        assert task[part].startswith("set -euo pipefail\n"), "or what follows a failed install would run"
        assert subprocess.run(["bash", "-n", "-c", task[part]]).returncode == 0


@pytest.mark.parametrize("gpus", [0, 8])
def test_skypilot_trains_under_restart_with_the_flags_of_gpus(tmp_path, gpus):
    """Run with a fake python that first exits as if a peer were lost, then succeeds."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    program = tmp_path / ".venv" / "bin" / "python"
    program.write_text(f'#!/bin/sh\necho "$*" >> "{tmp_path}/told"\n[ "$(wc -l < "{tmp_path}/told")" -ge 2 ] || exit 76\n')
    program.chmod(0o755)
    (tmp_path / "launch").symlink_to(LAUNCH)
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    job = {"SKYPILOT_NUM_NODES": "1", "CONFIG": "c.py", "WORKDIR": "w", "BACKOFF": "0"}
    path = with_gpus(tmp_path / "bin", gpus) if gpus else os.environ["PATH"]
    done = subprocess.run(["bash", "-c", task["run"]], cwd=tmp_path, env={**os.environ, **job, "PATH": path}, capture_output=True)
    assert done.returncode == 0, done.stderr
    flags = "launch/xla_flags.py cuda .venv/bin/python " if gpus else ""
    assert (tmp_path / "told").read_text().splitlines() == [f"{flags}-m gpt4o_jax train --config=c.py --workdir=w"] * 2


def test_local_takes_the_flags_of_gpus(alone, tmp_path, monkeypatch):
    """Looked up once, by the first call of the interpreter; every process gets them."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    program = tmp_path / "python"
    program.write_text(
        '#!/bin/sh\n[ "$2" != cuda ] || { echo --a=1; exit 0; }\necho "${XLA_FLAGS-unset}" >> ' + f'"{tmp_path}/told"\n'
    )
    program.chmod(0o755)
    how = {"PYTHON": str(program), "PORT": "1234", "CUDA_VISIBLE_DEVICES": "0,1"}
    for gpus, told in ((2, "--a=1"), (0, "unset")):
        (tmp_path / "told").unlink(missing_ok=True)
        done = bash(alone / "local.sh", "2", PATH=with_gpus(tmp_path / f"bin{gpus}", gpus), **how)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "told").read_text().split() == [told] * 2


def test_xla_flags_are_known_and_unknown_ones_left_out(monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("xla_flags", LAUNCH / "xla_flags.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setenv("XLA_FLAGS", "--xla_mine=1")
    assert module.main("cuda") == 0
    assert capsys.readouterr().out.split() == [*module.FLAGS["cuda"], "--xla_mine=1"]
    known = next(iter(module.FLAGS["cuda"]))
    monkeypatch.setitem(module.FLAGS, "cuda", {known: "", "--xla_no_such_flag=1": ""})
    assert module.main("cuda") == 0
    told = capsys.readouterr()
    assert told.out.split() == [known, "--xla_mine=1"] and "--xla_no_such_flag=1" in told.err
    assert module.main("abacus") == 2
    asked = []
    monkeypatch.setattr(module, "is_known", lambda flag: asked.append(flag) or flag == known)
    assert module.main("cuda") == 0 and capsys.readouterr().out.split() == [known, "--xla_mine=1"]
    assert asked == [f"{known} --xla_no_such_flag=1", known, "--xla_no_such_flag=1"], "together, then each"
    asked.clear()
    for platform in ("tpu", "cpu"):
        assert module.main(platform) == 0 and capsys.readouterr().out.split() == ["--xla_mine=1"] and not asked
    monkeypatch.setattr(module, "is_known", lambda flag: asked.append(flag) or True)
    assert module.main("cuda") == 0 and len(asked) == 1, "one look where all is well"
    ran = []
    monkeypatch.setattr(module.os, "execvpe", lambda program, args, env: ran.append((program, args, env["XLA_FLAGS"])))
    module.main("cuda", "echo", "x")
    assert ran == [("echo", ("echo", "x"), f"{known} --xla_no_such_flag=1 --xla_mine=1")]
