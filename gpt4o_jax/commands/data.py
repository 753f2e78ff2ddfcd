"""prepare: a run's sources into its token cache, or a TFDS dataset as array_record; report: what a corpus holds"""

from gpt4o_jax.commands.flags import Flag
from gpt4o_jax.errors import RunError

FLAGS = {
    "prepare": (
        Flag("config", str, "", "FILE[:ARG]: tokenise what this config names"),
        Flag("tfds", str, "", "NAME/CONFIG of TFDS, or FILE.py/CONFIG with a builder of one's own: download and prepare it"),
        Flag("data_dir", str, "", "for --tfds: folder of prepared datasets; TFDS's own if not given"),
    ),
    "report": (Flag("config", str, "", "FILE[:ARG], a Python file with get_config()", required=True),),
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
