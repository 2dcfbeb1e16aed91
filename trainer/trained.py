"""A trained generator, opened from a run's folder without its data, its discriminator or its optimisers."""

from dataclasses import dataclass
from typing import Any, Literal

import keras
import tensorflow as tf

from trainer.cluster import VertexFolders
from trainer.config import Config
from trainer.data.pipeline import Specs
from trainer.data.records import ImageSpec
from trainer.data.split import plain
from trainer.errors import TrainerError, UserError
from trainer.model.generators import depth_for, unet
from trainer.runtime.bucket_checkpoints import checkpoints_in
from trainer.runtime.folders import open_folder
from trainer.runtime.ledger import Marker
from trainer.runtime.run_folder import RunFolder
from trainer.storage.places import Place
from trainer.storage.service import Patience

Inference = Literal["paper", "frozen"]


@dataclass(frozen=True)
class TrainedRun:
    """What is known of a run, and the checkpoint that was chosen.

    Attributes:
        folder: the run's folder.
        config: its config, with the inference mode that was asked for.
        about: data.json, what it was trained on.
        marker: the checkpoint.
    """

    folder: RunFolder
    config: Config
    about: dict[str, Any]
    marker: Marker

    @property
    def specs(self) -> Specs:
        """What the generator's input and output look like."""
        sides = [ImageSpec.model_validate(self.about[side]) for side in ("input", "target")]
        return Specs(*(sides if self.config.data.direction == "forward" else sides[::-1]))

    @property
    def multiple(self) -> int:
        """The sides of an image must be multiples of this."""
        return 1 << depth_for(*self.config.data.image_size)

    def generator(self, *, any_size: bool = True) -> keras.Model:
        """Build the generator and load its weights, or their moving average if the run kept one.

        Raises:
            UserError: the checkpoint is of another network.
            TrainerError: it cannot be read; a run that goes on may have removed it.
        """
        config, specs = self.config, self.specs
        channels = (specs.input.channels, specs.target.channels)
        network = unet(config.model, config.data.image_size, *channels, config.seed, any_size=any_size)
        which = "averaged" if config.train.ema_decay else "generator"
        where = self.folder.checkpoints / self.marker.prefix
        try:
            with checkpoints_in(self.folder.checkpoints, config.train.keep).reading(self.marker) as prefix:
                tf.train.Checkpoint(**{which: network}).read(prefix).assert_existing_objects_matched().expect_partial()
        except AssertionError as error:
            raise UserError(f"{where}: is not a checkpoint of this generator") from error
        except tf.errors.OpError as error:
            raise TrainerError(
                f"{where}: cannot be read, or is gone because training goes on: {plain(error)}; try again"
            ) from error
        return network


def open_run(
    model_dir: Place, checkpoint: str = "newest", inference: Inference | None = None, folders: VertexFolders | None = None
) -> TrainedRun:
    """Open a run's folder for use; training in it may go on meanwhile.

    Raises:
        UserError: there is no run, or no whole checkpoint in it.
    """
    folder = open_folder(model_dir, folders or VertexFolders())
    about = folder.read_data()
    config = folder.saved_config()
    if config is None:
        raise UserError(f"--model_dir={model_dir}: its config.yaml is gone")
    Patience.seconds = config.runtime.bucket_patience_seconds
    if inference:
        config = config.model_copy(update={"model": config.model.model_copy(update={"inference": inference})})
    marker = checkpoints_in(folder.checkpoints, config.train.keep).choose(checkpoint)
    return TrainedRun(folder, config, about, marker)
