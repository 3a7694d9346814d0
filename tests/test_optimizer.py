"""The paper's update, other optimizers, frozen layers, and schedules."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alexnet_jax import config as configs
from alexnet_jax.config import default_config
from alexnet_jax.data.augment import make_augment
from alexnet_jax.models.alexnet import AlexNet, Conv, Dense, MaxPool, ReLU, kernel_layers
from alexnet_jax.training.optimizer import (
    OPTIMIZERS,
    layer_of,
    make_optimizer,
    make_plateau,
    make_schedule,
    without_frozen,
)
from alexnet_jax.training.train_step import init_state, make_train_step
from alexnet_jax.utils.errors import UserError

STEPS_PER_EPOCH = 10.0
LAYERS = kernel_layers("paper")
ONE = jnp.float32(1.0)


def full(value=1.0):
    """A kernel and a bias for each layer of AlexNet, all of one value."""
    return {layer: {"kernel": jnp.full(2, value), "bias": jnp.full(1, value)} for layer in LAYERS}


def random_tree(rng):
    """Arrays like those of three layers, one with batch norm."""
    shapes = {
        "conv1": {"kernel": (3, 3, 2, 4)},
        "bn1": {"scale": 4, "bias": 4},
        "conv2": {"kernel": (3, 3, 4, 2), "bias": 2},
        "fc8": {"kernel": (8, 5), "bias": 5},
    }
    return {
        layer: {name: jnp.float32(rng.normal(size=shape)) for name, shape in arrays.items()}
        for layer, arrays in shapes.items()
    }


def at(epoch):
    return jnp.int32(round(epoch * STEPS_PER_EPOCH))


def one_update(tx, grads, state, params, epoch=0.0, plateau_scale=ONE):
    return tx.update(grads, state, params, step=at(epoch), plateau_scale=plateau_scale)


def train(config, gradients, start=1.0, epoch=0.0):
    """Yields params and optimizer state after each gradient. All arrays start at one value."""
    params, tx = full(start), make_optimizer(config, STEPS_PER_EPOCH)
    state = tx.init(params)
    for gradient in gradients:
        updates, state = one_update(tx, full(gradient), state, params, epoch)
        params = optax.apply_updates(params, updates)
        yield params, state


def learning_rate(config, epoch, layer="all", kernel=True, plateau_scale=1.0):
    rate = make_schedule(config, STEPS_PER_EPOCH)
    return float(rate(layer, kernel, at(epoch), jnp.float32(plateau_scale)))


# ------------------------------------------------------------------------------------------
# The paper's update
# ------------------------------------------------------------------------------------------


def test_update_is_the_formula_of_the_paper_in_float64():
    """v ← 0.9 v − 0.0005 ε w − ε ∇;  w ← w + v (§5). ε drops on the way; biases do not decay."""
    c = default_config()
    c.schedule.kind, c.schedule.step_epochs = "steps", (0.5,)
    c.optimizer.bias_learning_rate = 2.0
    rng = np.random.default_rng(0)
    params, tx = random_tree(rng), make_optimizer(c, STEPS_PER_EPOCH)
    state = tx.init(params)
    flat = [(path[-1].key, np.float64(x)) for path, x in jax.tree.leaves_with_path(params)]
    expected = [[name == "kernel", w, np.zeros_like(w)] for name, w in flat]
    for step in range(12):
        grads = random_tree(rng)
        updates, state = one_update(tx, grads, state, params, step / STEPS_PER_EPOCH)
        params = optax.apply_updates(params, updates)
        rate = 0.01 if step < 5 else 0.001
        for array, grad in zip(expected, jax.tree.leaves(grads), strict=True):
            is_kernel, w, v = array
            epsilon, decay = (rate, 0.0005) if is_kernel else (2 * rate, 0.0)
            v = 0.9 * v - decay * epsilon * w - epsilon * np.float64(grad)
            array[1:] = w + v, v
    for (_, w, v), x, velocity in zip(
        expected,
        jax.tree.leaves(params),
        jax.tree.leaves(optax.tree.get(state, "trace")),
        strict=True,
    ):
        np.testing.assert_allclose(x, w, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(velocity, v, rtol=1e-5, atol=1e-7)


def test_two_steps_by_hand():
    (first, _), (second, _) = train(default_config(), [0.5, 0.5])
    assert first["conv1"]["kernel"][0] == pytest.approx(0.994995, abs=1e-7)
    # v = 0.9 · −0.005005 − 0.01 · 0.5 − 0.0005 · 0.01 · 0.994995 = −0.0095094750
    assert second["conv1"]["kernel"][0] == pytest.approx(0.994995 - 0.009509475, abs=1e-7)


def test_velocity_contains_the_learning_rate_so_that_a_drop_takes_effect_slowly():
    """w moves by 0.9 of its last step even if ε is now almost 0 (paper §5)."""
    c = default_config()
    c.optimizer.weight_decay = 0.0
    c.schedule.changes = ((1.0, "all", "learning_rate", 1e-12),)
    tx, w = make_optimizer(c, STEPS_PER_EPOCH), full()
    first, state = one_update(tx, full(), tx.init(w), w, epoch=0)
    second, _ = one_update(tx, full(), state, w, epoch=1)
    np.testing.assert_allclose(second["fc6"]["kernel"], 0.9 * first["fc6"]["kernel"], rtol=1e-6)


def test_plateau_scale_multiplies_the_learning_rates():
    tx, w = make_optimizer(default_config(), STEPS_PER_EPOCH), full()
    whole, _ = one_update(tx, full(0.5), tx.init(w), w)
    tenth, _ = one_update(tx, full(0.5), tx.init(w), w, plateau_scale=jnp.float32(0.1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 0.1 * b, rtol=1e-6), tenth, whole)


def test_biases_have_their_own_learning_rate_and_weight_decay():
    c = default_config()
    c.optimizer.bias_learning_rate = 2.0
    c.optimizer.bias_weight_decay = 0.1
    ((after, _),) = train(c, [0.5])
    assert after["fc7"]["bias"][0] == pytest.approx(1 - 0.02 * (0.5 + 0.1 * 1.0), abs=1e-7)
    assert after["fc7"]["kernel"][0] == pytest.approx(1 - 0.01 * (0.5 + 0.0005), abs=1e-7)


def test_layers_can_have_a_weight_decay_of_their_own():
    c = default_config()
    c.optimizer.layer_decays = (("conv1", 0.0), ("fc8", 1.0))
    ((after, _),) = train(c, [0.5])
    for layer, decay in {"conv1": 0.0, "conv2": 0.0005, "fc7": 0.0005, "fc8": 1.0}.items():
        expected = 1 - 0.01 * (0.5 + decay)
        assert after[layer]["kernel"][0] == pytest.approx(expected, abs=1e-7)
        assert after[layer]["bias"][0] == pytest.approx(1 - 0.01 * 0.5, abs=1e-7)


def test_rate_zero_stops_a_kernel_and_its_velocity():
    c = default_config()
    c.schedule.changes = ((0.0, "conv1", "learning_rate", 0.0),)
    *_, (after, state) = train(c, [0.5] * 5)
    np.testing.assert_array_equal(after["conv1"]["kernel"], 1.0)
    np.testing.assert_array_equal(optax.tree.get(state, "trace")["conv1"]["kernel"], 0.0)
    assert after["conv1"]["bias"][0] < 1
    assert after["conv2"]["kernel"][0] < 1


def test_moving_kernel_stops_at_once_when_its_rate_becomes_zero():
    """As in run #145, unlike `optax.trace`, with which it would coast on its velocity."""
    c = default_config()
    c.schedule.changes = ((1.0, "conv1", "learning_rate", 0.0),)
    tx, w = make_optimizer(c, STEPS_PER_EPOCH), full()
    _, moving = one_update(tx, full(), tx.init(w), w, epoch=0)
    updates, stopped = one_update(tx, full(), moving, w, epoch=1)
    np.testing.assert_array_equal(updates["conv1"]["kernel"], 0.0)
    before, after = optax.tree.get(moving, "trace"), optax.tree.get(stopped, "trace")
    assert (before["conv1"]["kernel"] != 0).all()
    np.testing.assert_array_equal(after["conv1"]["kernel"], before["conv1"]["kernel"])


