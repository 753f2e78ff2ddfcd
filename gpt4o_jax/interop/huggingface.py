"""Hugging Face folder -> run folder, and back. Both are built beside their destination and renamed when complete."""

import contextlib
import json
import math
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from etils import epath

from gpt4o_jax import parallel
from gpt4o_jax.checkpoint.store import Store
from gpt4o_jax.config import MeshConfig
from gpt4o_jax.console import say
from gpt4o_jax.data import conversations, tokenizer_published
from gpt4o_jax.data import tokenizer as tokenizers
from gpt4o_jax.data.tokenizer import Symbols, Tokenizer
from gpt4o_jax.errors import RunError, data_error
from gpt4o_jax.interop import chat_templates, config_json, files, weights
from gpt4o_jax.model import flops, gpt
from gpt4o_jax.ops.compute import Compute
from gpt4o_jax.paths import Hold
from gpt4o_jax.run import Run, write_config
from gpt4o_jax.tasks import chat

MAX_FILE_BYTES = 5_000_000_000  # as on the Hub


def import_folder(source: Path, workdir: Path, compute_dtype: str = "auto") -> dict:
    """Makes the run folder `workdir`, with the weights as step 0. Returns {"family", "parameters", "tensors"}.

    compute_dtype: the run's knob of that name.

    Raises RunError if anything in `source` is missing, damaged or not understood, or `workdir` is taken.
    """
    family, model_config = config_json.read(source)
    tokenizer = tokenizers.load(source)
    if tokenizer.vocab_size > model_config.vocab_size:
        raise data_error(
            f"{source}: the tokenizer has {tokenizer.vocab_size} pieces, but config.json says"
            f" vocab_size={model_config.vocab_size}: they do not belong together"
        )
    opened = files.Weights(source)
    mesh_config = MeshConfig(fsdp=math.gcd(model_config.d_model, len(jax.devices())))
    mesh = parallel.make_mesh(mesh_config)
    with jax.set_mesh(mesh), built_beside(workdir, "--workdir") as beside:
        model = gpt.GPT(model_config, Compute.on(mesh, "float32"))
        params = weights.load(opened, family, model, mesh)
        with Store(epath.Path(beside) / "checkpoints") as store:
            # No corpus: nothing was trained here.
            store.save(0, {"params": params}, {"step": 0, "corpus": None, "tokenizer": tokenizer.digest}, copy=False)
        tokenizer.save_in(beside)
        write_config(epath.Path(beside), config_json.run_config(model_config, mesh_config, compute_dtype))
    if tokenizer_published.is_unknown(tokenizer):
        say(f"{conversations.UNRENDERED}: it is kept with the tokenizer and exported unchanged")
    return {"family": family.name, "parameters": flops.parameter_count(model_config), "tensors": len(opened.entries)}


def export_folder(run: Run, target: Path, name: str = "", dtype: str = "float32", max_file_bytes: int = MAX_FILE_BYTES) -> dict:
    """Writes `run` as a folder that transformers loads. name: the family; empty: the first that fits.

    dtype: of the tensors, "float32" or "bfloat16". Needs an active mesh. Returns {"family", "parameters", "tensors", "template"}.
    Raises RunError if no family computes what the model does, or `target` is taken.
    """
    m = run.config.model
    family = config_json.choose(m, name)
    kind = np.dtype(jax.numpy.dtype(dtype))
    files.import_safetensors()
    theirs = weights.Theirs(family, run.params, m, kind)
    # Preferences and rewards are conversations too, whatever file they came from.
    taught = conversations.talks(run.config.data) or run.config.objective.method != "next_token"
    template = conversations.template_name(run.config.data, run.tokenizer) if taught else run.tokenizer.template
    if template and chat.missing(chat.template(template), run.tokenizer):
        template = ""  # imported with a template but without its symbols: no conversation can be rendered
    with built_beside(target, "--to") as beside:
        files.write(beside, theirs.shapes.items(), theirs.load, kind, max_file_bytes)
        for file, content in tokenizer_files(run.tokenizer, template, taught).items():
            (beside / file).parent.mkdir(exist_ok=True)
            (beside / file).write_bytes(content)
        values = config_json.from_model(family, m) | _ids(run.tokenizer.symbols)
        (beside / "config.json").write_bytes(_json(values | {"torch_dtype": dtype, "initializer_range": m.init_std}))
    sizes = {"parameters": flops.parameter_count(m), "tensors": len(theirs.shapes)}
    return {"family": family.name, **sizes, "template": template}


