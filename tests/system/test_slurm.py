"""launch/slurm.sbatch on a real Slurm whose only node is this machine: submitted, requeued, done, with the same bits.

Needs root and Debian's slurm-wlm and munge, which are installed here if INSTALL_SLURM=1 allows it. The daemons use a temporary
folder and end with the test.
"""

import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.system.jobs import digest, environment, free_port, losses, run, write_inputs

pytestmark = [pytest.mark.system, pytest.mark.filterwarnings("ignore:Sharding info not provided")]

STEPS, EVERY = 200, 50
ROOT = Path(__file__).parents[2]
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={port1}
SlurmdPort={port2}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MailProg=/bin/true
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def install() -> None:
    if shutil.which("slurmctld") and shutil.which("munged"):
        return
    if os.environ.get("INSTALL_SLURM") != "1":
        pytest.skip("no Slurm here; INSTALL_SLURM=1 lets this test install slurm-wlm and munge with apt-get")
    if os.geteuid() or not shutil.which("apt-get"):
        pytest.skip("no Slurm here, and only root on Debian or Ubuntu can install it")
    command = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "slurm-wlm", "munge"]
    done = subprocess.run(command, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"}, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no Slurm here, and it cannot be installed: {done.stderr.splitlines()[-1]}")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A function: Slurm command -> output."""
    install()
    if os.geteuid():
        pytest.skip("a Slurm for one test needs root")
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    host, cpus = socket.gethostname().split(".")[0], os.cpu_count()
    text = CONFIG.format(host=host, folder=folder, cpus=cpus, port1=free_port(), port2=free_port())
    (folder / "slurm.conf").write_text(text)
    variables = environment(folder, SLURM_CONF=str(folder / "slurm.conf"))
    files = [f"--{f}={folder}/munge.{f.split('-')[0]}" for f in ("socket", "key-file", "pid-file", "log-file", "seed-file")]
    started = []

    def begin(*command):
        with open(folder / f"{command[0]}.out", "w") as out:
            started.append(subprocess.Popen(command, env=variables, stdout=out, stderr=out))

    def ask(*command, **more: str) -> str:
        done = subprocess.run(command, env=variables | more, capture_output=True, text=True, timeout=60, cwd=ROOT)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    try:
        begin("munged", "--foreground", "--force", *files)
        wait_until(lambda: (folder / "munge.socket").exists(), 20)
        begin("slurmctld", "-D", "-f", str(folder / "slurm.conf"))
        begin("slurmd", "-D", "-N", host, "-f", str(folder / "slurm.conf"))
        wait_until(lambda: "idle" in ask("sinfo", "-h", "-o", "%T"), 60)
        yield ask
        ask("scancel", "--user=root")
        time.sleep(2)
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait(30)


def wait_until(holds, seconds: float) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            if holds():
                return
        except AssertionError:
            pass  # the daemon does not answer yet
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.5)


@pytest.fixture
def submitted(slurm, tmp_path):
    """A function: (flags of sbatch, what a fake python does as a process of the job) -> (job id, state(), log())."""

    def submit(*flags: str, does: str):
        python, log = tmp_path / "python", tmp_path / "job.log"
        python.write_text(f"#!/usr/bin/env bash\ncd {shlex.quote(str(tmp_path))}\n{does}\n")
        python.chmod(0o755)
        small = ["--nodes=1", "--ntasks-per-node=2", "--cpus-per-task=1", "--gpus-per-node=0", "--time=30", *flags]
        command = ["sbatch", "--parsable", f"--chdir={ROOT}", f"--output={log}", *small, str(ROOT / "launch/slurm.sbatch")]
        job = slurm(*command, **environment(tmp_path, PYTHON=str(python))).strip()
        state = lambda: slurm("scontrol", "show", "job", job).split("JobState=")[1].split()[0]
        return job, state, lambda: log.read_text() if log.exists() else ""

    return submit


LISTENS = """
trap 'echo "saved by $SLURM_PROCID"; exit 75' TERM
touch "ready.$SLURM_PROCID.${SLURM_RESTART_COUNT:-0}"
while :; do sleep 0.1; done
"""


def test_a_job_that_is_cancelled_saves_and_does_not_come_back(submitted, slurm, tmp_path):
    job, state, log = submitted(does=LISTENS)
    wait_until(lambda: len(list(tmp_path.glob("ready.*"))) == 2, 60)
    slurm("scancel", job)
    wait_until(lambda: state() not in ("RUNNING", "COMPLETING"), 90)
    assert state() == "CANCELLED", log()
    assert "saved by 0" in log() and "saved by 1" in log()


def test_a_job_whose_time_is_nearly_up_saves_and_comes_back(submitted, slurm, tmp_path):
    job, state, log = submitted("--time=3", does=LISTENS)  # so the signal is due after one minute
    wait_until(lambda: "exit code 75" in log(), 150)
    assert "saved by 0" in log() and "saved by 1" in log()
    wait_until(lambda: state() == "PENDING", 90)
    slurm("scontrol", "update", f"JobId={job}", "StartTime=now")
    wait_until(lambda: (tmp_path / "ready.1.1").exists(), 60)
    assert "start number 2" in log()
    slurm("scancel", job)
    wait_until(lambda: state() == "CANCELLED", 90)


def test_a_job_in_which_one_process_makes_a_mistake_is_not_queued_again(submitted):
    _, state, log = submitted(does="sleep 1; exit $((SLURM_PROCID ? 5 : 76))")
    wait_until(lambda: state() in ("FAILED", "PENDING") and "start number" in log(), 90)
    assert state() == "FAILED", log()
    assert "queued again" not in log()


def test_a_process_has_the_cores_that_were_asked_for(submitted, tmp_path):
    cores = os.cpu_count()
    does = 'echo "$SLURM_CPUS_PER_TASK" > cores'
    _, state, log = submitted("--ntasks-per-node=1", f"--cpus-per-task={cores}", does=does)
    wait_until(lambda: state() == "COMPLETED", 90)
    assert (tmp_path / "cores").read_text() == f"{cores}\n", log()


def test_a_job_that_is_requeued_goes_on_to_the_same_bits(slurm, tmp_path):
    write_inputs(tmp_path, STEPS, EVERY)
    run(tmp_path, "undisturbed", 2)
    small = ["--nodes=1", "--ntasks-per-node=2", "--cpus-per-task=1", "--gpus-per-node=0", "--time=30"]
    flags = [f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'run'}"]
    log = tmp_path / "job.log"
    command = ["sbatch", "--parsable", f"--chdir={ROOT}", f"--output={log}", *small, str(ROOT / "launch/slurm.sbatch"), *flags]
    job = slurm(*command, **environment(tmp_path, PYTHON=sys.executable)).strip()
    state = lambda: slurm("scontrol", "show", "job", job).split("JobState=")[1].split()[0]
    told = lambda: log.read_text() if log.exists() else ""

    wait_until(lambda: f"] step 20/{STEPS}" in told() or state() == "FAILED", 300)
    assert "2 processes, 2 devices; told by Slurm" in told(), told()
    slurm("scontrol", "requeue", job)
    wait_until(lambda: "saved; run the same command again" in told(), 60)
    wait_until(lambda: state() == "PENDING", 90)
    slurm("scontrol", "update", f"JobId={job}", "StartTime=now")  # Slurm would make it wait two minutes
    wait_until(lambda: state() in ("COMPLETED", "FAILED"), 300)
    assert state() == "COMPLETED" and "start number 2" in told() and "continuing from step" in told(), told()
    assert digest(tmp_path / "run", STEPS) == digest(tmp_path / "undisturbed", STEPS)
    assert losses(tmp_path / "run") == losses(tmp_path / "undisturbed")
