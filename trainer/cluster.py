"""The environment -> what the process may run on. The one place that reads the environment, and it is handed the mapping."""

import importlib.util
from collections.abc import Mapping

from trainer.errors import UserError

LEGACY_KERAS = "TF_USE_LEGACY_KERAS"


def check_environment(environment: Mapping[str, str]) -> None:
    """Refuse an environment in which training cannot work, before TensorFlow is loaded.

    Raises:
        UserError: TensorFlow is not installed, or Keras 2 is asked for.
    """
    if environment.get(LEGACY_KERAS, "0").lower() not in ("", "0", "false"):
        raise UserError(f"{LEGACY_KERAS}={environment[LEGACY_KERAS]}: this trainer is written for Keras 3; unset the variable")
    backend = environment.get("KERAS_BACKEND", "tensorflow")
    if backend != "tensorflow":
        raise UserError(f"KERAS_BACKEND={backend}: this trainer is written for TensorFlow; unset the variable")
    if importlib.util.find_spec("tensorflow") is None:
        raise UserError(
            "TensorFlow is not installed: pip install 'pix2pix-trainer[cpu]' for a machine without accelerator, "
            "[gpu] for NVIDIA GPUs, [tpu] for TPUs"
        )
