"""`trainer --help`: what to type, every flag, every setting, every exit code; `trainer COMMAND --help`: one command."""

from collections.abc import Sequence

from absl import flags

from trainer.arguments import COMMANDS, FLAGS_OF
from trainer.config import Config, field_info, leaves

_EXAMPLES = {
    "train": """  trainer                                          train on the packaged sample, into runs/sample
  trainer --config=configs/facades.yaml --data_dir=DATA --model_dir=RUN
  trainer --config=RUN/config.yaml --model_dir=RUN --set train.steps=120000
                                                   go on with a run, for longer
  trainer --config=configs/facades.yaml --dry_run  show networks, data and plan, train nothing

  trainer --strategy=mirrored --set runtime.cpu_devices=2
                                                   several devices; --strategy=auto takes all there is, and all workers
                                                   that TF_CONFIG, CLUSTER_SPEC or an Indexed Job's variables name

  trainer --data_dir=gs://BUCKET/data --model_dir=gs://BUCKET/run
                                                   every folder of every command may be in a bucket (docs/buckets.md)

The same command again goes on from the newest checkpoint in the run's folder; Ctrl-C or SIGTERM saves and stops.
Without --config and --data_dir the sample's own config counts (24 filters, 1,400 steps); else the defaults below do,
which are the paper's.
""",
    "prepare": """  trainer prepare --source=PICTURES --output=DATA
      each picture holds input and target side by side; folders train, val and test are kept as splits
  trainer prepare --layout=folders --source=LABELS,PHOTOS --output=DATA --labels=input
      two folders, matched by file name; the input is a label map, resized without inventing colours
  trainer prepare --layout=list --source=pairs.csv --output=DATA --split_percent=80,10,10
      a CSV or JSONL with input, target and, if wanted, split and key; paths are relative to the list
  trainer prepare --source=facades --output=DATA
      a published set: facades, maps, cityscapes, edges2shoes, edges2handbags, night2day

PNG, JPEG, WebP, BMP and TIFF; 8 and 16 bits; grey, colour, colour with alpha. EXIF orientation is applied. Bad pairs are all
named and nothing is written, unless --skip_bad. An interrupted run goes on when it is started again.
""",
    "check": """  trainer check --data_dir=DATA                            every shard, record and picture
  trainer check --data_dir=DATA --thumbnails=sheet.png     and a contact sheet to look at
""",
    "evaluate": """  trainer evaluate --model_dir=RUN                         the test split, the newest checkpoint
  trainer evaluate --model_dir=RUN --split=val --checkpoint=best --inference=frozen

L1, PSNR, SSIM and, from 176 pixels, MS-SSIM: mean, 95 % bootstrap interval, median; a CSV with each image, a JSON, and a
picture of the best, the median and the worst, in RUN/evaluation.
""",
    "predict": """  trainer predict --model_dir=RUN --input=PICTURES --output=DRAWN
  trainer predict --model_dir=RUN --input='scans/*.tif' --output=DRAWN --seed=7

Pictures of the input kind alone, of any size, become PNG files of the same sizes and names.
""",
    "export": """  trainer export --model_dir=RUN --output=EXPORT
  trainer export --model_dir=RUN --output=EXPORT --formats=saved_model --checkpoint=best

A SavedModel (numbers or files in, any size) and a .keras file (training size) that load without this package.
""",
}

_EXIT_CODES = """Exit codes:
  0    done (also when the run was finished before)
  1    unexpected; worth another try
  2    config, flags or data must change first
  3    the training diverged: a loss or gradient was not finite
  75   a peer was lost, hangs or never came, or a bucket stayed away; run all workers again
  143  stopped by a signal; the last line says what was saved"""


def _flag_lines(values: flags.FlagValues, names: Sequence[str]) -> list[str]:
    return [f"  --{name:14} {str(values[name].help).splitlines()[0].rstrip(';')}" for name in names]


def _shown(value: object) -> str:
    return repr(list(value)) if isinstance(value, tuple) else repr(value) if value == "" else str(value).lower()


def _setting_lines() -> list[str]:
    return [f"  {key:38} {_shown(value):14} {field_info(key).description}" for key, value in leaves(Config())]


def _of_command(values: flags.FlagValues, command: str) -> list[str]:
    lines = _flag_lines(values, FLAGS_OF[command])
    return [f"trainer {command}: {COMMANDS[command]}", "", _EXAMPLES[command], "Flags:", *lines, ""]


def help_text(values: flags.FlagValues, command: str | None) -> str:
    """The whole text, or that of one command."""
    if command and command != "train":
        return "\n".join([*_of_command(values, command), "`trainer --help` lists all flags, settings and exit codes."])
    listed = [f"  {name:9} {text}" for name, text in COMMANDS.items()]
    head = [
        "trainer [COMMAND] [flags]: pix2pix on pairs of images. Without a command it trains.",
        "",
        "Commands:",
        *listed,
        "",
    ]
    settings = ["", "Settings, in the YAML file or as --set key=value, with their defaults:", *_setting_lines(), ""]
    return "\n".join(
        [
            *head,
            _EXAMPLES["train"],
            "Flags:",
            *_flag_lines(values, [name for name in values if len(name) > 1]),
            *settings,
            _EXIT_CODES,
        ]
    )
