"""Statistics of a corpus: sizes, duplicates, shares."""

import hashlib
import itertools

from gpt4o_jax.config import RunConfig
from gpt4o_jax.data import corpus as corpora
from gpt4o_jax.data import sources


def report(config: RunConfig) -> dict:
    """Statistics of a config's corpus. Builds what is not in the cache yet, and reads every document once more.

    Raises RunError as corpus.prepare does.
    """
    corpus = corpora.prepare(config)
    rows = corpora.training_rows(config, corpus)
    seen: set[bytes] = set()  # over all sources: a duplicate counts wherever its first copy was
    found = [_source(member, config, seen) for member in corpus.members]
    whole = {key: sum(f[key] for f in found) for key in _SUMS}
    whole["bytes_per_token"] = _ratio(whole["kept_bytes"], whole["tokens"])
    whole["longest_document_bytes"] = max(f["longest_document_bytes"] for f in found)
    for f in found:
        f["share_of_training_tokens"] = _ratio(f["training_tokens"], whole["training_tokens"])
    return {
        "corpus": corpus.name,
        "tokenizer": corpus.tokenizer.digest,
        "vocab_size": corpus.tokenizer.vocab_size,
        "rows": config.data.rows,
        "rows_fill": round(rows.fill, 4),
        "tokens_per_epoch": rows.tokens_per_epoch,
        "sources": found,
        "total": whole,
    }


_SUMS = (
    "documents", "bytes", "exact_duplicates", "near_duplicates_dropped", "kept_bytes", "tokens",
    "training_documents", "training_tokens", "holdout_documents", "holdout_tokens",
)  # fmt: skip


def _source(member: corpora.Member, config: RunConfig, seen: set[bytes]) -> dict:
    documents = text_bytes = longest = repeats = 0
    for text in itertools.chain(sources.load(member.data), sources.apart(member.data) or ()):
        if not text.strip():
            continue
        raw = text.encode("utf-8", "surrogatepass")
        key = hashlib.sha256(raw).digest()[:16]
        repeats += key in seen
        seen.add(key)
        documents, text_bytes, longest = documents + 1, text_bytes + len(raw), max(longest, len(raw))
    training, holdout = member.training, member.holdout
    kept_bytes, tokens = training.text_bytes + holdout.text_bytes, training.token_count + holdout.token_count
    dropped = documents - training.documents - holdout.documents if config.data.shingle_bytes else 0
    return {
        "source": member.data.source,
        "path": member.data.path,
        "share_of_rows": float(member.share),
        "documents": documents,
        "bytes": text_bytes,
        "exact_duplicates": repeats,
        "near_duplicates_dropped": dropped,
        "longest_document_bytes": longest,
        "kept_bytes": kept_bytes,
        "tokens": tokens,
        "bytes_per_token": _ratio(kept_bytes, tokens),
        "training_documents": training.documents,
        "training_tokens": training.token_count,
        "holdout_documents": holdout.documents,
        "holdout_tokens": holdout.token_count,
    }


def _ratio(a: float, b: float) -> float:
    return round(a / max(b, 1), 4)


def table(numbers: dict) -> str:
    """The report as text: one line per number, one column per source, the total last."""
    columns = numbers["sources"] + ([numbers["total"]] if len(numbers["sources"]) > 1 else [])
    names = [f"{c['source']} {c['path']}".strip() if "source" in c else "total" for c in columns]
    keys = [k for k in numbers["sources"][0] if k not in ("source", "path")]
    cells = [["", *names], *([k.replace("_", " "), *(_cell(k, c.get(k)) for c in columns)] for k in keys)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return "\n".join(
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))) for row in cells
    )


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1%}" if key.startswith("share") else f"{value:,}"
