"""What is exported, used in a fresh process that cannot import this package."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.helpers.disks import small_disk
from tests.helpers.images import encode, label, photo
from tests.helpers.processes import finish, run_trainer, start_program
from tests.helpers.settings import small_config
from tests.helpers.users import ME, TRAINER_AS_NOBODY, folder_for_everybody
from trainer.errors import UserError
from trainer.export import export, stock_copy
from trainer.model.generators import translate, unet
from trainer.predict import Predictor
from trainer.trained import TrainedRun

USER = """
import os, sys
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
sys.modules["trainer"] = None  # an import of it fails
import json, numpy as np, tensorflow as tf, keras
folder, work = sys.argv[1], sys.argv[2]
served = tf.saved_model.load(folder + "/saved_model")
pixels = [np.load(f"{work}/{n}.npy") for n in range(3)]
out = {}
for n, image in enumerate(pixels):
    unit = tf.constant(image[None] / 127.5 - 1, tf.float32)
    for name, more in (("serving_default", {}), ("images_seeded", {"seed": tf.constant(7)})):
        drawn = served.signatures[name](images=unit, **more)["outputs"][0]
        out[f"{name}-{n}"] = np.round(np.clip((drawn.numpy() + 1) * 127.5, 0, 255)).astype(np.uint8)
files = tf.constant([open(f"{work}/{n}.file", "rb").read() for n in range(3)])
for name, more in (("encoded", {}), ("encoded_seeded", {"seed": tf.constant(7)})):
    for n, png in enumerate(served.signatures[name](encoded=files, **more)["png"].numpy()):
        out[f"{name}-{n}"] = tf.io.decode_png(png).numpy()
