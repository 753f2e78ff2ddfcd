"""import: creates a run from a Hugging Face folder; export: writes a run as a Hugging Face folder; merge: merges LoRA adapters"""

from gpt4o_jax.commands.flags import Flag
from gpt4o_jax.errors import RunError

_STEP = Flag("step", int, None, "checkpoint step; default: the best, where the run keeps it, else the newest", low=0)
FLAGS = {
    "import": (
        Flag("from", str, "", "Hugging Face folder: config.json, safetensors, tokenizer", required=True),
        Flag("workdir", str, "", "run folder to create", required=True),
        Flag(
            "compute_dtype",
            str,
            "auto",
            "type of matrix products: float32, bfloat16, or auto: the fastest on the device in use",
        ),
    ),
    "export": (
        Flag("workdir", str, "", "run folder", required=True),
        Flag("to", str, "", "folder to create", required=True),
        _STEP,
        Flag("family", str, "", "gpt2, llama, ...; default: the first that can represent the model"),
        Flag("dtype", str, "float32", "type of the tensors: float32 or bfloat16"),
    ),
    "merge": (
        Flag("workdir", str, "", "run folder with LoRA adapters (config.lora)", required=True),
        Flag("to", str, "", "run folder to create", required=True),
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
    huggingface.check_free(target, f"--{to}")  # before the model is read
    if action == "import":
        made = huggingface.import_folder(local("--from", flags["from"]), target, flags["compute_dtype"])
        return {"from": flags["from"], "workdir": flags["workdir"], **made}
    run = open_run(flags["workdir"], flags["step"])
    with jax.set_mesh(run.mesh):
        if action == "merge":
            return {"workdir": flags["workdir"], "step": run.step, "to": flags["to"], **merge.merge_folder(run, target)}
        made = huggingface.export_folder(run, target, flags["family"], flags["dtype"])
    return {"workdir": flags["workdir"], "step": run.step, "to": flags["to"], **made}
