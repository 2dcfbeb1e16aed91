"""`trainer --help`: what to type, every flag, every setting, every exit code."""

from absl import flags

from trainer.config import Config, field_info, leaves

_HEAD = """trainer [train] [flags]: train pix2pix on pairs of images.

  trainer                                          train on the packaged sample, into runs/sample
  trainer --config=configs/facades.yaml --data_dir=DATA --model_dir=RUN
  trainer --config=RUN/config.yaml --model_dir=RUN --set train.steps=120000
                                                   go on with a run, for longer
  trainer --config=configs/facades.yaml --dry_run  show networks, data and plan, train nothing

The same command again goes on from the newest checkpoint in the run's folder; Ctrl-C or SIGTERM saves and stops.
"""

_EXIT_CODES = """Exit codes:
  0    done (also when the run was finished before)
  1    unexpected; worth another try
  2    config, flags or data must change first
  3    the training diverged: a loss or gradient was not finite
  143  stopped by a signal; what was done is saved"""


def _flag_lines(values: flags.FlagValues) -> list[str]:
    return [f"  --{name:12} {str(values[name].help).splitlines()[0]}" for name in values if len(name) > 1]


def _shown(value: object) -> str:
    return repr(list(value)) if isinstance(value, tuple) else repr(value) if value == "" else str(value).lower()


def _setting_lines() -> list[str]:
    return [f"  {key:38} {_shown(value):14} {field_info(key).description}" for key, value in leaves(Config())]


def help_text(values: flags.FlagValues) -> str:
    """The whole text."""
    settings = ["", "Settings, in the YAML file or as --set key=value, with their defaults:", *_setting_lines(), ""]
    return "\n".join([_HEAD, "Flags:", *_flag_lines(values), *settings, _EXIT_CODES])
