"""Accuracy of trained networks and of ensembles on the eval split of their data."""

import collections
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int32
from tqdm import tqdm

from alexnet_jax import inference
from alexnet_jax.data import pipeline
from alexnet_jax.data.store import Store
from alexnet_jax.inference import Trained
from alexnet_jax.training.train_step import mean_softmax, top_five
from alexnet_jax.utils.errors import UserError

# Batches whose results are not fetched yet: the devices compute while the host counts.
BATCHES_IN_FLIGHT = 3


class ClassificationMetrics:
    """Accumulates the accuracy, loss and confusion matrix of one network or ensemble.

    Attributes:
      confusion: int64[C, C], number of examples by label (row) and predicted class (column).
      in_top5: int64[C], number of examples by label whose label is among the top five.
      log_likelihood: sum of the labels' log-probabilities, in nats.
    """

    def __init__(self, num_classes: int):
        self.confusion = np.zeros((num_classes, num_classes), np.int64)
        self.in_top5 = np.zeros(num_classes, np.int64)
        self.log_likelihood = 0.0

    def update(
        self,
        top5: Int32[np.ndarray, "B 5"],
        log_probs: Float32[np.ndarray, " B"],
        labels: Int32[np.ndarray, " B"],
    ) -> None:
        """Adds a batch.

        Args:
          top5: the five most probable classes, most probable first.
          log_probs: log-probabilities of the labels.
        """
        np.add.at(self.confusion, (labels, top5[:, 0]), 1)
        np.add.at(self.in_top5, labels, (top5 == labels[:, None]).any(axis=1))
        self.log_likelihood += float(log_probs.sum(dtype=np.float64))

    def summary(self) -> dict[str, float]:
        """Returns `count`, `top1` and `top5` (0 to 1), and `loss` (mean of -log p, in nats)."""
        count = int(self.confusion.sum())
        return {
            "count": count,
            "top1": float(self.confusion.trace() / count),
            "top5": float(self.in_top5.sum() / count),
            "loss": -self.log_likelihood / count,
        }

    def per_class(self, class_names: Sequence[str]) -> list[dict[str, Any]]:
        """Returns one row for each class that has examples.

        A row has `class` (its name), `count`, `top1`, `top5` and `taken_for`: the wrong class that
        was predicted most often, or "" if there was none.
        """
        rows = []
        for label, (name, predicted) in enumerate(zip(class_names, self.confusion, strict=True)):
            count = int(predicted.sum())
            if not count:
                continue
            wrong = predicted.copy()
            wrong[label] = 0
            taken_for = class_names[int(wrong.argmax())] if wrong.any() else ""
            rows.append(
                {
                    "class": name,
                    "count": count,
                    "top1": float(predicted[label] / count),
                    "top5": float(self.in_top5[label] / count),
                    "taken_for": taken_for,
                }
            )
        return rows


class Ensemble(NamedTuple):
    """One row of the results: networks whose softmax is averaged, or a single network.

    Attributes:
      views: "center" or "ten".
      members: indices into the list of networks.
    """

    name: str
    views: str
    members: tuple[int, ...]


def all_ensembles(workdirs: Sequence[Path], views: Sequence[str]) -> list[Ensemble]:
    """Returns each network and, if there are several, their average, for each kind of views."""
    rows: list[tuple[str, tuple[int, ...]]] = [
        (str(workdir), (index,)) for index, workdir in enumerate(workdirs)
    ]
    if len(workdirs) > 1:
        rows.append((f"average of {len(workdirs)}", tuple(range(len(workdirs)))))
    return [Ensemble(name, view, members) for view in views for name, members in rows]


def evaluate(
    networks: Sequence[Trained], store: Store, batch_size: int, ensembles: Sequence[Ensemble]
) -> list[ClassificationMetrics]:
    """Evaluates every ensemble on every example of a store, on all devices of this process.

    Networks are averaged by their softmax, as in section 6 of the paper. Each network computes
    each kind of views once, however many ensembles it belongs to.
    """
    metrics = [ClassificationMetrics(networks[0].config.model.num_classes) for _ in ensembles]
    predict = inference.on_all_devices(
        functools.partial(_predict, networks, ensembles),
        [network.variables for network in networks],
    )
    pending: collections.deque[tuple[np.ndarray, Any]] = collections.deque()

    def count_oldest() -> None:
        labels, predictions = pending.popleft()
        real = labels >= 0  # the others are padding of the last batch
        for own, (top5, log_probs) in zip(metrics, predictions, strict=True):
            own.update(np.asarray(top5)[real], np.asarray(log_probs)[real], labels[real])

    batches = tqdm(
        pipeline.eval_batches(store, batch_size),
        desc="evaluating",
        total=-(-store.num_examples // batch_size),
        unit="batch",
        disable=None,  # unless stderr is a terminal
        leave=False,
    )
    for batch in batches:
        pending.append((batch["label"], predict(batch["image"], batch["label"])))
        if len(pending) > BATCHES_IN_FLIGHT:
            count_oldest()
    while pending:
        count_oldest()
    return metrics


def _predict(
    networks: Sequence[Trained],
    ensembles: Sequence[Ensemble],
    variables: Sequence[dict[str, Any]],
    images: jax.Array,
    labels: jax.Array,
) -> list[tuple[Int32[jax.Array, "B 5"], Float32[jax.Array, " B"]]]:
    """Returns each ensemble's top five classes and its log-probabilities of the labels."""
    log_probs = {
        (index, views): inference.log_probs(networks[index], views, variables[index], images)
        for _, views, members in ensembles
        for index in members
    }
    predictions = []
    for _, views, members in ensembles:
        mean = mean_softmax(jnp.stack([log_probs[index, views] for index in members]))
        _, top5 = top_five(mean)
        own = jnp.take_along_axis(mean, jnp.maximum(labels, 0)[:, None], axis=1)[:, 0]
        predictions.append((top5, own))
    return predictions


def check_comparable(workdirs: Sequence[Path], networks: Sequence[Trained], store: Store) -> None:
    """Raises UserError if a network's classes or stored image size are not those of the data."""
    for workdir, network in zip(workdirs, networks, strict=True):
        num_classes = network.config.model.num_classes
        expected = networks[0].config.model.num_classes
        if num_classes != expected or num_classes < len(store.class_names):
            raise UserError(
                f"{workdir} has {num_classes} classes, {workdirs[0]} has {expected} and the data "
                f"has {len(store.class_names)}; evaluate networks with the same classes together"
            )
        if network.config.preprocess != networks[0].config.preprocess:
            raise UserError(
                f"{workdir} has preprocess={network.config.preprocess}, {workdirs[0]} has "
                f"{networks[0].config.preprocess}; pass --preprocess to give both the same images, "
                "or evaluate them separately"
            )
        if network.config.image_size != store.image_size:
            raise UserError(
                f"{workdir} takes images stored at {network.config.image_size} pixels, but the "
                f"data of {workdirs[0]} is stored at {store.image_size} pixels; evaluate them "
                "separately"
            )
        names = network.class_names[: len(store.class_names)]
        if names != tuple(store.class_names) and names[0] != inference.unnamed(0):
            raise UserError(
                f"{workdir} was trained on the classes {', '.join(names[:3])}, …, but the data has "
                f"{', '.join(store.class_names[:3])}, …; evaluate it on data with its own classes"
            )
