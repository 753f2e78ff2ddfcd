"""What the repository promises outside its Python code: documented commands, requirements, scripts."""

import dataclasses
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from gpt4o_jax import run
from gpt4o_jax.__main__ import COMMANDS
from gpt4o_jax.commands import config_file, flags, sweep
from gpt4o_jax.config import RunConfig
from gpt4o_jax.config_model import ModelConfig
from gpt4o_jax.config_rules import validate_sizes
from gpt4o_jax.tasks.chat import TEMPLATES
from gpt4o_jax.training import topology

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "launch" / "README.md", ROOT / "launch" / "quickstart.sh"]
SCRIPTS = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / ".ci" / "run"]


def documented_commands() -> list[str]:
    """Every `python -m gpt4o_jax COMMAND --flag ...` that a document tells the reader to run."""
    found = []
    for path in DOCUMENTS:
        text = path.read_text().replace("\\\n", " ")
        found += [m.strip() for m in re.findall(r'python"? -m gpt4o_jax +([a-z]+ +[^#>\n]*)', text)]
    return sorted({line.replace('"$@"', "") for line in found})


@pytest.mark.parametrize("line", documented_commands())
def test_documented_command_is_understood(line, monkeypatch, tmp_path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for folder in re.findall(
        r"(?:(?:from_run|preference|reinforced)\.py:|--config\.init\.from=)(\S+)", line
    ):  # the run that an earlier command has made
        (tmp_path / folder).mkdir(parents=True)
        run.write_config(tmp_path / folder, RunConfig(model=ModelConfig(vocab_size=300)))
    monkeypatch.chdir(tmp_path)
    command, *arguments = shlex.split(line)
    assert command in COMMANDS
    module = __import__(f"gpt4o_jax.commands.{command}", fromlist=["FLAGS"])
    table = module.FLAGS
    if isinstance(table, dict):
        table = table[arguments.pop(0)]
    takes_config = any(f.name == "config" for f in table)
    values, overrides = flags.parse(command, table, arguments, takes_config)
    if command == "sweep":
        sweep.plan(values["sweep"], Path(values["workdir"]), values["seeds"], overrides)
    elif takes_config and values["config"]:
        config = config_file.read(values["config"], overrides)
        if command == "plan":
            assert_sizes_divide(config, values, overrides)


def assert_sizes_divide(config, values: dict, overrides: dict) -> None:
    """Of a plan, on the slices that it is for; the vocabulary counts as even if the config leaves it open."""
    family, chips = topology.parse_topology(values["topology"])
    devices = chips * topology.CHIPS[family].devices
    config, _ = topology.along_slices(config, values["slices"], devices, "train.batch_size" in overrides)
    model = dataclasses.replace(config.model, vocab_size=config.model.vocab_size or 2**16)
    validate_sizes(dataclasses.replace(config, model=model), config.mesh.sizes(devices * values["slices"]))


def test_there_are_documented_commands_of_every_kind():
    assert {line.split()[0] for line in documented_commands()} == set(COMMANDS)


@pytest.mark.parametrize("path", [*sorted(ROOT.glob("*.md")), ROOT / "launch" / "README.md"], ids=lambda p: p.name)
def test_links_lead_to_files(path):
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", sorted(ROOT.glob("requirements*.txt")), ids=lambda p: p.name)
def test_requirements_parse_and_say_what_they_are_for(path):
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ")
    for line in lines:
        if line.startswith("-r "):
            assert (ROOT / line.removeprefix("-r ")).exists()
        elif line and not line.startswith("#"):
            Requirement(line)


def test_benchmarks_are_those_of_the_newest_records(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import report

    why = "benchmarks/results.jsonl or targets.py has changed; run `python benchmarks/measure.py --report`"
    assert (ROOT / "BENCHMARKS.md").read_text() == report.report(), why


def test_the_readme_names_every_chat_template():
    listed = re.search(r"`--template`: ([^;]*);", (ROOT / "README.md").read_text())[1]
    assert re.split(r",\s+", listed) == [*TEMPLATES]


def test_ci_runs_the_readmes_test_command():
    command = "bash launch/test.sh"
    assert f"\n    {command} " in (ROOT / "README.md").read_text()
    assert f"exec {command}\n" in (ROOT / ".ci" / "run").read_text()


# ---------------------------------------------------------------- launch scripts


def shell(code: str, root: Path = ROOT, **environment: str):
    """Runs bash code after sourcing launch/environment.sh of `root`."""
    environment = {"PATH": os.environ["PATH"]} | environment
    script = f"set -euo pipefail; source {shlex.quote(str(root / 'launch' / 'environment.sh'))}; {code}"
    return subprocess.run(["/bin/bash", "-c", script], env=environment, capture_output=True, text=True, timeout=60)


@pytest.fixture
def copy(tmp_path) -> Path:
    """A folder with only the environment script, and a space in its name."""
    root = tmp_path / "a copy"
    (root / "launch").mkdir(parents=True)
    (root / "launch" / "environment.sh").write_text((ROOT / "launch" / "environment.sh").read_text())
    return root


def program(folder: Path, name: str, code: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{code}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_script_is_valid_bash(path):
    subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.parametrize("works, requirements", [("exit 0", "requirements-cuda.txt"), ("exit 9", "requirements.txt")])
def test_gpu_requirements_where_nvidia_smi_works(works, requirements, copy, tmp_path):
    if any(Path("/dev").glob("accel[0-9]*")):
        pytest.skip("a TPU is here")
    program(tmp_path / "bin", "nvidia-smi", works)
    done = shell("runtime_requirements", copy, PATH=f"{tmp_path / 'bin'}:/usr/bin:/bin")
    assert done.stdout == f"{requirements}\n"


def test_no_python_is_one_line(copy, tmp_path):
    program(tmp_path / "bin", "dirname", f'exec {"/usr/bin/dirname"} "$@"')
    program(tmp_path / "bin", "python3", "exit 1")
    done = shell("make_venv", copy, PATH=str(tmp_path / "bin"))
    assert done.returncode == 2 and "no Python 3.11" in done.stderr and done.stderr.count("\n") == 1


def test_wrong_python_is_one_line(copy):
    done = shell("make_venv", copy, PYTHON="/bin/false")
    assert done.returncode == 2 and "/bin/false" in done.stderr and done.stderr.count("\n") == 1


def test_installs_again_only_after_requirements_changed(copy, tmp_path):
    (copy / "requirements.txt").write_text("one\n")
    (copy / "requirements-dev.txt").write_text("two\n")
    (copy / "pyproject.toml").write_text("")
    log = tmp_path / "calls"
    program(copy / ".venv", "placeholder", "")
    program(copy / ".venv" / "bin", "python", f'echo "$*" >>{shlex.quote(str(log))}')

    def installed(*files) -> list[str]:
        log.write_text("")
        done = shell(f"prepare_environment {' '.join(files)}", copy, PATH="/usr/bin:/bin")
        assert done.returncode == 0, done.stderr
        calls = [line for line in log.read_text().splitlines() if "pip install" in line]
        return [file for file in files if any(f"-r {file}" in c.split("install")[1] for c in calls)]

    assert installed("requirements.txt", "requirements-dev.txt") == ["requirements.txt", "requirements-dev.txt"]
    assert installed("requirements.txt") == []
    assert installed("requirements.txt", "requirements-dev.txt") == []
    (copy / "requirements-dev.txt").write_text("three\n")
    assert installed("requirements.txt", "requirements-dev.txt") == ["requirements.txt", "requirements-dev.txt"]


@pytest.mark.parametrize("tool", ["uv", "pip"])
@pytest.mark.parametrize("failing", ["requirements.txt", "--editable"])
def test_a_failed_install_does_not_count_as_done(tool, failing, copy, tmp_path):
    """Even if the caller runs without -e, as a launcher's setup may."""
    (copy / "requirements.txt").write_text("one\n")
    (copy / "pyproject.toml").write_text("")
    program(copy / ".venv", "placeholder", "")
    program(copy / ".venv" / "bin", "python", "")
    fails = f'case "$*" in *install*{failing}*) exit 1 ;; esac'
    program(tmp_path / "bin", "uv", fails) if tool == "uv" else program(copy / ".venv" / "bin", "python", fails)
    done = shell("set +e; prepare_environment requirements.txt; echo went on", copy, PATH=f"{tmp_path / 'bin'}:/usr/bin:/bin")
    assert done.returncode == 2 and "went on" not in done.stdout
    assert "cannot install" in done.stderr and failing in done.stderr
    assert not (copy / ".venv" / "installed-requirements.txt").exists()
