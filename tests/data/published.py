"""Small tokenizers built like those of published models: (the library's tokenizer, the other files of its folder)."""

import json

import tokenizers as library
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXT = [
    "The cat sat on the mat.\n\tThe dog sat on the log; 12345 times.\r\n",
    "Füße, naïve café, 日本語, \U0001f600 <s> def f(x):\n    return x",
] * 9
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
HEADER = "<|start_header_id|>"


def special(*names):
    return [library.AddedToken(n, special=True, normalized=False) for n in names]


def gpt2():
    """Like GPT-2's: byte-level BPE, with one symbol as bos, eos and padding, inside the vocabulary."""
    t = library.Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    t.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    t.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, special_tokens=special("<|endoftext|>"))
    )
    token = "<|endoftext|>"
    return t, {"tokenizer_config.json": {"bos_token": token, "eos_token": token, "unk_token": token}}


def llama3():
    """Like Llama 3's: byte-level BPE after a regular expression, symbols after the vocabulary, bos before prompts."""
    t = library.Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(library.Regex(LLAMA3_SPLIT), "isolated")
    t.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    t.decoder = decoders.ByteLevel()
    t.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    t.add_special_tokens(
        special("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    )
    bos = t.token_to_id("<|begin_of_text|>")
    t.post_processor = processors.TemplateProcessing("<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", bos)])
    ids = [t.token_to_id(n) for n in ("<|eot_id|>", "<|end_of_text|>")]
    return t, {
        "tokenizer_config.json": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "chat_template": HEADER},
        "generation_config.json": {"eos_token_id": ids, "bos_token_id": bos},
    }  # fmt: skip


def qwen():
    """Like Qwen's: NFC, no bos, symbols and plain words after the vocabulary."""
    t = llama3()[0]
    t = library.Tokenizer.from_str(
        t.to_str().replace("begin_of_text", "endoftext").replace("end_of_text", "im_start").replace("eot_id", "im_end")
    )
    t.normalizer, t.post_processor = normalizers.NFC(), processors.ByteLevel()
    t.add_tokens(["<think>", "</think>"])
    return t, {
        "tokenizer_config.json": {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        "generation_config.json": {"eos_token_id": [t.token_to_id("<|im_end|>"), t.token_to_id("<|endoftext|>")]},
        "config.json": {"bos_token_id": t.token_to_id("<|endoftext|>"), "vocab_size": 400},
        "chat_template.jinja": "{{ '<|im_start|>' }}",
    }  # fmt: skip


def byte_fallback(normalizer, pre_tokenizer, decoder):
    t = library.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    t.normalizer = normalizer
    if pre_tokenizer:
        t.pre_tokenizer = pre_tokenizer
    t.decoder = decoder
    names = special("<unk>", "<s>", "</s>")
    byte_names = [library.AddedToken(f"<0x{b:02X}>", special=False) for b in range(256)]
    t.train_from_iterator(
        TEXT[:1], trainers.BpeTrainer(vocab_size=340, special_tokens=[*names, *byte_names], show_progress=False)
    )
    stored = json.loads(t.to_str())  # bytes are pieces of the model, not added tokens
    stored["added_tokens"] = stored["added_tokens"][:3]
    stored["post_processor"] = json.loads(processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)]).__getstate__())
    return library.Tokenizer.from_str(json.dumps(stored)), {
        "tokenizer_config.json": {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "unk_token": "<unk>"}
    }


def llama2():
    """Like Llama 2's: SentencePiece BPE, a space before every text, byte fallback for what has no piece."""
    prepend = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    back = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return byte_fallback(prepend, None, back)


def mistral3():
    """Like Mistral's later ones: the space only before the whole text."""
    back = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return byte_fallback(None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False), back)


def gemma():
    """Like Gemma's: no space in front."""
    back = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return byte_fallback(normalizers.Replace(" ", "▁"), None, back)


def unigram():
    """Like T5's: unigram pieces; the library recognises the names of control symbols in a text."""
    t = library.Tokenizer(models.Unigram())
    t.pre_tokenizer, t.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    t.train_from_iterator(
        TEXT,
        trainers.UnigramTrainer(
            vocab_size=200, special_tokens=special("<pad>", "<s>", "<unk>"), unk_token="<unk>", show_progress=False
        ),
    )
    return t, {"tokenizer_config.json": {"eos_token": "<s>", "pad_token": "<pad>", "unk_token": "<unk>"}}


def wordpiece():
    """Like BERT's; its normaliser loses case."""
    t = library.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    t.normalizer, t.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    t.decoder = decoders.WordPiece(cleanup=False)
    t.train_from_iterator(
        TEXT,
        trainers.WordPieceTrainer(
            vocab_size=250, special_tokens=special("[PAD]", "[UNK]", "[CLS]", "[SEP]"), show_progress=False
        ),
    )
    return t, {"tokenizer_config.json": {"bos_token": "[CLS]", "eos_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}}


FAMILIES = (gpt2, llama3, qwen, llama2, mistral3, gemma, unigram, wordpiece)
LOSSLESS = (gpt2, llama3, llama2, gemma)
