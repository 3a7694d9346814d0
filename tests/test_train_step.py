"""The pure steps: what they compute, that any step can be replayed, on one device or many."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alexnet_jax.config import default_config
from alexnet_jax.data.augment import Statistics, make_augment
from alexnet_jax.models.alexnet import AlexNet
from alexnet_jax.models.build import build_model
from alexnet_jax.models.summary import layer_table
from alexnet_jax.training import sharding
from alexnet_jax.training.optimizer import make_optimizer
from alexnet_jax.training.sharding import make_parallel, to_host
from alexnet_jax.training.train_step import (
    accuracies,
    augment_batch,
    build_state,
    build_train_step,
    init_state,
    make_eval_step,
    make_train_step,
    top_five,
    train_key,
)
from alexnet_jax.utils.errors import UserError

STATS = Statistics(np.full((72, 72, 3), 100, np.float32), np.eye(3, dtype=np.float32) * 9)
NO_RANDOMNESS = {"flip": False, "color_noise": 0.0, "crop_size": 72}
BATCH_SIZE = 16


def make_config(variant="paper", randomness=False, **fields):
    """A narrow network of ten classes on 72×72 images."""
    c = default_config()
    c.image_size, c.augment.crop_size, c.batch_size = 72, 64, BATCH_SIZE
    c.augment.pixel_scale = 1 / 64
    c.model.variant, c.model.num_classes, c.model.width = variant, 10, 0.1
    c.model.init, c.model.hidden_bias = "he", 0.0
    if not randomness:
        c.model.dropout = 0.0
        c.augment.update(NO_RANDOMNESS)
    c.update_from_flattened_dict(fields)
    return c


def make_batch(seed=0, count=BATCH_SIZE):
    random = np.random.default_rng(seed)
    return {
        "image": random.integers(0, 256, (count, 72, 72, 3), np.uint8),
        "label": random.integers(0, 10, count).astype(np.int32),
    }


class Program:
    """The steps of a config, compiled for all devices, and the initial state."""

    def __init__(self, config, kind):
        self.parallel = make_parallel(kind, config.hybrid_group)
        options = self.parallel.model_options(config.optimizer.gradient_dtype)
        self.model = build_model(config, **options)
        self.augment = make_augment(config, STATS)
        tx = make_optimizer(config, steps_per_epoch=10.0)

        def init():
            return build_state(config, self.model, tx)

        self.shapes = jax.eval_shape(init)
        shardings = self.parallel.state_shardings(self.shapes)
        self.state = jax.jit(init, out_shardings=shardings)()
        step = build_train_step(config, self.model, tx, self.augment)
        self.train_step = self.parallel.compile_train_step(step, self.shapes)
        eval_step = make_eval_step(self.model, self.augment)
        self.eval_step = self.parallel.compile_eval_step(eval_step, self.shapes)

    def put(self, batch):
        return self.parallel.put_batch(batch, len(batch["label"]))

    def train(self, batches):
        """Returns the final state and the metrics of each step, on the host."""
        state, history = self.state, []
        for batch in batches:
            state, metrics = self.train_step(state, self.put(batch))
            history.append({name: float(value) for name, value in metrics.items()})
        return to_host(state), history


def assert_close(tree, other, tolerance):
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * float(np.abs(b).max()))


# Batches for which rounding, which depends on the number of devices, switches no ReLU.
BATCHES = [make_batch(seed) for seed in (20, 21)]
MULTI_DEVICE_KINDS = ("pmap", "mesh.data", "mesh.zero", "mesh.hybrid")


@functools.cache
def train_on_one_device(variant):
    return Program(make_config(variant, randomness=True), "jit").train(BATCHES)


@pytest.mark.parametrize(
    ("variant", "kind"),
    [
        *(("paper", kind) for kind in MULTI_DEVICE_KINDS),
        ("bn", "mesh.data"),
        ("bn", "pmap"),
        pytest.param("bn", "mesh.zero", marks=pytest.mark.long),
        pytest.param("owt", "mesh.hybrid", marks=pytest.mark.long),
    ],
)
def test_every_kind_on_eight_devices_equals_one_device(variant, kind):
    """With dropout and augmentation, whose draws depend on an image's index in the batch only."""
    assert jax.device_count() == 8
    one, metrics_one = train_on_one_device(variant)
    config = make_config(variant, randomness=True, hybrid_group=4)
    several, metrics = Program(config, kind).train(BATCHES)
    assert_close(several.params, one.params, 2e-4)
    assert_close(several.opt_state, one.opt_state, 2e-3)
    assert_close(several.batch_stats, one.batch_stats, 2e-4)
    for a, b in zip(metrics, metrics_one, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.long
def test_norms_are_those_of_whole_arrays_where_kernels_are_sharded():
    """LARS computes a norm of each kernel, clipping one of all gradients."""
    fields = {"optimizer.kind": "lars", "optimizer.clip_norm": 0.5}
    one, metrics_one = Program(make_config(**fields), "jit").train(BATCHES)
    several, metrics = Program(make_config(**fields), "mesh.hybrid").train(BATCHES)
    assert_close(several.params, one.params, 2e-4)
    assert "grad_norm" in metrics[0]
    assert metrics[0] == pytest.approx(metrics_one[0], rel=1e-4)


def bytes_on_one_device(tree):
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("kind", ["mesh.zero", "mesh.hybrid"])
def test_initial_state_is_the_same_whether_sharded_or_not(kind):
    sharded = Program(make_config(hybrid_group=4), kind).state
    whole = Program(make_config(), "jit").state
    for a, b in zip(jax.tree.leaves(sharded), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(a, b)


def test_zero_keeps_an_eighth_of_parameters_and_velocity_on_each_device(monkeypatch):
    monkeypatch.setattr(sharding, "MIN_SHARDED", 1000)  # this network is narrow
    program = Program(make_config(), "mesh.zero")
    after, _ = program.train_step(program.state, program.put(BATCHES[0]))
    for tree, shapes in (
        (after.params, program.shapes.params),
        (after.opt_state, program.shapes.opt_state),
    ):
        whole = sum(4 * leaf.size for leaf in jax.tree.leaves(shapes))
        assert bytes_on_one_device(tree) < whole / 6


def test_hybrid_splits_the_fc_kernels_over_a_group_and_nothing_else():
    state = Program(make_config(hybrid_group=4), "mesh.hybrid").state
    for tree in (state.params, state.opt_state[-1].trace):
        for layer, arrays in tree.items():
            for name, array in arrays.items():
                shard = array.addressable_shards[0].data.shape
                parts = 4 if layer.startswith("fc") and name == "kernel" else 1
                assert shard == (array.shape[0] // parts, *array.shape[1:]), (layer, name)


def test_pmap_sends_gradients_in_gradient_dtype():
    """bfloat16 has three digits; the rounding must show in the update, and nothing larger."""
    exact, _ = Program(make_config(randomness=True), "pmap").train(BATCHES[:1])
    config = make_config(randomness=True, **{"optimizer.gradient_dtype": "bfloat16"})
    rounded, _ = Program(config, "pmap").train(BATCHES[:1])
    assert_close(rounded.opt_state, exact.opt_state, 2e-2)
    for a, b in zip(*map(jax.tree.leaves, (rounded.params, exact.params)), strict=True):
        assert a.dtype == np.float32
        assert not np.array_equal(a, b)


def test_random_draws_differ_between_images_devices_and_steps():
    same = np.repeat(make_batch(count=1)["image"], 8, axis=0)
    augment = make_augment(make_config(randomness=True), STATS)

    def augment_part(batch, step):
        key = jax.random.fold_in(train_key(0), step)
        return augment_batch(augment, key, batch, step, "devices")["image"]

    on_devices = jax.pmap(augment_part, "devices", in_axes=(0, None))
    batch = {"image": same.reshape(8, 1, 72, 72, 3), "label": np.zeros((8, 1), np.int32)}
    seen = [np.asarray(on_devices(batch, step)) for step in (0, 1)]
    crops = np.concatenate([s.reshape(8, -1) for s in seen])
    assert len(np.unique(crops, axis=0)) == 16


def test_a_step_can_be_replayed_bitwise_from_state_and_batch():
    states = []
    for _ in range(2):
        program = Program(make_config(randomness=True), "jit")
        step = jax.device_put(jnp.int32(7), program.state.step.sharding)
        state = program.state.replace(step=step)
        states.append(program.train_step(state, program.put(make_batch()))[0])
    for a, b in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", ["jit", "mesh.hybrid"])
def test_accumulated_gradients_equal_those_of_the_whole_batch(kind):
    batches = [make_batch(seed) for seed in range(2)]
    whole, metrics = Program(make_config(), "jit").train(batches)
    config = make_config(**{"optimizer.accumulate_steps": 2})
    parts, part_metrics = Program(config, kind).train(batches)
    assert_close(parts.params, whole.params, 1e-4)
    assert part_metrics[1] == pytest.approx(metrics[1], rel=1e-4)


def test_train_metrics_are_loss_and_accuracies_of_the_batch_before_the_update():
    program = Program(make_config(), "jit")
    batch = make_batch()
    images = program.augment.center(batch["image"])
    params = to_host(program.state.params)
    logits = np.asarray(jax.jit(program.model.apply)({"params": params}, images), np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    rank = (logits > np.take_along_axis(logits, batch["label"][:, None], 1)).sum(1)
    _, metrics = program.train_step(program.state, program.put(batch))
    want = -log_probs[range(BATCH_SIZE), batch["label"]].mean()
    assert float(metrics["loss"]) == pytest.approx(want, rel=1e-5)
    assert float(metrics["top1"]) == (rank == 0).mean()
    assert float(metrics["top5"]) == (rank < 5).mean()


@pytest.mark.parametrize("kind", ["jit", "pmap", "mesh.hybrid"])
def test_evaluation_counts_each_example_once_and_no_padding(kind):
    program = Program(make_config(), kind)

    def evaluate(padding):
        batch = make_batch()
        batch["label"][padding] = -1
        return jax.device_get(program.eval_step(program.state, program.put(batch)))

    whole, first, rest = evaluate(slice(0)), evaluate(slice(10, None)), evaluate(slice(10))
    assert float(first["count"]) == 10
    assert float(whole["count"]) == 16
    for key in whole:
        assert float(first[key] + rest[key]) == pytest.approx(float(whole[key]), rel=1e-5)


def test_ten_views_average_the_softmax_and_take_the_loss_of_the_average():
    program = Program(make_config(randomness=True, **{"eval.views": "ten"}), "jit")
    batch = make_batch()
    apply = jax.jit(program.model.apply)
    views = [program.augment.view(batch["image"], place) for place in program.augment.views]
    params = program.state.params
    probs = np.mean([jax.nn.softmax(apply({"params": params}, v)) for v in views], axis=0)
    sums = program.eval_step(program.state, program.put(batch))
    of_label = probs[range(BATCH_SIZE), batch["label"]]
    assert float(sums["loss"]) == pytest.approx(-np.log(of_label).sum(), rel=1e-4)
    assert float(sums["top1"]) == (probs.argmax(1) == batch["label"]).sum()


def test_with_fewer_than_five_classes_every_label_is_in_the_top_five():
    found = accuracies(jnp.eye(3), jnp.array([0, 1, 1]))
    np.testing.assert_array_equal(found["top1"], [1, 1, 0])
    np.testing.assert_array_equal(found["top5"], 1)


@pytest.mark.parametrize("values", [[0.0, 1.0, 2.0], [0.0, np.nan, -np.inf, np.inf]], ids=str)
def test_accuracies_are_those_of_sorting_the_scores(values):
    """Also where scores are equal or infinite. NaN is never right."""
    random = np.random.default_rng(0)
    scores = random.choice(np.float32(values), (500, 8))
    labels = random.integers(0, 8, 500)
    found = accuracies(scores, labels)
    best = np.asarray(jax.lax.top_k(scores, 5)[1])
    is_number = ~np.isnan(scores[range(500), labels])
    np.testing.assert_array_equal(found["top1"], (best[:, 0] == labels) & is_number)
    np.testing.assert_array_equal(found["top5"], (best == labels[:, None]).any(1) & is_number)


@pytest.mark.parametrize("classes", [3, 8])
def test_top_five_are_the_best_classes_in_falling_order(classes):
    scores = np.random.default_rng(0).permutation(2 * classes).reshape(2, classes) * 1.0
    order = np.argsort(-scores)[:, :5]
    found, found_classes = top_five(jnp.asarray(scores))
    np.testing.assert_array_equal(found_classes, order)
    np.testing.assert_array_equal(found, np.take_along_axis(scores, order, axis=1))


def test_training_memorizes_one_batch():
    state, history = Program(make_config(), "jit").train([make_batch()] * 120)
    assert history[0]["loss"] > 2
    assert history[-1]["loss"] < 0.05
    assert history[-1]["top1"] == 1
    assert int(state.step) == 120


def test_any_optax_transformation_can_train():
    """One that takes neither `step` nor `plateau_scale`."""
    config = make_config()
    model, augment, tx = build_model(config), make_augment(config, STATS), optax.adam(1e-3)
    train_step = jax.jit(make_train_step(model, tx, augment))
    state = init_state(model, tx, 0, (72, 72, 3))
    losses = []
    for _ in range(12):
        state, metrics = train_step(state, make_batch())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.8 * losses[0]


def test_bfloat16_keeps_float32_parameters_and_velocity():
    config = make_config()
    config.model.dtype = "bfloat16"
    model, tx = build_model(config), make_optimizer(config, 10.0)
    train_step = make_train_step(model, tx, make_augment(config, STATS))
    state, metrics = jax.eval_shape(
        lambda batch: train_step(init_state(model, tx, 0, (72, 72, 3)), batch), make_batch()
    )
    floats = jax.tree.leaves((state.params, state.opt_state, metrics))
    assert {x.dtype for x in floats} == {jnp.dtype("float32")}


def test_update_is_the_papers():
    """One step against v ← −ε (∇ + 0.0005 w), with the gradient taken outside the step."""
    program = Program(make_config(**{"model.dropout": 0.5}), "jit")
    key = jax.random.fold_in(jax.random.fold_in(program.state.key, 0), 1)  # step 0, dropout
    before = to_host(program.state.params)
    batch = make_batch()
    images = program.augment.center(batch["image"])

    def loss(params):
        logits = program.model.apply({"params": params}, images, True, rngs={"dropout": key})
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    grads = jax.jit(jax.grad(loss))(before)
    after, _ = program.train_step(program.state, program.put(batch))
    for layer, w in before.items():
        expected = w["kernel"] - 0.01 * (grads[layer]["kernel"] + 5e-4 * w["kernel"])
        np.testing.assert_allclose(after.params[layer]["kernel"], expected, rtol=1e-4, atol=1e-7)
        expected = w["bias"] - 0.01 * grads[layer]["bias"]
        np.testing.assert_allclose(after.params[layer]["bias"], expected, rtol=1e-4, atol=1e-7)


def test_frozen_layers_stay_and_their_batch_norm_keeps_its_statistics():
    config = make_config("bn", freeze=("conv1", "conv2"))
    program = Program(config, "jit")
    before = to_host(program.state)
    after, _ = program.train([make_batch()])
    changed = {
        name
        for name in before.params
        for a, b in zip(*(jax.tree.leaves(s.params[name]) for s in (before, after)), strict=True)
        if not np.array_equal(a, b)
    }
    assert changed == set(before.params) - {"conv1", "bn1", "conv2", "bn2"}
    for name in ("bn1", "bn2"):
        np.testing.assert_array_equal(after.batch_stats[name]["mean"], 0)
    assert np.abs(after.batch_stats["bn3"]["mean"]).max() > 0


# What does not fit

BAD_KINDS = [
    (("gpu",), "auto, jit, pmap, mesh.data, mesh.zero, mesh.hybrid"),
    (("mesh.hybrid", 3), "8 devices do not divide into groups of hybrid_group=3"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_KINDS)
def test_a_kind_that_does_not_fit_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        make_parallel(*arguments)


def test_an_unknown_gradient_dtype_is_refused():
    with pytest.raises(UserError, match="'float16'.*float32, bfloat16"):
        make_parallel("mesh.data").model_options("float16")


TO_24 = "not divisible by 8 device.*use 6 device.*or start a new run with .*batch_size=24"
BAD_BATCHES = [
    (18, 1, "pmap", TO_24),
    (18, 1, "mesh.data", TO_24),
    (24, 2, "mesh.data", "2 accumulation.*set --config.optimizer.accumulate_steps=1"),
    (24, 5, "mesh.data", "set --config.optimizer.accumulate_steps=3"),
    (16, 3, "jit", "set --config.optimizer.accumulate_steps=2"),
    (0, 1, "jit", "at least 1"),
]


@pytest.mark.parametrize(("batch_size", "parts", "kind", "message"), BAD_BATCHES)
def test_a_batch_that_does_not_divide_is_refused(batch_size, parts, kind, message):
    with pytest.raises(UserError, match=message):
        sharding.check_batch_size(batch_size, parts, make_parallel(kind))


def test_auto_shards_the_batch_if_there_are_several_devices():
    assert make_parallel("auto").kind == "mesh.data"
    assert make_parallel("auto", devices=jax.devices()[:1]).kind == "jit"


def test_fc_layers_that_a_group_cannot_split_evenly_are_named():
    parallel = make_parallel("mesh.hybrid", 5, jax.devices()[:5])
    rows = layer_table(AlexNet(num_classes=10, width=0.1), (64, 64, 3))
    with pytest.raises(UserError, match="24 values of pool5 .* groups of 5.*hybrid_group"):
        sharding.check_layers(rows, parallel)