def tokenizer_files(tokenizer: Tokenizer, template: str, taught: bool = True) -> dict[str, bytes]:
    """Files of an exported folder for its tokenizer, its chat template and what ends a turn: file name -> content.

    template: name of one in tasks/chat.py; empty if the model knows no conversations, or none there is its template.
    taught: whether the model was trained on conversations here. If not, the template that it came with is kept unchanged: it
    may do more than our renderer of that name, such as declare tools.
    """
    written, symbols, said = tokenizer.files, tokenizer.symbols, tokenizer_config(tokenizer)
    if template and (taught or tokenizer_published.TEMPLATE_FILE not in written):
        written = tokenizer_published.with_template(tokenizer, template, chat_templates.TEXTS[template])
    if template:
        symbols = chat.symbols_of_answers(chat.template(template), tokenizer)
    told = {"tokenizer_config.json": _json(said)} if said else {}
    return {**written, **told, "generation_config.json": _json(_ids(symbols))}


def _ids(symbols: Symbols) -> dict:
    return {"bos_token_id": symbols.bos, "eos_token_id": list(symbols.eos), "pad_token_id": symbols.pad}


def _json(values: dict) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()


def tokenizer_config(tokenizer: Tokenizer) -> dict:
    """tokenizer_config.json, which tells transformers' AutoTokenizer how to read the files of `tokenizer`; empty for byte and
    char tokenizers, for which transformers has no class."""
    classes = {"json": "PreTrainedTokenizerFast", "sentencepiece": "LlamaTokenizer", "bpe": "LlamaTokenizer"}
    if tokenizer.kind not in classes:
        return {}
    symbols, by_id = tokenizer.symbols, {i: name for name, i in tokenizer.names.items()}
    roles = {
        "bos_token": symbols.bos,
        "eos_token": symbols.eos[0],
        "pad_token": symbols.pad,
        "unk_token": tokenizer.names.get("<unk>"),
    }
    how = {"add_bos_token": symbols.prompts_begin, "add_eos_token": False, "clean_up_tokenization_spaces": False}
    if classes[tokenizer.kind] == "LlamaTokenizer":
        spaced = bool(tokenizer.prefix)  # as SentencePiece does, also after a symbol: "legacy" in transformers
        how |= {"add_prefix_space": spaced, "legacy": spaced}
    named = {role: by_id[i] for role, i in roles.items() if i in by_id}
    return {"tokenizer_class": classes[tokenizer.kind], **named, **how}


def check_free(target: Path, flag: str) -> None:
    """Raises RunError if a new folder cannot take the place of `target`."""
    if target.is_file() or (target.exists() and any(target.iterdir())):
        raise RunError(f"{flag}={target}: exists already; give a new or empty folder")
    here = target.exists() and target.samefile(".")
    if here or target.resolve().is_mount():
        what = "the folder you are in" if here else "a mount"
        raise RunError(f"{flag}={target}: {what}, which cannot be replaced; give a new folder in it: {flag}={target / 'new'}")


@contextlib.contextmanager
def built_beside(target: Path, flag: str) -> Iterator[Path]:
    """A new folder beside `target`, which becomes `target` if the block succeeds, and is removed if it does not.

    What a killed process left there is removed by the next one. Raises RunError as `check_free` does, and if another process
    is building there.
    """
    check_free(target, flag)
    target = target.resolve()  # the folder that a link leads to can be replaced, and `..` has no name
    begun = f".{target.name}.unfinished."
    for left in target.parent.iterdir() if target.parent.exists() else ():
        with Hold() as hold:
            begun_before = left.name.startswith(begun) and left.is_dir() and not left.is_symlink()
            if begun_before and hold.take(left, f"{flag}={target}"):
                shutil.rmtree(left)
    beside = target.parent / f"{begun}{uuid.uuid4().hex[:8]}"  # a new name each time: not every file system has locks
    above = [folder for folder in beside.parents if not folder.exists()]  # innermost first
    beside.mkdir(parents=True)
    with Hold() as hold:
        hold.take(beside, f"{flag}={target}")
        try:
            yield beside
            try:
                beside.replace(target)
            except OSError:
                check_free(target, flag)  # another process was faster
                raise
        finally:
            shutil.rmtree(beside, ignore_errors=True)
            with contextlib.suppress(OSError):  # not empty: `target`, or what somebody else put there
                for folder in above:
                    folder.rmdir()
