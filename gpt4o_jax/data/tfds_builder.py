"""Runs one TFDS builder and writes array_record. A script that needs only TFDS, so it runs in any environment.

    python -P tfds_builder.py NAME[/CONFIG][:VERSION]|FILE.py[/CONFIG] [DATA_DIR]

The last line of stdout is one JSON object: what was prepared, or {"error": ..., "missing": the package to import or ""}.
"""

import importlib
import importlib.util
import json
import os
import re
import sys


def main(spec: str, data_dir: str) -> dict:
    try:
        builder = _builder(spec, data_dir)
        builder.download_and_prepare()
        splits = {name: split.num_examples for name, split in builder.info.splits.items()}
        return {"dataset": builder.info.full_name, "data_dir": str(builder.data_dir), "splits": splits}
    except Exception as e:  # whatever goes wrong in a builder, the caller reports it in one line
        first = next(iter(str(e).splitlines()), "")
        return {"error": f"{type(e).__name__}: {first}", "missing": _missing(e)}


def _builder(spec: str, data_dir: str):
    import tensorflow_datasets as tfds

    own = re.fullmatch(r"(.+\.py)(/.+)?", spec)
    if own:
        module_spec = importlib.util.spec_from_file_location("own_builder", own[1])
        module = importlib.util.module_from_spec(module_spec)
        sys.modules["own_builder"] = module  # TFDS looks up the module of a builder's class
        module_spec.loader.exec_module(module)
        kinds = [k for k in vars(module).values() if isinstance(k, type) and issubclass(k, tfds.core.DatasetBuilder)]
        names = [k.name for k in kinds if k.__module__ == "own_builder"]
        if len(names) != 1:
            raise ValueError(f"{own[1]} defines {len(names)} builders, expected one")
        spec = names[0] + (own[2] or "")
    else:
        for part in ("text", "translate", "summarization", "question_answering"):  # registered only once imported
            importlib.import_module(f"tensorflow_datasets.{part}")
    return tfds.builder(spec, data_dir=data_dir or None, file_format="array_record")


def _missing(error: BaseException | None) -> str:
    """The package that could not be imported, if that caused the error; else ""."""
    while error is not None:
        if isinstance(error, ImportError):
            return (error.name or str(error)).split(".")[0]
        error = error.__cause__ or error.__context__
    return ""


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    print(json.dumps(main(sys.argv[1], "".join(sys.argv[2:3]))), flush=True)