def test_clipping_limits_the_global_norm_of_the_gradients():
    c = default_config()
    c.optimizer.weight_decay = 0.0
    c.optimizer.clip_norm = 1.0
    ((after, _),) = train(c, [100.0])
    moved = optax.tree.norm(jax.tree.map(lambda a, b: a - b, full(), after))
    assert moved == pytest.approx(0.01, rel=1e-4)


def test_velocity_of_plain_sgd_is_at_the_same_place_in_the_state_as_in_0_1():
    """A checkpoint stores the states of a chain by position."""
    states = make_optimizer(default_config(), STEPS_PER_EPOCH).init(full())
    assert len(states) == 4
    assert isinstance(states[3], optax.TraceState)
    assert without_frozen(states) is states


# ------------------------------------------------------------------------------------------
# Other optimizers
# ------------------------------------------------------------------------------------------


def is_kernel(tree):
    return jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", tree)


# The fields of each, and Optax's own optimizer. LAMB's biases have no trust ratio here, so they
# are those of `optax.adamw`.
DECAYED = {"weight_decay": 0.05, "mask": is_kernel}
ALL_LARS = {"weight_decay_mask": is_kernel, "trust_ratio_mask": is_kernel}
REFERENCES = {
    "lars": ({}, optax.lars(0.02, 0.05, **ALL_LARS, momentum=0.9), None),
    "lars nesterov": (
        {"nesterov": True, "momentum": 0.8},
        optax.lars(0.02, 0.05, **ALL_LARS, momentum=0.8, nesterov=True),
        None,
    ),
    "sgd nesterov": (
        {"nesterov": True},
        optax.chain(
            optax.add_decayed_weights(0.05, is_kernel), optax.sgd(0.02, 0.9, nesterov=True)
        ),
        None,
    ),
    "sgdw": (
        {},
        optax.chain(
            optax.trace(0.9),
            optax.add_decayed_weights(0.05, is_kernel),
            optax.scale_by_learning_rate(0.02),
        ),
        None,
    ),
    "adamw": ({}, optax.adamw(0.02, **DECAYED), None),
    "adamw moments": (
        {"b1": 0.8, "b2": 0.95, "eps": 1e-3},
        optax.adamw(0.02, 0.8, 0.95, 1e-3, **DECAYED),
        None,
    ),
    "lamb": ({}, optax.lamb(0.02, eps=1e-8, **DECAYED), optax.adamw(0.02, **DECAYED)),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_optimizers_equal_those_of_optax(name):
    fields, of_kernels, of_biases = REFERENCES[name]
    c = default_config()
    c.learning_rate = 0.02
    c.optimizer.kind = name.split()[0]
    c.optimizer.weight_decay = 0.05
    c.optimizer.update(fields)
    ours = make_optimizer(c, STEPS_PER_EPOCH)
    w = random_tree(np.random.default_rng(0))
    for reference, kernels in ((of_kernels, True), (of_biases or of_kernels, False)):
        rng = np.random.default_rng(1)
        found = expected = w
        state, reference_state = ours.init(found), reference.init(expected)
        for _ in range(5):
            grads = random_tree(rng)
            updates, state = one_update(ours, grads, state, found)
            found = optax.apply_updates(found, updates)
            updates, reference_state = reference.update(grads, reference_state, expected)
            expected = optax.apply_updates(expected, updates)
        jax.tree.map(
            lambda a, b, k, of=kernels: k != of or np.testing.assert_allclose(a, b, rtol=2e-5),
            *(found, expected, is_kernel(w)),
        )


def test_lars_step_by_hand():
    c = default_config()
    c.learning_rate = 2.0
    c.optimizer.kind = "lars"
    c.optimizer.weight_decay = 0.1
    w = {"fc6": {"kernel": jnp.array([3.0, 4.0]), "bias": jnp.array([3.0, 4.0])}}
    grads = {"fc6": {"kernel": jnp.array([-0.4, 0.3]), "bias": jnp.array([-0.4, 0.3])}}
    tx = make_optimizer(c, STEPS_PER_EPOCH)
    updates, _ = one_update(tx, grads, tx.init(w), w)
    # ∇ + 0.1 w = (−0.1, 0.7), its norm √0.5; the ratio is 0.001 · 5 / √0.5 = 0.00707107
    expected = [2 * 0.00707107 * 0.1, -2 * 0.00707107 * 0.7]
    np.testing.assert_allclose(updates["fc6"]["kernel"], expected, rtol=1e-6)
    np.testing.assert_allclose(updates["fc6"]["bias"], [0.8, -0.6], rtol=1e-6)


@pytest.mark.parametrize(("gradient", "start"), [(1e-3, 1.0), (1e3, 1.0), (1.0, 50.0)])
def test_lars_changes_kernels_by_the_same_ratio_whatever_the_size_of_gradients(gradient, start):
    c = default_config()
    c.optimizer.kind = "lars"
    c.optimizer.trust_coefficient = 0.02
    ((after, _),) = train(c, [gradient], start)
    assert after["fc6"]["kernel"][0] == pytest.approx(start * (1 - 0.01 * 0.02), rel=1e-6)


# ------------------------------------------------------------------------------------------
# Single layers: rates and freezing
# ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_layer_rate_is_a_factor_on_the_rate_of_the_schedule(kind):
    """Its updates are those of a run with a rate that many times as high. Other layers' stay."""
    plain, faster, scaled = default_config(), default_config(), default_config()
    for c in (plain, faster, scaled):
        c.optimizer.kind = kind
        c.schedule.changes = ((0.5, "all", "learning_rate", 0.002),)
    faster.learning_rate = 0.05
    faster.schedule.changes = ((0.5, "all", "learning_rate", 0.01),)
    scaled.optimizer.layer_rates = (("fc8", 5.0), ("conv1", 5))
    for epoch in (0.0, 1.0):
        (_, (slow, _)), (_, (fast, _)), (_, (both, _)) = (
            train(c, [0.5, 0.3], epoch=epoch) for c in (plain, faster, scaled)
        )
        for layer in LAYERS:
            expected = (fast if layer in ("fc8", "conv1") else slow)[layer]
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), both[layer], expected
            )


