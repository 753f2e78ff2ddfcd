"""A run of adapters -> a run folder of plain weights."""

import dataclasses
from pathlib import Path

from etils import epath

from gpt4o_jax.checkpoint.store import Store
from gpt4o_jax.config import InitConfig
from gpt4o_jax.config_finetune import LoraConfig, ObjectiveConfig
from gpt4o_jax.errors import RunError
from gpt4o_jax.interop.huggingface import built_beside
from gpt4o_jax.model import flops
from gpt4o_jax.run import Run, write_config


def merge_folder(run: Run, target: Path) -> dict:
    """Makes the run folder `target`, its weights those of `run` with its adapters added. Returns what it was, by name.

    Raises RunError where `run` has no adapters, or `target` is taken.
    """
    if not run.config.lora.rank:
        raise RunError(f"convert merge: {run.workdir} has no adapters (lora.rank=0); its weights are plain already")
    stored = Store(run.workdir / "checkpoints").meta(run.step)
    # Of preferences or rewards the corpus is no text, and what is left of the config could not make its hold-out again.
    corpus = stored["corpus"] if run.config.objective.method == "next_token" else None
    meta = {"step": stored["step"], "corpus": corpus, "tokenizer": stored["tokenizer"]}
    with built_beside(target, "--to") as beside:
        with Store(epath.Path(beside) / "checkpoints") as store:
            store.save(run.step, {"params": run.params}, meta, copy=False)
        run.tokenizer.save_in(beside)
        # It has no other run beside it any more, which an objective of preferences or rewards would want.
        plain = dataclasses.replace(run.config, lora=LoraConfig(), init=InitConfig(), objective=ObjectiveConfig())
        write_config(epath.Path(beside), plain)
    return {"parameters": flops.parameter_count(run.config.model), "rank": run.config.lora.rank}
