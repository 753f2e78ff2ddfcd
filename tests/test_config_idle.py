"""A knob that has no effect given the others is refused on the command line, but accepted in a config file."""

from pathlib import Path

import pytest

from gpt4o_jax.commands import config_file
from gpt4o_jax.config import knobs
from gpt4o_jax.errors import ExitCode, RunError

BASE = str(Path(__file__).parent.parent / "configs" / "base.py")


def refusal(overrides: dict[str, str], file=BASE) -> str:
    with pytest.raises(RunError) as e:
        config_file.read(str(file), overrides)
    assert e.value.code == ExitCode.USAGE
    return str(e.value)


GRPO = "objective.method=grpo init.from=x data.source=world data.path=numbers"
DPO = "objective.method=dpo"
ADAPTED = "model.n_experts=4 model.router_bias=true lora.rank=4 init.from=x"
LEARNED = "model.positions=learned"
YARN = "model.positions=rope model.rope_scaling=yarn model.rope_factor=2 model.rope_original_context=64"
FLAT = "optimizer.schedule=wsd optimizer.decay_fraction=0"
PAIRS = "objective.method=dpo init.from=x data.source=conversations data.path=x"

# (flags whose first knob has no effect, part of the message, flags that give it one; None: not tried).
IDLE = [
    ("optimizer.b2=0.9 optimizer.name=adafactor", "adamw or muon or lion or schedule_free", "optimizer.name=lion"),
    ("optimizer.eps=1e-6 optimizer.name=lion", "does nothing with optimizer.name=lion", "optimizer.name=adamw"),
    ("optimizer.muon_lr=0.1", "does nothing with optimizer.name=adamw; set optimizer.name=muon", "optimizer.name=muon"),
    ("optimizer.muon_momentum=0.9", "does nothing with optimizer.name=adamw", "optimizer.name=muon"),
    ("optimizer.decay_fraction=0.4", "with optimizer.schedule=cosine; set optimizer.schedule=wsd", "optimizer.schedule=wsd"),
    ("optimizer.end_lr_fraction=0 optimizer.schedule=constant", "set optimizer.schedule=cosine or wsd", "optimizer.schedule=wsd"),
    ("optimizer.end_lr_fraction=0 optimizer.schedule=inverse_sqrt", "schedule=inverse_sqrt", "optimizer.schedule=wsd"),
    ("optimizer.decay_mask=all optimizer.weight_decay=0", "set optimizer.weight_decay, such as", "optimizer.weight_decay=0.2"),
    ("model.rope_theta=5e5 model.positions=learned", "positions=learned; set model.positions=rope", "model.positions=rope"),
    ("model.rope_fraction=0.5 model.positions=none", "does nothing with model.positions=none", "model.positions=rope"),
    ("model.rope_factor=4 model.positions=none", "set model.positions=rope", "model.positions=rope model.rope_scaling=linear"),
    (f"model.rope_original_context=64 {LEARNED}", "does nothing with model.positions=learned", YARN),
    (f"model.rope_low=2 {LEARNED}", "set model.positions=rope", YARN),
    (f"model.rope_high=9 {LEARNED}", "set model.positions=rope", YARN),
    ("model.d_ff=64 model.n_experts=4 model.expert_d_ff=32", "expert_d_ff=32 in every layer; set", "model.moe_every=2"),
    ("model.d_ff=64 model.n_experts=4 model.expert_d_ff=32", "set model.moe_every, such as 2", "model.expert_d_ff=None"),
    ("model.experts_per_token=3", "does nothing with model.n_experts=0; set model.n_experts, such as 8", "model.n_experts=4"),
    ("model.router_scores=sigmoid", "does nothing with model.n_experts=0", "model.n_experts=4"),
    ("model.router_normalise=false", "router_normalise=false does nothing", "model.n_experts=4"),
    ("train.balance_loss=0.1", "does nothing with model.n_experts=0", "model.n_experts=4"),
    ("train.router_z_loss=0.1", "does nothing with model.n_experts=0", "model.n_experts=4"),
    ("train.router_bias_rate=0.1", "with model.router_bias=false", "model.n_experts=4 model.router_bias=true"),
    ("train.mtp_weight=0.1", "does nothing with model.mtp_heads=0", "model.mtp_heads=1"),
    ("tokenizer.vocab_size=512 tokenizer.kind=byte", "does nothing with tokenizer.kind=byte", "tokenizer.kind=bpe"),
    ("data.path=x.txt", "with data.source=python_docs; it is read for data.source=text or jsonl", "data.source=text"),
    ("data.separator=; data.source=jsonl data.path=x", "it is read for data.source=text: set that", "data.source=text"),
    ("data.separator=; data.source=mixture data.mixture=('jsonl:x=1',)", "source=mixture", "data.mixture=('text:x=1',)"),
    ("data.field=body data.source=text data.path=x", "read for data.source=jsonl or parquet or tfds", "data.source=jsonl"),
    ("data.field=body data.source=jsonl data.path=x data.reader=squad", "with data.reader=squad", "data.reader="),
    ("data.field=a data.source=mixture data.mixture=('jsonl:x@b=1',)", "with data.source=mixture", "data.mixture=('jsonl:x=1',)"),
    ("data.tfds_dir=x data.source=text data.path=x", "read for data.source=tfds", "data.source=tfds"),
    ("data.world_items=5", "read for data.source=world", "data.source=world data.path=numbers"),
    ("data.shingle_share=0.1 data.shingle_bytes=0", "does nothing with data.shingle_bytes=0", "data.shingle_bytes=20"),
    ("data.holdout_fraction=0.1 data.source=text data.path=x data.holdout_path=y", "data.holdout_path=y;", "data.holdout_path="),
    ("data.shingle_bytes=20 data.source=world data.path=numbers", "read for data.source=python_docs or", "data.source=text"),
    ("data.shingle_share=0 data.source=mixture data.mixture=('world:memory=1',)", "source=mixture", "data.mixture=('text:x=1',)"),
    ("data.shingle_bytes=20 objective.method=dpo init.from=x data.source=conversations data.path=x", "method=next_token", None),
    ("data.prefetch=4 data.workers=0", "does nothing with data.workers=0; set data.workers, such as 1", "data.workers=2"),
    ("model.rope_scaling=linear", "does nothing with model.rope_factor=1.0; set model.rope_factor=4", "model.rope_factor=2"),
    ("eval.max_tokens=90 eval.every=0", "does nothing with eval.every=0; set eval.every, such as 500", "eval.every=10"),
    ("eval.task_items=5", "does nothing with eval.tasks=(); set eval.tasks, such as numbers", "eval.tasks=('numbers',)"),
    ("tokenizer.kind=char tokenizer.path=runs/x", "with tokenizer.path='runs/x'; set tokenizer.path=''", "tokenizer.path="),
    ("tokenizer.vocab_size=512 tokenizer.path=x", "does nothing with tokenizer.path=x", "tokenizer.path="),
    ("lora.alpha=8", "does nothing with lora.rank=0; set lora.rank, such as 16", "lora.rank=4 init.from=x"),
    ("lora.targets=('*/query',)", "does nothing with lora.rank=0", "lora.rank=4 init.from=x"),
    ("init.model=true", "init.model=true does nothing with init.from=''; set init.from, such as RUN", None),
    ("objective.group=4", "does nothing with objective.method=next_token; set objective.method=grpo", None),
    ("objective.beta=0.5", "set objective.method=dpo or grpo", None),
    ("objective.held_out=5", "set objective.method=dpo or grpo", None),
    ("objective.held_out=5 objective.method=dpo init.from=x data.source=conversations data.path=x", "source=world", None),
    (f"eval.max_tokens=90 {GRPO}", "does nothing with objective.method=grpo; set objective.method=next_token or dpo", DPO),
    (f"data.workers=2 {GRPO}", "set objective.method=next_token or dpo", DPO),
    (f"data.prefetch=4 {GRPO}", "set objective.method=next_token or dpo", DPO),
    (f"data.cache_dir=x {GRPO}", "does nothing with objective.method=grpo; set objective.method=next_token", None),
    (f"tokenizer.kind=byte {PAIRS}", "does nothing with objective.method=dpo", "objective.method=next_token"),
    (f"tokenizer.vocab_size=512 {GRPO}", "does nothing with objective.method=grpo", "objective.method=next_token"),
    (f"train.router_bias_rate=0.1 {ADAPTED}", "does nothing with lora.rank=4; set lora.rank=0", "lora.rank=0"),
    ("model.init_std=0.01 init.from=x", "does nothing with init.from=x; set init.from=''", "init.from="),
    ("model.output_init=scaled init.from=x", "does nothing with init.from=x; set init.from=''", "init.from="),
    ("checkpoint.keep_every=100 checkpoint.every=0", "checkpoint.every=0 and checkpoint.best=''; set", "checkpoint.every=100"),
    ("checkpoint.keep_every=100 checkpoint.every=0", "checkpoint.every=500", "checkpoint.best=loss"),
    (f"optimizer.end_lr_fraction=0 {FLAT}", "schedule=wsd and optimizer.decay_fraction=0.0; set", "optimizer.decay_fraction=0.3"),
]  # fmt: skip