def test_batch_norm_has_the_rate_of_its_convolution():
    c = default_config()
    c.optimizer.layer_rates = (("conv2", 0.5),)
    w = {name: {"scale": jnp.ones(2)} for name in ("bn1", "bn2")}
    tx = make_optimizer(c, STEPS_PER_EPOCH)
    updates, _ = one_update(tx, w, tx.init(w), w)
    np.testing.assert_allclose(updates["bn2"]["scale"], 0.5 * updates["bn1"]["scale"], rtol=1e-6)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_frozen_layers_stay_have_no_velocity_and_change_nothing_for_others(kind):
    """A frozen convolution includes its batch norm."""
    plain, freezing = default_config(), default_config()
    for c in (plain, freezing):
        c.optimizer.kind = kind
        c.optimizer.layer_rates = (("fc8", 3.0),)
    freezing.freeze = ("conv1",)
    results = []
    for c in (plain, freezing):
        rng = np.random.default_rng(0)
        params, tx = random_tree(rng), make_optimizer(c, STEPS_PER_EPOCH)
        state = tx.init(params)
        for _ in range(3):
            updates, state = one_update(tx, random_tree(rng), state, params)
            params = optax.apply_updates(params, updates)
        results.append((params, state))
    (trained, _), (frozen, state) = results
    start = random_tree(np.random.default_rng(0))
    for name in start:
        expected = start if layer_of(name) == "conv1" else trained
        jax.tree.map(np.testing.assert_array_equal, frozen[name], expected[name])
    averages = [x.shape for x in jax.tree.leaves(state) if x.shape]  # without Adam's count
    trained = [x.shape for n in ("conv2", "fc8") for x in jax.tree.leaves(start[n])]
    assert averages == trained * (2 if kind in ("adamw", "lamb") else 1)


