"""checks every file of every checkpoint of a run against its digest"""

from gpt4o_jax.commands.flags import Flag

FLAGS = (Flag("workdir", str, "", "run folder", required=True),)


def main(flags: dict, overrides: dict[str, str]) -> dict:
    from gpt4o_jax.checkpoint import manifest
    from gpt4o_jax.checkpoint.store import Store
    from gpt4o_jax.console import say
    from gpt4o_jax.errors import data_error
    from gpt4o_jax.paths import of_user
    from gpt4o_jax.run import read_config

    workdir = of_user(flags["workdir"])
    read_config(workdir)
    store = Store(workdir / "checkpoints")
    files = {}
    for step in store.steps():
        files[step] = manifest.verify(store.path(step))
        say(f"checkpoint {step}: {files[step]} files as written")
    if not files:
        raise data_error(f"{workdir}: no finished checkpoint")
    return {"workdir": str(workdir), "checkpoints": files}