@pytest.mark.parametrize(("typed", "fragment", "mended"), IDLE)
def test_a_knob_of_another_choice_is_refused_on_the_command_line(typed, fragment, mended):
    overrides = dict(knob.split("=", 1) for knob in typed.split())
    told = refusal(overrides)
    name = next(iter(overrides))
    assert fragment in told and f"config.{name}=" in told and told.endswith(f"or leave {name} out")
    if mended is not None:
        config_file.read(BASE, overrides | dict(knob.split("=", 1) for knob in mended.split()))
    default = knobs()[name].default
    config_file.read(BASE, overrides | {name: str(default)})  # the default asks for nothing


def test_a_file_may_say_what_a_choice_on_the_command_line_does_not_use(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from gpt4o_jax.config import base_config\ndef get_config():\n    c = base_config()\n"
        '    c.optimizer.update(name="muon", muon_lr=0.01)\n    return c\n'
    )
    config = config_file.read(str(file), {"optimizer.name": "adamw"})
    assert (config.optimizer.name, config.optimizer.muon_lr) == ("adamw", 0.01)
    told = refusal({"optimizer.name": "adamw", "optimizer.muon_lr": "0.01"}, file)
    assert "config.optimizer.muon_lr=0.01 does nothing with optimizer.name=adamw" in told, "typed, though the file has it too"


def test_a_norm_after_a_sub_layer_asks_for_no_initialisation_of_weights_that_another_run_gives():
    config_file.read(BASE, {"model.norm_position": "post", "init.from": "x"})


def test_what_is_off_may_be_said_of_what_is_not_there():
    config_file.read(BASE, {"train.mtp_weight": "0", "train.balance_loss": "0", "init.model": "false"})
    of_world = dict(knob.split("=", 1) for knob in GRPO.split())
    config_file.read(BASE, of_world | {"data.shingle_bytes": "0", "data.workers": "0"})