def test_gradient_norm_for_clipping_ignores_frozen_layers():
    c = default_config()
    c.optimizer.weight_decay = 0.0
    c.optimizer.clip_norm = 1.0
    c.freeze = ("conv1",)
    tx, w = make_optimizer(c, STEPS_PER_EPOCH), full()
    grads = full(0.01) | {"conv1": full(1e6)["conv1"]}  # a norm of 0.05 without conv1
    updates, _ = one_update(tx, grads, tx.init(w), w)
    np.testing.assert_array_equal(updates["conv1"]["kernel"], 0.0)
    np.testing.assert_allclose(updates["fc8"]["kernel"], -0.01 * 0.01, rtol=1e-6)


BAD_LAYERS = [
    ("freeze", ("conv6",), "freeze: unknown layer 'conv6'; the nearest are conv"),
    ("freeze", ("bn1",), "freeze: unknown layer 'bn1'; the nearest are conv1, conv2"),
    ("freeze", LAYERS, "freeze names all layers"),
    (
        "optimizer.layer_rates",
        (("fc9", 2.0),),
        "layer_rates: unknown layer 'fc9'; the nearest are fc",
    ),
    ("optimizer.layer_rates", ("fc8", 2.0), "'fc8' must be a pair like"),
    ("optimizer.layer_rates", (("fc8", 2.0, 3.0),), "must be a pair like"),
    (
        "optimizer.layer_rates",
        (("fc8", 0.0),),
        "factor of fc8 must be above 0.*freeze",
    ),
    ("optimizer.layer_rates", (("fc8", np.inf),), "layer_rates: inf of fc8 must be a number"),
    ("optimizer.layer_rates", (("fc8", "x"),), "layer_rates: 'x' of fc8 must be a number"),
    ("optimizer.layer_rates", (("fc8", 2.0), ("fc8", 3.0)), "layer_rates names twice fc8"),
    ("optimizer.layer_rates", (("conv1", 2.0),), "layer_rates and freeze both name conv1"),
    ("optimizer.layer_decays", (("fc9", 0.1),), "layer_decays: unknown layer 'fc9'; the nearest"),
    ("optimizer.layer_decays", ("fc8", 0.1), "'fc8' must be a pair like"),
    (
        "optimizer.layer_decays",
        (("fc8", -1.0),),
        "layer_decays: -1.0 of fc8 must be a number, not below 0",
    ),
    ("optimizer.layer_decays", (("fc8", 0.1), ("fc8", 0.2)), "layer_decays names twice fc8"),
    ("schedule.changes", ((1, "conv1", "learning_rate", 0.1),), "because freeze names conv1"),
]