model = keras.saving.load_model(folder + "/keras/generator.keras")
drawn = model(tf.constant(pixels[0][None] / 127.5 - 1, tf.float32), training=False)[0].numpy()
out["keras-0"] = np.round(np.clip((drawn + 1) * 127.5, 0, 255)).astype(np.uint8)
np.savez(work + "/out.npz", **out)
print(json.dumps(sorted({type(layer).__module__.split(".")[0] for layer in model.layers})))
"""

SIZES = [(64, 64), (50, 90), (7, 9)]


def used(folder: Path, work: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """Load what was exported as its user would."""
    work.mkdir()
    (work / "user.py").write_text(USER)
    for number, (size, kind) in enumerate(zip(SIZES, ("png", "bmp", "webp"), strict=True)):
        settings = {"lossless": True} if kind == "webp" else {}
        np.save(work / f"{number}.npy", label(number, *size))
        (work / f"{number}.file").write_bytes(encode(label(number, *size), kind, **settings))
    command = [sys.executable, str(work / "user.py"), str(folder), str(work)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=work)
    assert done.returncode == 0, done.stderr
    return dict(np.load(work / "out.npz")), json.loads(done.stdout.splitlines()[-1])


def difference(a: np.ndarray, b: np.ndarray) -> int:
    assert a.shape == b.shape
    return int(np.abs(a.astype(int) - b).max())


@pytest.mark.slow
def test_exports_draw_predicts_pixels_without_the_package(trained_run: TrainedRun, exported: Path, tmp_path: Path) -> None:
    drawn, modules = used(exported, tmp_path / "work")
    plain, seven = Predictor(trained_run), Predictor(trained_run, 7)
    for number, size in enumerate(SIZES):
        expected, seeded = plain.draw(label(number, *size)), seven.draw(label(number, *size))
        np.testing.assert_array_equal(drawn[f"encoded-{number}"], expected)
        np.testing.assert_array_equal(drawn[f"encoded_seeded-{number}"], seeded)
        assert difference(drawn[f"serving_default-{number}"], expected) <= 1
        assert difference(drawn[f"images_seeded-{number}"], seeded) <= 1
    assert difference(drawn["keras-0"], plain.draw(label(0))) <= 1
    assert (drawn["keras-0"] == plain.draw(label(0))).mean() > 0.999
    assert modules == ["keras"], "Keras's own layers alone"
    assert (drawn["encoded-0"] != drawn["encoded_seeded-0"]).any()


@pytest.mark.parametrize(("norm", "inference"), [("batch", "frozen"), ("instance", "paper"), ("none", "paper")])
def test_stock_layers_draw_the_same_for_every_norm(norm: str, inference: str, trained_run: TrainedRun, tmp_path: Path) -> None:
    """Fresh weights of another norm, its statistics moved: what matters is that both networks agree."""
    config = small_config(f"model.norm={norm}", f"model.inference={inference}")
    run = dataclasses.replace(trained_run, config=config)
    network = unet(config.model, (64, 64), 3, 3, 5)
    for layer in network.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.moving_mean.assign(tf.random.stateless_normal(layer.moving_mean.shape, (1, 2)))
            layer.moving_variance.assign(tf.random.stateless_uniform(layer.moving_variance.shape, (1, 2), 0.5, 2.0))
    stock = stock_copy(network, run)
    image = tf.constant(photo(0)[None] / 127.5 - 1, tf.float32)
    np.testing.assert_allclose(stock(image), translate(network, image, config.seed), atol=2e-5)
    stock.save(tmp_path / "x.keras")
    np.testing.assert_allclose(keras.saving.load_model(tmp_path / "x.keras")(image), stock(image), atol=1e-6)


def test_model_card_tells_data_config_and_metrics(trained_run: TrainedRun, tmp_path: Path) -> None:
    done = run_trainer("export", f"--model_dir={trained_run.folder.path}", f"--output={tmp_path}/x", "--formats=keras")
    assert done.returncode == 0, done.stderr
    card = (tmp_path / "x" / "README.md").read_text()
    for word in ("quickstart_nuclei", "CC0-1.0", "train 40", "| 24 | test | 15 |", "learning_rate: 0.01", "serving_default"):
        assert word in card
    assert not (tmp_path / "x" / "saved_model").exists()


def test_unknown_format_is_refused(trained_run: TrainedRun, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--formats=onnx: allowed: saved_model, keras"):
        export(trained_run, tmp_path / "x", ["onnx"])
    assert not (tmp_path / "x").exists()


def test_somebodys_files_are_not_written_among_and_an_export_is_replaced(trained_run: TrainedRun, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(UserError, match="is there and holds no export"):
        export(trained_run, tmp_path, ["keras"])
    assert (tmp_path / "README.md").read_text() == "mine"
    for _ in range(2):
        export(trained_run, tmp_path / "export", ["keras"])
        assert bytes_of(tmp_path / "export").keys() == {".trainer-export", "README.md", "keras/generator.keras"}
        (tmp_path / "export" / "keras" / "old.bin").write_bytes(b"of an older version")


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("form", [pytest.param("saved_model", marks=pytest.mark.slow), "keras"])
def test_a_full_disk_leaves_the_old_export_whole(form: str, trained_run: TrainedRun, exported: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 64 << 20) as disk:
        to = disk.path / "export"
        shutil.copytree(exported, to)
        before = bytes_of(to)
        disk.fill(left=64 << 10)
        done = run_trainer("export", f"--model_dir={trained_run.folder.path}", f"--output={to}", f"--formats={form}")
        assert done.returncode == 1
        assert done.stdout == ""
        assert re.fullmatch(r"trainer: .*No space left on device.*\n", done.stderr), done.stderr
        assert bytes_of(to) == before
        assert len(list(to.rglob("*"))) == len(list(exported.rglob("*"))), "no folder of the try is left"


def test_a_user_who_may_not_write_there_is_told_so(trained_run: TrainedRun) -> None:
    with folder_for_everybody() as folder:
        folder.chmod(0o555)
        arguments = ["export", f"--model_dir={trained_run.folder.path}", f"--output={folder}/export", "--formats=keras"]
        done = finish(start_program(TRAINER_AS_NOBODY, *arguments))
        assert list(folder.iterdir()) == []
    assert done.returncode == 2
    advice = rf"let user {ME}:\d+ read and write there, or choose another place"
    assert re.fullmatch(rf"trainer: {folder}/export: Permission denied; {advice}\n", done.stderr), done.stderr
