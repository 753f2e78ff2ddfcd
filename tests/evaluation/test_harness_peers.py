"""Our adapter and lm-evaluation-harness's own for transformers give the same numbers on one random GPT-2 and the same tasks."""

import json
import os
import random
import types

import jax
import numpy as np
import pytest

from gpt4o_jax.evaluation import harness
from gpt4o_jax.run import open_run

pytestmark = pytest.mark.peers

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "one", "two", "three", "dogs", "ran", "home", "over", "green", "hills"]
CHOICE = """\
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choice.jsonl}}}}
output_type: multiple_choice
test_split: test
fewshot_split: test
doc_to_text: "{{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
ROLLING = """\
task: local_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/texts.jsonl}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}, {{metric: bits_per_byte}}]
"""
UNTIL = """\
task: local_until
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/texts.jsonl}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{until}}}}"
generation_kwargs: {{until: [" the"], max_gen_toks: 12, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(run, lm-eval's model, folder of tasks)."""
    for name in ("torch", "transformers", "lm_eval"):
        pytest.importorskip(name)
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    import tokenizers
    import torch
    import transformers
    from lm_eval.models.huggingface import HFLM
    from tokenizers import decoders, models, pre_tokenizers, trainers

    from gpt4o_jax.interop import huggingface

    folder = tmp_path_factory.mktemp("peers")
    draw = random.Random(0)
    text = lambda n: " ".join(draw.choice(WORDS) for _ in range(n))
    questions = [{"question": text(12), "choices": [f" {text(n)}" for n in (1, 3, 6)], "answer": i % 3} for i in range(30)]
    texts = [{"text": text(n), "until": "nothing"} for n in (1, 5, 40, 200)]
    (folder / "choice.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    (folder / "texts.jsonl").write_text("".join(json.dumps(t) + "\n" for t in texts))
    for name, task in (("choice", CHOICE), ("rolling", ROLLING), ("until", UNTIL)):
        (folder / f"{name}.yaml").write_text(task.format(folder=folder))

    t = tokenizers.Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet, end = pre_tokenizers.ByteLevel.alphabet(), "<|endoftext|>"
    t.train_from_iterator([text(500)], trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, special_tokens=[end]))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=t, bos_token=end, eos_token=end, unk_token=end)
    torch.manual_seed(0)
    size = {
        "vocab_size": t.get_vocab_size(),
        "n_positions": 64,
        "n_embd": 48,
        "n_layer": 2,
        "n_head": 4,
        "initializer_range": 0.2,
    }
    config = transformers.GPT2Config(**size, bos_token_id=0, eos_token_id=0)
    network = transformers.GPT2LMHeadModel(config).eval()
    network.save_pretrained(folder / "hf")
    theirs.save_pretrained(folder / "hf")
    huggingface.import_folder(folder / "hf", folder / "run", compute_dtype="float32")
    run = open_run(folder / "run")
    with jax.set_mesh(run.mesh):
        yield run, HFLM(pretrained=network, tokenizer=theirs, batch_size=4, max_length=64), folder


def requests(*args):
    return [types.SimpleNamespace(args=a) for a in args]


def test_every_log_likelihood_agrees(both):
    run, theirs, folder = both
    ours = harness.Harness(run, 4)
    questions = [json.loads(line) for line in (folder / "choice.jsonl").read_text().splitlines()]
    asked = requests(*[(q["question"] + " ", c) for q in questions for c in q["choices"]], ("", "the cat"), ("word " * 90, "end"))
    got, wanted = ours.loglikelihood(asked), theirs.loglikelihood(asked)
    np.testing.assert_allclose([g[0] for g in got], [w[0] for w in wanted], atol=1e-4, rtol=0)
    assert [g[1] for g in got] == [w[1] for w in wanted]
    texts = [(json.loads(line)["text"],) for line in (folder / "texts.jsonl").read_text().splitlines()]
    got, wanted = ours.loglikelihood_rolling(requests(*texts)), theirs.loglikelihood_rolling(requests(*texts))
    np.testing.assert_allclose(got, wanted, atol=1e-4, rtol=1e-6)


def test_tasks_get_the_same_scores(both):
    import lm_eval
    from lm_eval.tasks import TaskManager

    run, theirs, folder = both
    names, manager = ["local_choice", "local_rolling", "local_until"], TaskManager(include_path=str(folder))
    for shots in (0, 2):
        asked = names[: 1 if shots else 3]
        got = harness.evaluate(run, asked, harness.find(asked, str(folder)), shots or None)
        how = {"num_fewshot": shots or None, "bootstrap_iters": 0, "log_samples": False, "task_manager": manager}
        wanted = lm_eval.simple_evaluate(model=theirs, tasks=names[: 1 if shots else 3], **how)["results"]
        choice = {k: v for k, v in got["local_choice"].items() if k in ("acc", "acc_norm")}
        assert choice == {k: wanted["local_choice"][f"{k},none"] for k in ("acc", "acc_norm")} and 0 < choice["acc"] < 1
        if not shots:
            for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
                assert got["local_rolling"][metric] == pytest.approx(wanted["local_rolling"][f"{metric},none"], rel=1e-5)


def test_generated_texts_are_the_same(both):
    run, theirs, folder = both
    texts = [json.loads(line)["text"] for line in (folder / "texts.jsonl").read_text().splitlines()]
    settings = {"until": [" the"], "max_gen_toks": 12, "do_sample": False, "temperature": 0.0}
    asked = requests(*[(t, settings) for t in texts])
    assert harness.Harness(run, 4).generate_until(asked) == theirs.generate_until(asked)