@pytest.mark.parametrize(("field", "value", "message"), BAD_LAYERS)
def test_unknown_or_contradictory_layers_are_rejected(field, value, message):
    c = default_config()
    c.freeze = ("conv1",)
    c.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=message):
        make_optimizer(c, STEPS_PER_EPOCH)


# ------------------------------------------------------------------------------------------
# The train step with other optimizers
# ------------------------------------------------------------------------------------------

TINY = (Conv(8, 11, stride=4), ReLU(), MaxPool(), Dense("classes"))


def tiny_training(tx, frozen=(), **options):
    """One step of a small network: its start, the gradients there, and what the step returns."""
    c = default_config()
    c.image_size = c.augment.crop_size = 63
    c.augment.flip, c.augment.pixel_scale = False, 1 / 64
    model = AlexNet(TINY, 10, initializer="he", frozen=frozen)
    augment = make_augment(c)
    state = init_state(model, tx, 0, (63, 63, 3))
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (4, 63, 63, 3), np.uint8),
        "label": jnp.arange(4, dtype=jnp.int32),
    }

    def loss(params):
        logits = model.apply({"params": params}, augment.center(batch["image"]), train=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    grads = jax.jit(jax.grad(loss))(state.params)
    train_step = jax.jit(make_train_step(model, tx, augment, **options))
    return state, grads, *train_step(state, batch)


def test_train_step_takes_any_optax_transformation():
    tx = optax.adam(0.001)
    start, grads, state, metrics = tiny_training(tx)
    updates, opt_state = tx.update(grads, tx.init(start.params))
    expected = optax.apply_updates(start.params, updates)

    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)

    jax.tree.map(close, state.params, expected)
    jax.tree.map(close, state.opt_state, opt_state)
    assert optax.tree.get(state.opt_state, "count") == state.step == 1
    assert set(metrics) == {"loss", "top1", "top5"}


