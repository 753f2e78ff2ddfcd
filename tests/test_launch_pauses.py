"""The pauses of the launch scripts before a restart, with a fake `sleep` that records its argument and takes no time."""

import os
from pathlib import Path

import pytest

from tests.test_launch import AGAIN, FOR_GOOD, LAUNCH, bash

DOUBLED = [5, 10, 20, 40, 80, 160, 300, 300, 300]


def program(folder: Path, name: str, text: str) -> None:
    """Writes an executable script for the PATH of `pretended`."""
    (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def pretended(tmp_path):
    """A folder whose fake sleep, scontrol and scancel append their arguments to the file `told`, and whose git does nothing.

    `scontrol show` reports the job state STATE, by default RUNNING. The n-th srun, train or training ssh of gcloud exits with the
    n-th code in the file `codes`; "4s" means 76 after four seconds. When no codes are left, it exits with 0.
    """
    bin = tmp_path / "bin"
    bin.mkdir()
    real = "$(PATH=${PATH#*:} command -v sleep)"
    for name in ("sleep", "scontrol", "scancel"):
        shows = '[[ "$*" != *show* ]] || { echo "JobId=7 JobState=${STATE:-RUNNING} Reason=None"; exit; }\n'
        program(bin, name, f'{shows}echo "{name} $*" >> "{tmp_path}/told"')
    take = (
        f'read -r code < "{tmp_path}/codes"; sed -i.old 1d "{tmp_path}/codes"\n[[ "$code" != 4s ]] || {{ "{real}" 4; code=76; }}'
    )
    for name in ("srun", "train"):
        program(bin, name, f'{take}\nexit "${{code:-0}}"')
    program(bin, "gcloud", f'[[ "$4" != describe ]] || echo READY\n[[ "$*" == *train* ]] || exit 0\n{take}\nexit "${{code:-0}}"')
    program(bin, "git", "exit 0")
    return tmp_path


def start(pretended: Path, script: str | Path, *args: str, codes: list[int | str], **variables: str):
    """(the finished script, the calls of its sleep and scontrol)."""
    (pretended / "codes").write_text("".join(f"{code}\n" for code in codes))
    (pretended / "told").write_text("")
    job = {"TPU": "pod", "ZONE": "z", "TYPE": "v5p-16", "SLURM_SUBMIT_DIR": str(LAUNCH.parent), "SLURM_JOB_ID": "7"}
    job |= {"SLURM_JOB_NODELIST": "n", "PYTHON": "true", "PATH": f"{pretended / 'bin'}:{os.environ['PATH']}"}
    done = bash(script, *args, **job | variables)
    return done, (pretended / "told").read_text().splitlines()


ARGS = {"restart.sh": ["train"], "tpu_vm.sh": ["--workdir=gs://b/train"]}
FIRST = {"restart.sh": DOUBLED, "tpu_vm.sh": [*DOUBLED[1:6], 300, 300, 300]}


@pytest.mark.parametrize("script", ARGS)
def test_pauses_double_up_to_five_minutes(pretended, script):
    wanted = FIRST[script]
    done, told = start(pretended, script, *ARGS[script], codes=[76] * len(wanted))
    assert done.returncode == 0, done.stderr
    assert told == [f"sleep {seconds}" for seconds in wanted]
    done, told = start(pretended, script, *ARGS[script], codes=[76] * 20, BACKOFF="7", RESTARTS="3")
    assert done.returncode == 76 and told == ["sleep 7", "sleep 14", "sleep 28"]


@pytest.mark.parametrize("script", ARGS)
def test_a_run_that_lasted_begins_again_at_the_first_pause(pretended, script):
    """In a copy of the script with three seconds in place of ten minutes."""
    launch = pretended / "repository" / "launch"
    launch.mkdir(parents=True)
    text = (LAUNCH / script).read_text()
    assert text.count("SECONDS - begun < 600") == 1
    (launch / script).write_text(text.replace("SECONDS - begun < 600", "SECONDS - begun < 3"))
    (launch / "numbers.sh").symlink_to(LAUNCH / "numbers.sh")
    done, told = start(pretended, launch / script, *ARGS[script], codes=[76, 137, "4s", 76], BACKOFF="5")
    assert done.returncode == 0, done.stderr
    assert told == ["sleep 5", "sleep 10", "sleep 5", "sleep 10"]


@pytest.mark.parametrize("code", AGAIN)
def test_a_slurm_job_is_queued_again_after_a_pause_that_doubles(pretended, code):
    for count, seconds in enumerate([*DOUBLED[:6], 320, 320]):
        done, told = start(pretended, "slurm.sbatch", codes=[code], SLURM_RESTART_COUNT=str(count))
        assert done.returncode == code, done.stderr
        pause = 0 if code == 75 else seconds  # stopped by its time limit, so there is no time to wait
        assert told == [f"sleep {pause}", "scontrol requeue 7", "sleep 60"]


@pytest.mark.parametrize("code", FOR_GOOD)
def test_a_slurm_job_that_made_a_mistake_is_not_queued_again(pretended, code):
    done, told = start(pretended, "slurm.sbatch", codes=[code])
    assert (done.returncode, told) == (code, [])


def test_a_slurm_job_that_was_cancelled_is_not_queued_again(pretended):
    done, told = start(pretended, "slurm.sbatch", codes=[75], STATE="COMPLETING")
    assert (done.returncode, told) == (75, ["sleep 0"])


def test_a_slurm_job_is_submitted_from_the_repository(pretended):
    done, told = start(pretended, "slurm.sbatch", codes=[76], SLURM_SUBMIT_DIR=str(pretended))
    assert (done.returncode, told) == (2, []) and "submit it from the root of the repository" in done.stderr


@pytest.mark.parametrize("code", range(1, 6))
def test_a_mistake_of_one_process_of_a_slurm_job_counts_more_than_a_lost_peer(pretended, code):
    """This srun runs two processes, the last of which makes the mistake, and exits with the highest code, as Slurm's does."""
    python = pretended / "python"
    program(pretended, "python", f"exit $((SLURM_PROCID ? {code} : 76))")
    program(
        pretended / "bin",
        "srun",
        'shift; worst=0\nfor i in 0 1; do SLURM_PROCID=$i "$@"; code=$?; ((code <= worst)) || worst=$code; done\nexit $worst',
    )
    done, told = start(pretended, "slurm.sbatch", codes=[], PYTHON=str(python))
    assert (done.returncode, told) == (code, []), done.stderr


def test_a_slurm_job_is_queued_again_so_many_times(pretended):
    done, told = start(pretended, "slurm.sbatch", codes=[76], RESTARTS="2", SLURM_RESTART_COUNT="2")
    assert (done.returncode, told) == (76, [])
    done, told = start(pretended, "slurm.sbatch", codes=[76], RESTARTS="2", SLURM_RESTART_COUNT="1")
    assert told[0] == "sleep 10"


def test_a_slurm_job_that_lasted_begins_again_at_the_first_pause(pretended):
    """bash starts counting SECONDS from its value in the environment."""
    _, told = start(pretended, "slurm.sbatch", codes=[76], SLURM_RESTART_COUNT="5", SECONDS="600")
    assert told[0] == "sleep 5"
