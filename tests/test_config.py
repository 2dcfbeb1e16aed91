from pathlib import Path

import pytest
import yaml

from trainer.config import Config, RuntimeConfig, config_from_tree, differences, field_info, leaves, load_config, to_tree
from trainer.errors import ConfigError


def problems(text: str | None, tmp_path: Path, *overrides: str) -> list[str]:
    path = tmp_path / "run.yaml"
    path.write_text(text or "")
    with pytest.raises(ConfigError) as caught:
        load_config(str(path), overrides)
    return [line.replace(str(path), "run.yaml") for line in caught.value.problems]


def test_defaults_are_the_papers_settings() -> None:
    config = Config()
    assert config.loss.reconstruction_weight == 100.0
    assert config.loss.discriminator_weight == 0.5
    assert (config.optimizer.learning_rate, config.optimizer.beta_1, config.optimizer.beta_2) == (2e-4, 0.5, 0.999)
    assert (config.data.image_size, config.data.jitter, config.train.batch_size) == ((256, 256), 30, 1)
    assert (config.model.discriminator.receptive_field, config.model.dropout, config.model.norm) == (70, 0.5, "batch")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("seed: -1", "run.yaml: seed: got -1, allowed: 0 or more"),
        ("seed: yes", "run.yaml: seed: got True, allowed: a whole number"),
        ("train: {steps: 1.5}", "run.yaml: train.steps: got 1.5, allowed: a whole number"),
        ("train: {batch_sise: 4}", "run.yaml: unknown key train.batch_sise; did you mean train.batch_size?"),
        ("optimiser: {}", "run.yaml: unknown key optimiser; did you mean optimizer?"),
        ("data: {cache: ram}", "run.yaml: data.cache: got 'ram', allowed: 'auto', 'none', 'memory' or 'disk'"),
        ("train: {steps_per_loop: fast}", "run.yaml: train.steps_per_loop: got 'fast', allowed: 'auto' or a whole number"),
        (
            "data: {image_size: [250, 256]}",
            "run.yaml: data.image_size[0]: got 250, allowed: a multiple of 16, such as 240 or 256",
        ),
        ("model: {dropout: 1.0}", "run.yaml: model.dropout: got 1.0, allowed: a number below 1.0"),
        ("optimizer: {learning_rate: .inf}", "run.yaml: optimizer.learning_rate: got inf, allowed: a finite number"),
        ("model: 3", "run.yaml: model: got 3, allowed: a section with keys of its own"),
        ("- a", "run.yaml: got ['a'], allowed: a mapping of keys such as `seed: 0`"),
        ("seed: 1\nseed: 2", "run.yaml, line 2: broken YAML: the key 'seed' stands twice"),
        (
            "data: {image_size: [32, 64]}\nmodel: {discriminator: {receptive_field: 286}}",
            "run.yaml: data.image_size: got [32, 64], allowed: sides of 96 or more for a receptive field of 286",
        ),
    ],
)
def test_each_mistake_gets_one_line_with_file_key_given_and_allowed(text: str, line: str, tmp_path: Path) -> None:
    assert problems(text, tmp_path) == [line]


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    lines = problems("seed: -1\nmodel: {norm: layer}\nspeed: 3", tmp_path, "train.steps=0")
    assert len(lines) == 4
    assert any(line.startswith("--set train.steps=0: train.steps: got 0") for line in lines)


def test_broken_yaml_names_the_line(tmp_path: Path) -> None:
    (line,) = problems("seed: 0\ntrain: {steps: 3", tmp_path)
    assert line.startswith("run.yaml, line 2: broken YAML: ")


def test_missing_file_suggests_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "facades.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"no such config file; did you mean .*facades\.yaml\?"):
        load_config(str(tmp_path / "facade.yaml"))


def test_binary_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="it is not UTF-8 text"):
        load_config(str(tmp_path / "x.yaml"))


def test_exponent_without_point_is_a_number() -> None:
    assert load_config(None, ["optimizer.learning_rate=2e-4"]).optimizer.learning_rate == 2e-4


def test_later_override_wins_and_file_stays_for_the_rest(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("train: {steps: 5, keep: 7}")
    config = load_config(str(tmp_path / "x.yaml"), ["train.steps=6", "train.steps=8"])
    assert (config.train.steps, config.train.keep) == (8, 7)


@pytest.mark.parametrize("override", ["steps", "=3", "train.steps.more=1", "train.steps=[", "trian.steps=3"])
def test_wrong_override_is_named(override: str, tmp_path: Path) -> None:
    (line,) = problems("train: {steps: 4}", tmp_path, override)
    assert override in line


def test_tree_round_trips_through_yaml() -> None:
    config = load_config(None, ["data.image_size=[128,256]", "train.steps_per_loop=7", "data.dir='/x y'"])
    assert config_from_tree(yaml.safe_load(yaml.safe_dump(to_tree(config))), "x") == config


def test_only_paths_steps_intervals_and_machine_may_change() -> None:
    changeable = {key for key, _ in leaves(Config()) if field_info(key).json_schema_extra}
    assert changeable == {
        "data.dir", "data.cache", "data.readers", "data.read_ahead_mb",
        "train.steps", "train.steps_per_loop", "train.checkpoint_every", "train.summary_every",
        "train.sample_every", "train.evaluate_every", "train.keep", "train.microbatches",
        *(f"runtime.{name}" for name in RuntimeConfig.model_fields),
    }  # fmt: skip


def test_differences_name_key_before_and_now() -> None:
    now = load_config(None, ["model.norm=instance", "train.steps=9"])
    assert differences(Config(), now) == ["model.norm: 'batch' in the run, 'instance' now"]


def test_every_setting_is_described() -> None:
    assert [key for key, _ in leaves(Config()) if not field_info(key).description] == []
