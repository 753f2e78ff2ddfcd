"""writes report.md of a run or a sweep, finished or not"""

from gpt4o_jax.commands.flags import Flag

FLAGS = (Flag("workdir", str, "", "run folder, or the folder of a sweep", required=True),)


def main(flags: dict, overrides: dict[str, str]) -> dict:
    from gpt4o_jax import report, sweep_report
    from gpt4o_jax.paths import of_user

    workdir = of_user(flags["workdir"])
    if (workdir / sweep_report.NOTE).exists():
        return sweep_report.write(workdir)
    return report.write(workdir)
