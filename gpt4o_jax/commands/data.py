"""prepare: tokenises a config's sources, or builds a TFDS dataset as array_record; report: statistics of a corpus"""

from gpt4o_jax.commands.flags import Flag
from gpt4o_jax.errors import RunError

FLAGS = {
    "prepare": (
        Flag("config", str, "", "config file FILE[:ARG], whose sources are tokenised into the cache"),
        Flag("tfds", str, "", "dataset to download and prepare: NAME/CONFIG of TFDS, or FILE.py/CONFIG with your own builder"),
        Flag("data_dir", str, "", "for --tfds: folder of prepared datasets; default: that of TFDS"),
    ),
    "report": (Flag("config", str, "", "config file: FILE[:ARG], a Python file with get_config()", required=True),),
}


def main(flags: dict, overrides: dict[str, str], action: str) -> dict:
    import sys

    from gpt4o_jax.commands import config_file
    from gpt4o_jax.console import say

    if action == "prepare":
        if bool(flags["config"]) == bool(flags["tfds"]):
            raise RunError("data prepare: expected either --config=FILE or --tfds=NAME/CONFIG")
        if flags["tfds"]:
            if overrides:
                raise RunError(
                    f"data prepare: --config.{next(iter(overrides))} is for --config=FILE; with --tfds give --data_dir"
                )
            from gpt4o_jax.data import tfds_prepare

            return tfds_prepare.prepare(flags["tfds"], flags["data_dir"], say)
        if flags["data_dir"]:
            raise RunError("data prepare: --data_dir is for --tfds; a config has --config.data.tfds_dir")
    from gpt4o_jax.data import corpus_report

    numbers = corpus_report.report(config_file.read(flags["config"], overrides))
    print(corpus_report.table(numbers), file=sys.stderr)
    return numbers