@pytest.mark.parametrize("frozen", [(), ("conv1",)])
def test_logged_gradient_norm_ignores_frozen_layers(frozen):
    _, grads, _, metrics = tiny_training(optax.sgd(0.01), frozen, log_grad_norm=True)
    trained = {layer: arrays for layer, arrays in grads.items() if layer not in frozen}
    expected = np.sqrt(sum(np.sum(np.float64(g) ** 2) for g in jax.tree.leaves(trained)))
    assert float(metrics["grad_norm"]) == pytest.approx(expected, rel=1e-4)


# ------------------------------------------------------------------------------------------
# Schedules
# ------------------------------------------------------------------------------------------

RUN_145 = [
    # epoch, layer, epsW, epsB, color noise: the facts of the released log
    (0, "conv1", 1e-2, 0.02, 0.1),
    (24.9, "fc8", 1e-2, 0.02, 0.1),
    (25, "conv1", 1e-3, 0.02, 0.1),
    (51, "conv1", 1e-4, 0.02, 0.1),
    (66.9, "conv1", 1e-4, 0.02, 0.1),
    (67, "conv1", 1e-5, 0.02, 0.0),
    (67, "conv2", 1e-4, 0.02, 0.0),
    (72, "conv1", 0.0, 0.0, 0.0),
    (72, "conv2", 1e-4, 0.02, 0.0),
    (79, "conv1", 0.0, 0.0, 0.0),
    (79, "conv2", 1e-5, 0.02, 0.0),
    (90, "fc8", 1e-5, 0.02, 0.0),
]


@pytest.mark.parametrize(("epoch", "layer", "kernels", "biases", "noise"), RUN_145)
def test_run_145_changes_its_rates_when_its_log_says(epoch, layer, kernels, biases, noise):
    c = configs.load("configs/imagenet_2012.py")
    assert learning_rate(c, epoch, layer) == pytest.approx(kernels)
    assert learning_rate(c, epoch, layer, kernel=False) == pytest.approx(biases)
    if layer != "conv1":
        assert learning_rate(c, epoch) == pytest.approx(kernels)  # the reported one
    augment = make_augment(c, steps_per_epoch=STEPS_PER_EPOCH)
    assert augment.color_noise(at(epoch)) == pytest.approx(noise)


KINDS = [
    ("constant", {}, {0: 0.01, 50: 0.01}),
    ("steps", {"step_epochs": (30.0, 60.0)}, {0: 0.01, 29.9: 0.01, 30: 1e-3, 60: 1e-4}),
    ("steps", {"step_epochs": (30.25,)}, {30.2: 0.01, 30.3: 1e-3}),  # at no step: the next one
    ("cosine", {}, {0: 0.01, 45: 0.005, 90: 0.0}),
    ("cosine", {"warmup_epochs": 10.0}, {0: 0.0, 5: 0.005, 10: 0.01, 50: 0.005, 90: 0.0}),
    ("cosine", {"warmup_epochs": 90.0}, {45: 0.005, 90: 0.01, 90.1: 0.0}),
    ("polynomial", {"power": 2.0}, {0: 0.01, 45: 0.0025, 90: 0.0}),
    ("steps", {"warmup_epochs": 5.0, "step_epochs": (30.0,)}, {1: 0.002, 29.9: 0.01, 30: 1e-3}),
]


@pytest.mark.parametrize(("kind", "fields", "rates"), KINDS)
def test_kinds_of_schedule(kind, fields, rates):
    c = default_config()
    c.schedule.kind = kind
    c.schedule.update(fields)
    for epoch, rate in rates.items():
        assert learning_rate(c, epoch) == pytest.approx(rate, abs=1e-8), epoch
        assert learning_rate(c, epoch, "conv3") == learning_rate(c, epoch)
        assert learning_rate(c, epoch, "conv3", kernel=False) == learning_rate(c, epoch)


