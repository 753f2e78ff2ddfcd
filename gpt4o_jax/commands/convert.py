"""import, export: a Hugging Face folder as a run, and back; merge: a run of adapters as one of plain weights"""

from gpt4o_jax.commands.flags import Flag
from gpt4o_jax.errors import RunError

_STEP = Flag("step", int, None, "checkpoint step; if not given the best, where the run keeps it, else the newest", low=0)
FLAGS = {
    "import": (
        Flag("from", str, "", "folder as the Hub lays it out: config.json, safetensors, tokenizer", required=True),
        Flag("workdir", str, "", "run folder to make", required=True),
        Flag("compute_dtype", str, "auto", "of matrix products: float32, bfloat16, or auto, the fastest wherever it is opened"),
    ),
    "export": (
        Flag("workdir", str, "", "run folder", required=True),
        Flag("to", str, "", "folder to make", required=True),
        _STEP,
        Flag("family", str, "", "gpt2, llama, ...; the first that computes the same if not given"),
        Flag("dtype", str, "float32", "of the tensors: float32 or bfloat16"),
    ),
    "merge": (
        Flag("workdir", str, "", "run folder of adapters (config.lora)", required=True),
        Flag("to", str, "", "run folder to make", required=True),
        _STEP,
    ),
}


def main(flags: dict, overrides: dict[str, str], action: str) -> dict:
    legal = {"import": ("compute_dtype", ("auto", "float32", "bfloat16")), "export": ("dtype", ("float32", "bfloat16"))}
    knob, known = legal.get(action, ("", ()))
    if knob and flags[knob] not in known:
        raise RunError(f"convert {action}: --{knob}={flags[knob]}: expected {' or '.join(known)}")

    import jax

    from gpt4o_jax.interop import huggingface, merge
    from gpt4o_jax.paths import local
    from gpt4o_jax.run import open_run

    to = "workdir" if action == "import" else "to"
    target = local(f"--{to}", flags[to])
    huggingface.check_free(target, f"--{to}")  # before a model is read
    if action == "import":
        made = huggingface.import_folder(local("--from", flags["from"]), target, flags["compute_dtype"])
        return {"from": flags["from"], "workdir": flags["workdir"], **made}
    run = open_run(flags["workdir"], flags["step"])
    with jax.set_mesh(run.mesh):
        if action == "merge":
            return {"workdir": flags["workdir"], "step": run.step, "to": flags["to"], **merge.merge_folder(run, target)}
        made = huggingface.export_folder(run, target, flags["family"], flags["dtype"])
    return {"workdir": flags["workdir"], "step": run.step, "to": flags["to"], **made}
