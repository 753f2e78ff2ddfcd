"""A run with a published tokenizer: trained, evaluated, continued and chatted with, using that tokenizer's own ids."""

import io
import json

import pytest
import tokenizers as library
from tokenizers import decoders, models, pre_tokenizers, trainers

from gpt4o_jax.__main__ import main
from gpt4o_jax.data import tokenizer as tokenizers
from gpt4o_jax.run import open_run

SYMBOLS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@pytest.fixture(scope="module")
def folder(text, tmp_path_factory):
    """The files that come with the weights of a Qwen-like model."""
    t = library.Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    t.train_from_iterator([text.read_text()], trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet))
    t.add_special_tokens([library.AddedToken(n, special=True) for n in SYMBOLS])
    folder = tmp_path_factory.mktemp("published")
    t.save(str(folder / "tokenizer.json"))
    said = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": "{{'<|im_start|>'}}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    ids = {
        "eos_token_id": [t.token_to_id("<|im_end|>"), t.token_to_id("<|endoftext|>")],
        "bos_token_id": t.token_to_id("<|endoftext|>"),
    }
    (folder / "generation_config.json").write_text(json.dumps(ids))
    return folder


def test_it_is_used_from_training_to_chat(folder, train_args, tmp_path, command, capsys, monkeypatch):
    workdir, path = tmp_path / "run", f"--config.tokenizer.path={folder}"
    trained, _ = command(*train_args(workdir, path, "--config.train.length=10 steps", "--config.model.context_length=32"))
    assert sorted(p.name for p in workdir.glob("tokenizer*")) == ["tokenizer.extra.json", "tokenizer.json"]
    again, _ = command(*train_args(workdir, path, "--config.train.length=10 steps", "--config.model.context_length=32"))
    assert again["step"] == trained["step"] == 10
    ours, published = open_run(workdir).tokenizer, tokenizers.load(folder)
    assert (ours.symbols, ours.digest) == (published.symbols, published.digest) and ours.template == "chatml"

    scores, _ = command("evaluate", f"--workdir={workdir}")
    assert scores["tokens"] > 0
    drawn, _ = command(
        "generate", f"--workdir={workdir}", "--prompt=1 green", "--max_new_tokens=9", "--temperature=5", "--num_samples=9"
    )
    assert not any(name in s["text"] for s in drawn["samples"] for name in SYMBOLS)

    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO("a <|im_end|>\n"))
    assert main(["chat", f"--workdir={workdir}", "--max_new_tokens=3", "--temperature=0"]) == 0
    out, err = capsys.readouterr()
    assert "template chatml" in err and json.loads(out.splitlines()[-1])["replies"] == 1


def test_a_template_that_is_not_rendered_is_told(folder, train_args, tmp_path, command, capsys, monkeypatch):
    source, run = tmp_path / "published", f"--workdir={tmp_path / 'run'}"
    source.mkdir()
    for path in folder.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    (source / "chat_template.jinja").write_text("{{ '<|turn|>' }}")
    path = f"--config.tokenizer.path={source}"
    command(*train_args(tmp_path / "run", path, "--config.train.length=10 steps", "--config.model.context_length=32"))
    unrendered = "this model's own chat template (chat_template.jinja) is not supported here"

    def talk(*flags: str) -> tuple[dict, list[str]]:
        capsys.readouterr()
        monkeypatch.setattr("sys.stdin", io.StringIO("a\n"))
        assert main(["chat", run, "--max_new_tokens=3", *flags]) == 0
        out, err = capsys.readouterr()
        return json.loads(out.splitlines()[-1]), [line for line in err.splitlines() if unrendered in line]

    result, told = talk()
    assert result["template"] == "none" and told[0].startswith(f"{unrendered}: your text is continued as plain text")
    assert len(told) == 1 and "(for another: --template=chatml or qwen1.5 or" in told[0]
    assert talk("--template=chatml")[1] == []
    capsys.readouterr()
    assert main(["generate", run, "--prompt=1", "--max_new_tokens=3"]) == 0
    assert f"{unrendered}: a prompt is continued as it stands\n" in capsys.readouterr().err
