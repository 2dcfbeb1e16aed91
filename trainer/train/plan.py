"""What a run would do, told without doing it: config, networks, data, steps, sizes."""

from collections.abc import Iterator

import keras
import yaml

from trainer.config import Config, to_tree
from trainer.data.pipeline import PairData
from trainer.data.sample import prepared_folder
from trainer.model.discriminators import patch_convolutions, receptive_field
from trainer.runtime import files
from trainer.runtime import strategy as devices
from trainer.runtime.bucket_checkpoints import checkpoints_in
from trainer.runtime.folders import open_folder
from trainer.runtime.run_folder import RunFolder
from trainer.train.begin import Order, Preparation
from trainer.train.state import build_networks

BYTES_PER_FLOAT = 4
SAFETY = 2  # a disk that is shared is not always as fast
STEP_SECONDS = 2.0  # the step that is under way is finished first
ADAM_COPIES = 3  # a weight and its two moments


def layer_table(network: keras.Model) -> Iterator[str]:
    """One line for each layer with weights: name, output size, parameters."""
    for layer in network.layers:
        if layer.count_params():
            size = "x".join(str(side) for side in layer.output.shape[1:])
            yield f"  {layer.name:32} {size:>14} {layer.count_params():>12,}"


def trainable_parameters(network: keras.Model) -> int:
    """Weights that the optimiser changes; the moving statistics are not among them."""
    return sum(int(variable.shape.num_elements()) for variable in network.trainable_variables)


def describe_network(title: str, network: keras.Model, remark: str) -> Iterator[str]:
    """Heading, layers and the sum."""
    yield f"{title}: {trainable_parameters(network):,} parameters, {remark}"
    yield f"  {'layer':32} {'output':>14} {'parameters':>12}"
    yield from layer_table(network)
    yield ""


def checkpoint_megabytes(*networks: keras.Model) -> float:
    """Size of a checkpoint: weights, their two Adam moments, and the moving statistics, in MB (10^6 bytes)."""
    trained = sum(trainable_parameters(network) for network in networks)
    total = sum(network.count_params() for network in networks)
    floats: int = trained * ADAM_COPIES + total - trained
    return floats * BYTES_PER_FLOAT / 1e6


def describe_data(config: Config, data: PairData) -> Iterator[str]:
    """Counts and kinds of the pairs."""
    manifest = data.manifest
    yield f"data: {manifest.name} ({'the packaged sample' if not config.data.dir else data.folder}), {manifest.licence}"
    for split, shards in manifest.splits.items():
        megabytes = sum(shard.bytes for shard in shards) / 1e6
        yield f"  {split:6} {manifest.examples(split):>9,} pairs, {megabytes:.1f} MB, shards: {len(shards)}"
    for side, spec in (("input", data.specs.input), ("target", data.specs.target)):
        yield f"  {side:6} {spec.kind}, {spec.channels} channels, {spec.bit_depth} bits"
    yield ""


def describe_plan(config: Config, data: PairData, megabytes: float) -> Iterator[str]:
    """Steps, epochs, and what is kept."""
    train = config.train
    epochs = train.steps / data.steps_per_epoch
    yield f"plan: {train.steps:,} steps of batch size {train.batch_size}"
    yield f"  {epochs:,.1f} epochs of {data.steps_per_epoch:,} steps"
    yield f"  checkpoint every {train.checkpoint_every:,} steps, {megabytes:,.0f} MB each"
    yield f"  {train.keep} newest and the best kept: up to {megabytes * (train.keep + 2):,.0f} MB while one is written"
    yield f"  evaluation every {train.evaluate_every:,}, pictures every {train.sample_every:,} steps"
    yield f"  scalars every {train.summary_every:,} steps"


def describe(config: Config, data: PairData) -> str:
    """The whole report of --dry_run."""
    generator, discriminator = build_networks(config, data.specs)
    patch = config.model.discriminator
    field = receptive_field(patch_convolutions(patch.receptive_field, patch.filters))
    logits = "x".join(str(side) for side in discriminator.output_shape[1:3])
    lines = [
        yaml.safe_dump(to_tree(config), sort_keys=False),
        *describe_network("generator", generator, "every output pixel sees the whole image through the bottleneck"),
        *describe_network("discriminator", discriminator, f"receptive field {field}x{field}, {logits} logits"),
        *describe_data(config, data),
        *describe_plan(config, data, checkpoint_megabytes(generator, discriminator)),
    ]
    return "\n".join(lines)


def describe_stop(order: Order, config: Config, data: PairData) -> str:
    """Whether a stop has the time to save: the size of a checkpoint, the speed of the disk, the grace period."""
    megabytes, speed = checkpoint_megabytes(*build_networks(config, data.specs)), files.write_speed(order.model_dir)
    seconds, grace = megabytes / speed, order.container.grace_seconds
    saved = f"  a stop saves {megabytes:,.0f} MB: about {seconds:.1f} s at the {speed:,.0f} MB/s measured here"
    if grace is None:
        return saved + "; docker stop leaves 10 s, Kubernetes 30 s, unless they are told otherwise"
    fits = "fits" if SAFETY * seconds + STEP_SECONDS < grace else "is too short"
    return saved + f"; the grace period of {grace} s (TRAINER_GRACE_SECONDS) {fits}"


def describe_run(folder: RunFolder, config: Config) -> str:
    """Where the run would go, and what is there already."""
    markers = checkpoints_in(folder.checkpoints, config.train.keep).markers()
    state = f"a run is there at step {markers[-1].step:,}; it would go on" if markers else "no run is there yet"
    return f"  into {folder.path}: {state}"


def describe_devices(order: Order) -> tuple[Config, str]:
    """The config, its batch size adapted if that is nobody's wish, and who would share the batch.

    Raises:
        UserError: the strategy or the batch size does not fit the devices.
    """
    have = devices.configure_devices(order.config.runtime)
    choice = devices.choose(order.wanted, order.cluster, have)
    if choice.name == "tpu":
        return order.config, f"  strategy tpu ({choice.why}); its cores are counted when the run starts"
    replicas = devices.count_replicas(choice, order.cluster, have)
    config = Preparation(order, replicas, 0).adapted()
    each = config.train.batch_size // replicas
    return config, f"  strategy {choice.name} ({choice.why}): replicas: {replicas}, pairs for each: {each}"


def dry_run(order: Order) -> str:
    """The report for what is ordered; nothing is left on disk.

    Raises:
        DataError: the data set is missing or wrong.
        UserError: the strategy or the batch size does not fit the devices.
    """
    config, shared = describe_devices(order)
    with prepared_folder(config.data.dir) as folder:
        data = PairData(folder, config).check_training()
        lines = [describe(config, data), shared, describe_stop(order, config, data)]
        return "\n".join([*lines, describe_run(open_folder(order.model_dir, order.cluster.folders, writes=False), config)])
