"""argv -> command and flags. The list of flags is frozen by a test: everything else is a setting of the config."""

from collections.abc import Sequence

from absl import flags

from trainer.config import Config, leaves
from trainer.errors import UserError

COMMANDS = {
    "train": "train a generator, or go on with a run",
    "prepare": "make a data set of pairs of pictures",
    "check": "verify a prepared data set",
    "evaluate": "measure a trained generator on a split",
    "predict": "draw the targets of pictures",
    "export": "write a trained generator for other programs",
}
_EVERYWHERE = ("help", "h", "version", "log_format")
STRATEGIES = ("auto", "one_device", "mirrored", "multi_worker_mirrored", "tpu")
LAYOUTS = ("side_by_side", "folders", "list")

FLAGS_OF = {
    "train": ("config", "set", "data_dir", "model_dir", "strategy", "dry_run"),
    "prepare": ("source", "layout", "output", "labels", "split_percent", "shard_mb", "processes", "skip_bad", "base_url"),
    "check": ("data_dir", "thumbnails"),
    "evaluate": ("model_dir", "data_dir", "split", "checkpoint", "inference"),
    "predict": ("model_dir", "input", "output", "seed", "checkpoint", "inference"),
    "export": ("model_dir", "output", "formats", "checkpoint", "inference"),
}

_TEXT: list[tuple[str, str | None, str]] = [
    ("config", None, "YAML file with settings, here or gs://"),
    ("data_dir", None, "prepared data set, here or gs://; without one, the packaged sample"),
    ("model_dir", None, "the run's folder, here or gs://; default runs/NAME-OF-THE-CONFIG"),
    ("source", None, "prepare: folder, INPUTS,TARGETS, list file, or the name of a published set"),
    ("input", None, "predict: folder, glob, .txt list, or one picture"),
    ("output", None, "prepare, predict, export: the folder that is made"),
    ("thumbnails", None, "check: write a contact sheet of pairs to this PNG"),
    ("formats", "saved_model,keras", "export: which formats"),
    ("base_url", None, "prepare: a mirror that serves NAME.tar.gz of the published sets"),
    ("split_percent", "90,5,5", "prepare: shares of train, val, test where the source has no such folders"),
]
_CHOICES: list[tuple[str, str | None, tuple[str, ...], str]] = [
    ("strategy", "auto", STRATEGIES, "how devices share the work"),
    ("log_format", "text", ("text", "json"), "json: one object a line on stdout, TensorFlow's own lines too"),
    ("layout", "side_by_side", LAYOUTS, "prepare: how the source holds pairs"),
    ("labels", "none", ("none", "input", "target", "both"), "prepare: which side holds label maps"),
    ("split", "test", ("train", "val", "test"), "evaluate: which pairs"),
    ("inference", None, ("paper", "frozen"), "evaluate, predict, export: instead of the run's own model.inference"),
    ("checkpoint", "newest", ("newest", "best"), "evaluate, predict, export: which one"),
]
_NUMBERS: list[tuple[str, int | None, int, str]] = [
    ("processes", 0, 0, "prepare: how many read pictures; 0: one a core"),
    ("shard_mb", 256, 1, "prepare: about how large a shard becomes, in MB"),
    ("seed", None, 0, "predict: draws other dropout masks than the run's seed"),
]
_SWITCHES = [
    ("skip_bad", "prepare: leave bad pairs out, and list them, instead of refusing all"),
    ("dry_run", "train: print config, networks, data and plan, and stop"),
    ("help", "print this text; after a command, what it does"),
    ("version", "print the version"),
]


def define_flags() -> flags.FlagValues:
    """The flags, apart from those that imported libraries define for themselves."""
    values = flags.FlagValues()
    for name, default, text in _TEXT:
        flags.DEFINE_string(name, default, text, flag_values=values)
    for name, default, choices, text in _CHOICES:
        flags.DEFINE_enum(name, default, list(choices), text, flag_values=values)
    for name, number, least, text in _NUMBERS:
        flags.DEFINE_integer(name, number, text, lower_bound=least, flag_values=values)
    for name, text in _SWITCHES:
        flags.DEFINE_bool(name, False, text, short_name="h" if name == "help" else None, flag_values=values)
    flags.DEFINE_multi_string("set", [], "override one setting, as key.path=value; repeat it", flag_values=values)
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
    foreign = [f"--{name}" for name in values if values[name].present and name not in (*FLAGS_OF[command], *_EVERYWHERE)]
    if foreign:
        keys = [key for key, _ in leaves(Config()) if f"--{key.rsplit('.', 1)[-1]}" in foreign] if command == "train" else []
        hint = f"; the setting is --set {keys[0]}=..." if keys else ""
        raise UserError(f"trainer {command} takes no {', '.join(foreign)} (`trainer {command} --help` lists its flags){hint}")
    return command, values


def need(values: flags.FlagValues, command: str, *names: str) -> list[str]:
    """The values of flags that a command cannot do without.

    Raises:
        UserError: naming those that are missing.
    """
    missing = [f"--{name}" for name in names if not values[name].value]
    if missing:
        raise UserError(f"trainer {command} needs {' and '.join(missing)} (`trainer {command} --help` shows examples)")
    return [str(values[name].value) for name in names]
