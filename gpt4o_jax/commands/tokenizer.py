"""train: trains a tokenizer on text files; inspect: shows how a tokenizer splits a text"""

from gpt4o_jax.commands.flags import Flag

FLAGS = {
    "train": (
        Flag("text", str, "", "UTF-8 file, folder or glob to train on", required=True),
        Flag("out", str, "", "file to write, for config.tokenizer.path", required=True),
        Flag("kind", str, "bpe", "bpe, byte or char"),
        Flag("vocab_size", int, None, "vocabulary size of a bpe tokenizer; default: 2048", low=300, high=2**20),
    ),
    "inspect": (
        Flag(
            "tokenizer",
            str,
            "",
            "tokenizer.model or tokenizer.json, or the folder of a run or of a published model",
            required=True,
        ),
        Flag("text", str, "", "text to tokenise", required=True, blank=True),
    ),
}


def main(flags: dict, overrides: dict[str, str], action: str) -> dict:
    from pathlib import Path

    from gpt4o_jax.console import say
    from gpt4o_jax.data import sources
    from gpt4o_jax.data import tokenizer as tokenizers
    from gpt4o_jax.errors import ExitCode, RunError
    from gpt4o_jax.paths import local

    if action == "train":
        if flags["kind"] not in ("bpe", "byte", "char"):
            raise RunError(f"tokenizer train: --kind={flags['kind']}: expected bpe, byte or char")
        if flags["vocab_size"] and flags["kind"] != "bpe":
            raise RunError(f"tokenizer train: --vocab_size is for --kind=bpe; a {flags['kind']} tokenizer has a size of its own")
        documents = [sources.read_text(p) for p in sources.text_files(flags["text"])]
        tokenizer = tokenizers.train(flags["kind"], flags["vocab_size"] or 2048, documents)
        try:
            tokenizer.save(local("--out", flags["out"]))
        except OSError as e:
            raise RunError(f"--out={flags['out']}: cannot write ({e.strerror or e})", ExitCode.STORAGE) from None
        tokens = sum(len(tokenizer.encode(d)) for d in documents)
        text_bytes = sum(len(d.encode()) for d in documents)
        return {
            "out": flags["out"], "vocab_size": tokenizer.vocab_size, "digest": tokenizer.digest,
            "tokens": tokens, "bytes": text_bytes, "bytes_per_token": text_bytes / max(tokens, 1),
        }  # fmt: skip
    path = Path(flags["tokenizer"])
    tokenizer = tokenizers.load(path)
    ids = tokenizer.encode(flags["text"])
    say(" | ".join(repr(tokenizer.decode([i])) for i in ids))
    return {"vocab_size": tokenizer.vocab_size, "kind": tokenizer.kind, "digest": tokenizer.digest, "ids": ids}
