"""gke_jobset.yaml follows the schemas of JobSet and Kubernetes, and its parts are consistent."""

import re
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api.models import JobsetV1alpha2JobSet

from tests.test_launch import AGAIN

LAUNCH = Path(__file__).parents[1] / "launch"


def jobsets() -> dict[str, dict]:
    return {d["metadata"]["name"]: d for d in yaml.safe_load_all((LAUNCH / "gke_jobset.yaml").read_text())}


@pytest.mark.parametrize("name", ["gpt4o-tpu", "gpt4o-gpu"])
def test_jobsets_have_what_kubernetes_requires(name):
    """Required fields and legal values of jobset.x-k8s.io/v1alpha2 and batch/v1, according to their references."""
    jobset = jobsets()[name]
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert set(jobset["spec"]) <= {"replicatedJobs", "failurePolicy", "successPolicy", "network", "startupPolicy", "suspend"}
    for rule in jobset["spec"]["failurePolicy"]["rules"]:
        assert rule["action"] in ("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts")
        assert set(rule["onJobFailureReasons"]) <= {"BackoffLimitExceeded", "DeadlineExceeded", "PodFailurePolicy"}
    (replicated,) = jobset["spec"]["replicatedJobs"]
    assert isinstance(replicated["replicas"], int)
    job = replicated["template"]["spec"]
    assert job["parallelism"] == job["completions"] and job["completionMode"] == "Indexed"
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never", "podFailurePolicy requires it"
    (container,) = pod["containers"]
    train = ["python", "-m", "gpt4o_jax", "train"]
    flags = ["python", "launch/xla_flags.py", "cuda"] if name == "gpt4o-gpu" else []
    assert container["name"] and container["image"] and container["command"] == ["bash", "launch/restart.sh", *flags, *train]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"] and rule["onExitCodes"]["operator"] in ("In", "NotIn")
    assert set(rule["onExitCodes"]["values"]).isdisjoint({0, *AGAIN})
    mounts = {m["name"] for m in container.get("volumeMounts", ())}
    assert mounts <= {v["name"] for v in pod.get("volumes", ())}


@pytest.mark.parametrize("name", ["gpt4o-tpu", "gpt4o-gpu"])
def test_the_jobs_of_a_jobset_follow_the_schema_of_kubernetes(name):
    (replicated,) = jobsets()[name]["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, **replicated["template"]}
    newest = kubernetes_validate.latest_version()
    kubernetes_validate.validate(job, newest, strict=True)
    job["spec"]["podFailurePolicy"]["rules"][0]["onExitCode"] = 1
    with pytest.raises(kubernetes_validate.ValidationError, match="onExitCode"):
        kubernetes_validate.validate(job, newest, strict=True)


def lost(given, kept, path: str = "") -> list[str]:
    """Paths of the values in `given` that `kept` lacks or changes; `kept` may have more, such as defaults."""
    if isinstance(given, dict) and isinstance(kept, dict):
        return [p for key in given for p in lost(given[key], kept.get(key), f"{path}.{key}")]
    if isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        return [p for n, (a, b) in enumerate(zip(given, kept, strict=True)) for p in lost(a, b, f"{path}[{n}]")]
    return [] if given == kept else [path]


@pytest.mark.parametrize("name", ["gpt4o-tpu", "gpt4o-gpu"])
def test_jobsets_follow_the_schema_of_jobset(name):
    """The classes are generated from JobSet's own OpenAPI spec: they refuse wrong types and drop unknown fields."""
    jobset = jobsets()[name]
    assert lost(jobset, JobsetV1alpha2JobSet.from_dict(jobset).to_dict()) == []
    jobset["spec"]["failurePolicy"]["maxRestart"] = 1
    assert lost(jobset, JobsetV1alpha2JobSet.from_dict(jobset).to_dict()) == [".spec.failurePolicy.maxRestart"]
    jobset["spec"]["failurePolicy"]["maxRestarts"] = "many"
    with pytest.raises(ValueError, match="maxRestarts"):
        JobsetV1alpha2JobSet.from_dict(jobset)


@pytest.mark.parametrize(("name", "platforms"), [("gpt4o-tpu", "tpu,cpu"), ("gpt4o-gpu", "cuda,cpu")])
def test_jobsets_do_not_fall_back_to_the_cpu(name, platforms):
    (replicated,) = jobsets()[name]["spec"]["replicatedJobs"]
    (container,) = replicated["template"]["spec"]["template"]["spec"]["containers"]
    assert {"name": "JAX_PLATFORMS", "value": platforms} in container["env"]


def test_the_gpu_jobset_tells_its_processes_of_each_other():
    from gpt4o_jax.parallel.cluster import Job, find

    (replicated,) = jobsets()["gpt4o-gpu"]["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    container = job["template"]["spec"]["containers"][0]
    labels = {"jobset-name": "gpt4o-gpu", "replicatedjob-name": replicated["name"], "job-index": "0"}
    env = {"JOB_COMPLETION_INDEX": str(job["completions"] - 1)}
    for e in container["env"]:
        path = e.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath")
        env[e["name"]] = (
            labels[re.fullmatch(r"metadata\.labels\['jobset\.sigs\.k8s\.io/(.+)'\]", path)[1]] if path else e["value"]
        )
    port = container["ports"][0]["containerPort"]
    n = replicated["replicas"] * job["completions"]
    assert find("", 0, -1, env) == Job(f"gpt4o-gpu-nodes-0-0.gpt4o-gpu:{port}", n, n - 1, "JobSet")