SCALINGS = [
    # scaling, batch_size, scaling_batch_size, what 0.01 becomes
    ("none", 1024, 256, 0.01),
    ("linear", 256, 256, 0.01),
    ("linear", 1024, 256, 0.04),
    ("sqrt", 1024, 256, 0.02),
    ("linear", 64, 256, 0.0025),
    ("linear", 1024, 128, 0.08),
]


@pytest.mark.parametrize(("scaling", "batch_size", "base", "rate"), SCALINGS)
def test_learning_rate_scales_with_the_batch_size(scaling, batch_size, base, rate):
    c = default_config()
    c.batch_size = batch_size
    c.schedule.scaling, c.schedule.scaling_batch_size = scaling, base
    c.optimizer.bias_learning_rate = 2.0
    assert learning_rate(c, 1) == pytest.approx(rate)
    assert learning_rate(c, 1, "fc6") == pytest.approx(rate)
    assert learning_rate(c, 1, "fc6", kernel=False) == pytest.approx(2 * rate)


def test_scaling_applies_to_a_warmup_but_not_to_a_change_to_an_absolute_value():
    c = default_config()
    c.batch_size = 1024
    c.schedule.scaling = "linear"
    c.schedule.warmup_epochs = 10.0
    c.schedule.changes = ((19.95, "all", "learning_rate", 0.003),)  # between two steps
    rates = {epoch: learning_rate(c, epoch) for epoch in (5, 10, 19.9, 20)}
    assert rates == pytest.approx({5: 0.02, 10: 0.04, 19.9: 0.04, 20: 0.003})


def test_imagenet_pod_warms_up_to_22_and_decays_as_a_square():
    """LARS paper: 22 at 32K images, γ (1 − t/T)², here over the 95 epochs after the warm-up."""
    c = configs.load("configs/imagenet_pod.py")
    for epoch, rate in {1: 4.4, 5: 22.0, 52.5: 5.5, 100: 0.0}.items():
        assert learning_rate(c, epoch) == pytest.approx(rate, abs=1e-5), epoch
        bias_rate = learning_rate(c, epoch, "fc8", kernel=False)
        assert bias_rate == pytest.approx(rate * 0.3 / 22, abs=1e-6)


def test_plateau_divides_by_ten_three_times_when_the_error_stops_improving():
    c = default_config()
    c.schedule.kind = "plateau"
    c.schedule.patience = 2
    plateau = make_plateau(c)
    state = plateau.init(full())
    scales = []
    for error in [0.9, 0.8, 0.8, 0.8, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7]:
        _, state = plateau.update({}, state, value=error)
        scales.append(round(float(state.scale), 6))
    assert scales == [1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01, *[0.001] * 5]
    assert learning_rate(c, 0, plateau_scale=state.scale) == pytest.approx(1e-5)


BAD_CHANGES = [
    ((1, "conv9", "learning_rate", 0.1), "conv9"),
    ((1, "conv1", "learning_rat", 0.1), "the nearest are learning_rate, bias_learning_rate$"),
    ((1, "conv1", "color_noise", 0.1), "data"),
    ((1, "all", "learning_rate"), "epoch, layer, field, value"),
    ((1, "all", "learning_rate", "low"), "numbers"),
]


@pytest.mark.parametrize(("change", "message"), BAD_CHANGES)
def test_change_of_what_does_not_exist_is_rejected(change, message):
    c = default_config()
    c.schedule.changes = (change,)
    with pytest.raises(UserError, match=message):
        make_schedule(c, STEPS_PER_EPOCH)


UNKNOWN = [
    ("schedule.kind", "cosin", "cosine"),
    ("schedule.scaling", "square", "none, linear, sqrt"),
    ("optimizer.kind", "adam", "sgd, sgdw, lars, adamw, lamb"),
]


@pytest.mark.parametrize(("field", "value", "message"), UNKNOWN)
def test_unknown_kind_is_rejected_with_the_choices(field, value, message):
    c = default_config()
    section, name = field.split(".")
    c[section][name] = value
    with pytest.raises(UserError, match=f"{field}='{value}'.*{message}"):
        make_schedule(c, STEPS_PER_EPOCH)
