"""Pictures in formats of several libraries, neither square nor of one depth, are trained on and drawn by real processes.

That batches, scores and drawings are right is shown in data/test_end_to_end.py and test_inference.py.
"""

from pathlib import Path

import numpy as np
import pytest

from tests.helpers.images import as_kind, encode, label, photo
from tests.helpers.processes import run_trainer
from tests.helpers.settings import SMALL
from trainer.data import images
from trainer.data.prepare import Options, prepare

KINDS = {
    "16-bit grey from labels, not square": ((1, 8, "png"), (1, 16, "tiff"), (64, 96)),
    "colour from 4 channels, tall": ((4, 8, "tiff"), (3, 8, "webp"), (96, 48)),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_kind_is_prepared_trained_and_drawn(kind: str, tmp_path: Path) -> None:
    (in_channels, in_bits, in_format), (out_channels, out_bits, out_format), size = KINDS[kind]
    for split, count in (("train", 4), ("val", 1), ("test", 1)):
        for side in ("in", "out"):
            (tmp_path / side / split).mkdir(parents=True)
        for number in range(count):
            source = as_kind(label(number, *size), in_channels, in_bits)
            target = as_kind(photo(number, *size), out_channels, out_bits)
            (tmp_path / "in" / split / f"{number}.{in_format}").write_bytes(encode(source, in_format))
            (tmp_path / "out" / split / f"{number}.{out_format}").write_bytes(encode(target, out_format))
    sides = f"{tmp_path}/in,{tmp_path}/out"
    prepare(Options(sides, "folders", tmp_path / "data", labels="input"), 1)
    settings = (*SMALL, f"data.image_size=[{size[0]},{size[1]}]", "train.steps=3")
    run = f"--model_dir={tmp_path}/run"
    trained = run_trainer(f"--data_dir={tmp_path}/data", run, *(f"--set={setting}" for setting in settings))
    assert trained.returncode == 0, trained.stderr
    assert "test L1 " in trained.stdout
    assert (tmp_path / "run" / "samples" / "step-0000003.png").is_file()
    drawn = run_trainer("predict", run, f"--input={tmp_path}/in/test", f"--output={tmp_path}/drawn")
    assert drawn.returncode == 0, drawn.stderr
    encoded = (tmp_path / "drawn" / "0.png").read_bytes()
    picture = images.decode(encoded, images.inspect(encoded))
    assert picture.shape == (*size, out_channels)
    assert picture.dtype == (np.uint8 if out_bits == 8 else np.uint16)
    assert len(np.unique(picture)) > 50
