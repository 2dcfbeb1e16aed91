"""argv -> Config -> one command; errors -> exit codes; nothing else."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from trainer import __version__
from trainer.cluster import check_environment
from trainer.config import SAMPLE_CONFIG, Config, load_config
from trainer.errors import ExitCode, TrainerError, UserError
from trainer.help import help_text
from trainer.runtime.progress import log_to_stderr
from trainer.runtime.startup import load_tensorflow

COMMANDS = ("train",)
STRATEGIES = ("auto", "one_device")


def define_flags() -> flags.FlagValues:
    """The flags, apart from those that imported libraries define for themselves."""
    values = flags.FlagValues()
    flags.DEFINE_string("config", None, "YAML file with settings; without one, the defaults", flag_values=values)
    flags.DEFINE_multi_string("set", [], "override one setting, as key.path=value; repeat it", flag_values=values)
    flags.DEFINE_enum("strategy", "auto", list(STRATEGIES), "how devices share the work", flag_values=values)
    flags.DEFINE_string("data_dir", None, "prepared data set; without one, the packaged sample", flag_values=values)
    flags.DEFINE_string("model_dir", None, "the run's folder; default runs/NAME-OF-THE-CONFIG", flag_values=values)
    flags.DEFINE_bool("dry_run", False, "print config, networks, data and plan, and stop", flag_values=values)
    flags.DEFINE_bool("help", False, "print this text", short_name="h", flag_values=values)
    flags.DEFINE_bool("version", False, "print the version", flag_values=values)
    return values


def parse(argv: Sequence[str]) -> tuple[str, flags.FlagValues]:
    """Split the arguments into the command and the flags.

    Raises:
        UserError: an unknown command, flag or flag value.
    """
    values = define_flags()
    try:
        words = values(list(argv))[1:]
    except flags.Error as error:
        raise UserError(f"{str(error).splitlines()[0]} (`trainer --help` lists the flags)") from error
    command = words[0] if words else "train"
    if command not in COMMANDS or len(words) > 1:
        raise UserError(f"unknown command {' '.join(words)!r}; allowed: {', '.join(COMMANDS)} (`trainer --help`)")
    return command, values


def resolve(values: flags.FlagValues) -> tuple[Config, Path]:
    """The config that the flags ask for, and the run's folder.

    Raises:
        UserError: a wrong setting, or a bucket, which this version does not read yet.
    """
    path = values.config
    if path is None and values.data_dir is None:
        path = str(SAMPLE_CONFIG)
    overrides = list(values.set)
    if values.data_dir is not None:
        overrides.append(f"data.dir={values.data_dir!r}")
    config = load_config(path, overrides)
    model_dir = values.model_dir or f"runs/{Path(path).stem if path else 'run'}"
    for flag, place in (("data_dir", config.data.dir), ("model_dir", model_dir)):
        if "://" in place:
            raise UserError(
                f"--{flag}={place}: this version reads and writes local folders only; copy the bucket or mount it"
            )
    return config, Path(model_dir)


def run(argv: Sequence[str]) -> str:
    """Do what the arguments ask; return what is printed at the end."""
    _, values = parse(argv)
    if values.help:
        return help_text(values)
    if values.version:
        return f"pix2pix-trainer {__version__}"
    config, model_dir = resolve(values)
    check_environment(os.environ)
    load_tensorflow()
    log_to_stderr()
    if values.dry_run:
        from trainer.train.plan import dry_run

        return dry_run(config)
    from trainer.train.loop import train

    return train(config, model_dir)


def main() -> None:
    """The console script: run, print, and leave with a code from the table in errors.py."""
    try:
        print(run(sys.argv))
    except TrainerError as error:
        print("".join(f"trainer: {line}\n" for line in str(error).splitlines()), end="", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("trainer: SIGINT: stopped before training began; nothing was changed", file=sys.stderr)
        sys.exit(ExitCode.STOPPED)


if __name__ == "__main__":
    main()
