"""A run with LoRA adapters -> a run folder with plain weights."""

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
    """Makes the run folder `target`, with the weights of `run` and its adapters merged. Returns {"parameters", "rank"}.

    Raises RunError if `run` has no adapters, or `target` is taken.
    """
    if not run.config.lora.rank:
        raise RunError(f"convert merge: {run.workdir} has no adapters (lora.rank=0); its weights are plain already")
    stored = Store(run.workdir / "checkpoints").meta(run.step)
    # The corpus of preferences or rewards is not text, and the remaining config could not rebuild its hold-out.
    corpus = stored["corpus"] if run.config.objective.method == "next_token" else None
    meta = {"step": stored["step"], "corpus": corpus, "tokenizer": stored["tokenizer"]}
    with built_beside(target, "--to") as beside:
        with Store(epath.Path(beside) / "checkpoints") as store:
            store.save(run.step, {"params": run.params}, meta, copy=False)
        run.tokenizer.save_in(beside)
        # It no longer depends on another run, which an objective of preferences or rewards would require.
        plain = dataclasses.replace(run.config, lora=LoraConfig(), init=InitConfig(), objective=ObjectiveConfig())
        write_config(epath.Path(beside), plain)
    return {"parameters": flops.parameter_count(run.config.model), "rank": run.config.lora.rank}
