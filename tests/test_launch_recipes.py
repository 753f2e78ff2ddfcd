"""quickstart.sh and applications.sh run their commands in order, with the user's flags, and stop at the first that fails.

They run in a separate repository whose .venv/bin/python records what it is asked to run.
"""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = """#!/usr/bin/env bash
[[ "$1 $2" == "-m gpt4o_jax" ]] || exit 0
printf '%q ' "${@:3}" >>"$TOLD" && echo >>"$TOLD"
[[ "$3" == "$FAILS" ]] && exit 75
exit 0
"""


@pytest.fixture
def repository(tmp_path):
    """With a space in its path; installing does nothing."""
    root = tmp_path / "a clone"
    shutil.copytree(ROOT / "launch", root / "launch")
    for path in [*ROOT.glob("requirements*.txt"), ROOT / "pyproject.toml"]:
        shutil.copy(path, root)
    for program in (root / ".venv" / "bin" / "python", tmp_path / "bin" / "uv"):
        program.parent.mkdir(parents=True)
        program.write_text(PROGRAM)
        program.chmod(0o755)
    return root


def run(root: Path, script: str, *args: str, fails: str = "") -> tuple[int, list[list[str]], str]:
    """(exit code, the commands that were run, stderr)."""
    told = root.parent / "told"
    told.write_text("")
    path = f"{root.parent / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(root / "launch" / script), *args],
        env={**os.environ, "TOLD": str(told), "FAILS": fails, "PATH": path},
        cwd=root.parent, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return done.returncode, [shlex.split(line) for line in told.read_text().splitlines()], done.stderr


def test_one_model_for_all_applications(repository):
    runs = repository / "runs" / "applications"
    code, commands, told = run(repository, "applications.sh", "--", "--config.train.length=20 steps")
    said = [shlex.split(line) for line in told.splitlines() if line.startswith("  ")]
    assert code == 0 and said[-1] == ["python", "-m", "gpt4o_jax", "chat", f"--workdir={runs}/tuned", "--temperature=0"]
    flag = "--config.train.length=20 steps"
    assert commands == [
        ["train", "--config=configs/applications.py:pretrain", f"--workdir={runs}/base", flag],
        ["train", "--config=configs/applications.py:tune", f"--workdir={runs}/tuned", f"--config.init.from={runs}/base", flag],
        ["evaluate", f"--workdir={runs}/tuned", "--tasks=qa,translation,summarisation,generation,chat"],
    ]
    assert run(repository, "applications.sh", "mine")[1][0][-1] == f"--workdir={repository.parent}/mine/base"


def test_quickstart(repository):
    workdir = f"--workdir={repository / 'runs' / 'quickstart'}"
    code, commands, _ = run(repository, "quickstart.sh")
    assert code == 0 and [c[0] for c in commands] == ["train", "evaluate", "generate"]
    assert commands[0] == ["train", "--config=configs/quickstart.py", workdir] and all(workdir in c for c in commands)


@pytest.mark.parametrize("script", ["applications.sh", "quickstart.sh"])
@pytest.mark.parametrize(("fails", "reached"), [("train", ["train"]), ("evaluate", ["train", "evaluate"])])
def test_what_fails_is_the_end(repository, script, fails, reached):
    code, commands, told = run(repository, script, fails=fails)
    assert code == 75 and list(dict.fromkeys(c[0] for c in commands)) == reached and "Done" not in told


def test_packages_are_installed_once(repository):
    assert "installing" in run(repository, "applications.sh")[2]
    assert "installing" not in run(repository, "applications.sh")[2]
    (repository / "requirements-eval.txt").write_text("another\n")
    assert "installing" in run(repository, "applications.sh")[2]
