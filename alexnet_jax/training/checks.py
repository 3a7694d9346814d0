"""What is wrong with a config, as far as can be seen before the first step."""

from ml_collections import ConfigDict

from alexnet_jax import config as configs
from alexnet_jax.data import augment
from alexnet_jax.data.store import Store
from alexnet_jax.training import optimizer as optim
from alexnet_jax.training import sharding as parallel
from alexnet_jax.utils import distributed as hosts
from alexnet_jax.utils.errors import UserError


def check_config(config: ConfigDict, devices: int | None = None) -> None:
    """Raises UserError for what can be seen to be wrong before any data is touched.

    Args:
      devices: their number, by default of those that there are.
    """
    augment.check(config)
    parallel.check(config, devices)
    optim.make_schedule(config, steps_per_epoch=1.0)
    configs.check_bounds(config)


def check_labels(config: ConfigDict, stores: dict[str, Store]) -> None:
    """Raises UserError if there are more classes than the network has outputs, or if the hosts of a
    run have other data than each other.
    """
    fields = ("source", "num_examples", "mean_channel")
    hosts.check_same(
        "data",
        {f"{use} {name}": getattr(store, name) for use, store in stores.items() for name in fields},
    )
    classes = len(stores["train"].class_names)
    if classes > config.model.num_classes:
        raise UserError(
            f"{config.dataset} has {classes} classes, the network {config.model.num_classes}; "
            f"set --config.model.num_classes={classes}"
        )
