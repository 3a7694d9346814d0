"""The paper's update to the last digit, and schedules that read like the logs they come from."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alexnet_jax import config as configs
from alexnet_jax.config import default_config
from alexnet_jax.models.alexnet import LAYERS
from alexnet_jax.training import optimizer as optim
from alexnet_jax.utils.errors import UserError

STEPS_PER_EPOCH = 10.0


def params(value=1.0):
    return {layer: {"kernel": jnp.full(2, value), "bias": jnp.full(1, value)} for layer in LAYERS}


def scheduled(config, epoch, scale=1.0):
    schedule = optim.make_schedule(config, STEPS_PER_EPOCH)
    return schedule(jnp.int32(round(epoch * STEPS_PER_EPOCH)), jnp.float32(scale))


def updates_of(config, gradients, start=1.0, epoch=0.0):
    """Weights of conv1 after each of the gradients."""
    w, optimizer = params(start), optim.sgd(config)
    state = optimizer.init(w)
    for gradient in gradients:
        grads = jax.tree.map(lambda x, g=gradient: jnp.full_like(x, g), w)
        steps, state = optimizer.update(grads, state, w, rates=scheduled(config, epoch).rates)
        w = optax.apply_updates(w, steps)
        yield w, state


def test_two_steps_of_the_papers_update_by_hand():
    (first, _), (second, _) = updates_of(default_config(), [0.5, 0.5])
    assert first["conv1"]["kernel"][0] == pytest.approx(0.994995, abs=1e-7)
    # v = 0.9 · −0.005005 − 0.01 · 0.5 − 0.0005 · 0.01 · 0.994995 = −0.0095094750
    assert second["conv1"]["kernel"][0] == pytest.approx(0.994995 - 0.009509475, abs=1e-7)


def test_velocity_holds_the_learning_rate_so_a_drop_takes_effect_slowly():
    """w moves on by 0.9 of its last step even if ε is now nearly nothing (paper, section 5)."""
    c = default_config()
    c.optimizer.weight_decay = 0.0
    c.schedule.changes = ((1.0, "all", "learning_rate", 1e-12),)
    optimizer, w = optim.sgd(c), params()
    state = optimizer.init(w)
    grads = jax.tree.map(jnp.ones_like, w)
    first, state = optimizer.update(grads, state, w, rates=scheduled(c, 0).rates)
    second, _ = optimizer.update(grads, state, w, rates=scheduled(c, 1).rates)
    np.testing.assert_allclose(second["fc6"]["kernel"], 0.9 * first["fc6"]["kernel"], rtol=1e-6)


def test_biases_have_a_rate_and_a_decay_of_their_own():
    c = default_config()
    c.optimizer.bias_learning_rate = 2.0
    c.optimizer.bias_weight_decay = 0.1
    ((after, _),) = updates_of(c, [0.5])
    assert after["fc7"]["bias"][0] == pytest.approx(1 - 0.02 * (0.5 + 0.1 * 1.0), abs=1e-7)
    assert after["fc7"]["kernel"][0] == pytest.approx(1 - 0.01 * (0.5 + 0.0005), abs=1e-7)


def test_rate_zero_freezes_a_layer_whole_its_velocity_too():
    c = default_config()
    c.schedule.changes = ((0.0, "conv1", "learning_rate", 0.0),)
    *_, (after, state) = updates_of(c, [0.5] * 5)
    np.testing.assert_array_equal(after["conv1"]["kernel"], 1.0)
    np.testing.assert_array_equal(state[-1].trace["conv1"]["kernel"], 0.0)
    assert after["conv1"]["bias"][0] < 1
    assert after["conv2"]["kernel"][0] < 1


def test_a_layer_frozen_in_flight_stops_at_once():
    c = default_config()
    optimizer, w = optim.sgd(c), params()
    state = optimizer.init(w)
    grads = jax.tree.map(jnp.ones_like, w)
    _, state = optimizer.update(grads, state, w, rates=scheduled(c, 0).rates)
    c.schedule.changes = ((0.0, "conv1", "learning_rate", 0.0),)
    steps, frozen = optimizer.update(grads, state, w, rates=scheduled(c, 0).rates)
    np.testing.assert_array_equal(steps["conv1"]["kernel"], 0.0)
    np.testing.assert_array_equal(
        frozen[-1].trace["conv1"]["kernel"], state[-1].trace["conv1"]["kernel"]
    )


def test_clipping_limits_the_global_norm_of_the_gradients():
    c = default_config()
    c.optimizer.weight_decay = 0.0
    c.optimizer.clip_norm = 1.0
    ((after, _),) = updates_of(c, [100.0])
    moved = optax.tree.norm(jax.tree.map(lambda a, b: a - b, params(), after))
    assert moved == pytest.approx(0.01, rel=1e-4)


def weights_only(tree):
    return {layer: {"kernel": True, "bias": False} for layer in tree}


def test_lars_is_optax_lars_of_the_weights_and_plain_momentum_of_the_biases():
    c = default_config()
    c.learning_rate = 2.0
    c.optimizer.kind = "lars"
    ours = optim.sgd(c)
    theirs = optax.lars(
        2.0,
        weight_decay=0.0005,
        weight_decay_mask=weights_only,
        trust_coefficient=0.001,
        trust_ratio_mask=weights_only,
        momentum=0.9,
    )
    rng = np.random.default_rng(0)

    def draw():
        shapes = {"conv1": ((3, 3, 2, 4), 4), "fc6": ((8, 5), 5)}
        return {
            layer: {
                "kernel": jnp.float32(rng.normal(size=kernel)),
                "bias": jnp.float32(rng.normal(size=bias)),
            }
            for layer, (kernel, bias) in shapes.items()
        }

    w = expected = draw()
    state, expected_state = ours.init(w), theirs.init(w)
    for _ in range(5):
        grads = draw()
        steps, state = ours.update(grads, state, w, rates=scheduled(c, 0).rates)
        w = optax.apply_updates(w, steps)
        steps, expected_state = theirs.update(grads, expected_state, expected)
        expected = optax.apply_updates(expected, steps)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), w, expected)


def test_a_step_of_lars_by_hand():
    c = default_config()
    c.learning_rate = 2.0
    c.optimizer.kind = "lars"
    c.optimizer.weight_decay = 0.1
    w = {"fc6": {"kernel": jnp.array([3.0, 4.0]), "bias": jnp.array([3.0, 4.0])}}
    grads = {"fc6": {"kernel": jnp.array([-0.4, 0.3]), "bias": jnp.array([-0.4, 0.3])}}
    optimizer = optim.sgd(c)
    steps, _ = optimizer.update(grads, optimizer.init(w), w, rates=scheduled(c, 0).rates)
    # ∇ + 0.1 w = (−0.1, 0.7), its norm √0.5; the ratio is 0.001 · 5 / √0.5 = 0.00707107
    expected = [2 * 0.00707107 * 0.1, -2 * 0.00707107 * 0.7]
    np.testing.assert_allclose(steps["fc6"]["kernel"], expected, rtol=1e-6)
    np.testing.assert_allclose(steps["fc6"]["bias"], [0.8, -0.6], rtol=1e-6)


def test_lars_moves_weights_by_the_same_share_of_them_whatever_the_gradients_size():
    c = default_config()
    c.optimizer.kind = "lars"
    c.optimizer.trust_coefficient = 0.02
    for gradient, start in ((1e-3, 1.0), (1e3, 1.0), (1.0, 50.0)):
        ((after, _),) = updates_of(c, [gradient], start)
        assert after["fc6"]["kernel"][0] == pytest.approx(start * (1 - 0.01 * 0.02), rel=1e-6)


def test_velocity_of_plain_sgd_lies_where_it_lay_before_there_was_lars():
    """A checkpoint holds the chain's states by their place in it."""
    states = optim.sgd(default_config()).init(params())
    assert len(states) == 4
    assert isinstance(states[3], optax.TraceState)


@pytest.mark.parametrize("kind", ["sgd", "lars"])
def test_a_layers_rate_is_a_multiple_of_whatever_the_schedule_gives(kind):
    """Its steps are those of a run at that multiple of the rate, the other layers' as before."""
    plain, faster, scaled = default_config(), default_config(), default_config()
    for c in (plain, faster, scaled):
        c.optimizer.kind = kind
        c.schedule.changes = ((0.5, "all", "learning_rate", 0.002),)
    faster.learning_rate = 0.05
    faster.schedule.changes = ((0.5, "all", "learning_rate", 0.01),)
    scaled.optimizer.layer_rates = (("fc8", 5.0), ("conv1", 5))
    for epoch in (0.0, 1.0):
        (_, (slow, _)), (_, (fast, _)), (_, (both, _)) = (
            updates_of(c, [0.5, 0.3], epoch=epoch) for c in (plain, faster, scaled)
        )
        for layer in LAYERS:
            expected = (fast if layer in ("fc8", "conv1") else slow)[layer]
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), both[layer], expected
            )


def test_a_convolutions_batch_norm_goes_with_it():
    c = default_config()
    c.optimizer.layer_rates = (("conv2", 0.5),)
    w = {name: {"scale": jnp.ones(2)} for name in ("bn1", "bn2")}
    optimizer = optim.sgd(c)
    steps, _ = optimizer.update(w, optimizer.init(w), w, rates=scheduled(c, 0).rates)
    np.testing.assert_allclose(steps["bn2"]["scale"], 0.5 * steps["bn1"]["scale"], rtol=1e-6)
    assert set(optim.trainable(w, ("conv2",))) == {"bn1"}


BAD_LAYERS = [
    ("freeze", ("conv6",), "freeze: no layer 'conv6'; the nearest are conv"),
    ("freeze", ("bn1",), "freeze: no layer 'bn1'; the nearest are conv1, conv2"),
    ("freeze", LAYERS, "freeze names all layers"),
    ("optimizer.layer_rates", (("fc9", 2.0),), "layer_rates: no layer 'fc9'; the nearest are fc"),
    ("optimizer.layer_rates", ("fc8", 2.0), "'fc8' must be a pair like"),
    ("optimizer.layer_rates", (("fc8", 2.0, 3.0),), "must be a pair like"),
    ("optimizer.layer_rates", (("fc8", 0.0),), "fc8's 0.0 must be a number above 0.*freeze"),
    ("optimizer.layer_rates", (("fc8", np.inf),), "fc8's inf must be a number above 0"),
    ("optimizer.layer_rates", (("fc8", "x"),), "fc8's 'x' must be a number"),
    ("optimizer.layer_rates", (("fc8", 2.0), ("fc8", 3.0)), "names fc8, twice"),
    ("optimizer.layer_rates", (("conv1", 2.0),), "names conv1, in freeze as well"),
    ("schedule.changes", ((1, "conv1", "learning_rate", 0.1),), "since freeze names conv1"),
]


@pytest.mark.parametrize(("field", "value", "told"), BAD_LAYERS)
def test_layers_that_do_not_exist_or_contradict_each_other_are_refused(field, value, told):
    c = default_config()
    c.freeze = ("conv1",)
    c.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=told):
        optim.make_schedule(c, STEPS_PER_EPOCH)


RUN_145 = [
    # epoch, layer, epsW, epsB, colour noise: the facts of the released log
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


@pytest.mark.parametrize(("epoch", "layer", "weights", "biases", "noise"), RUN_145)
def test_run_145_changes_when_its_log_says(epoch, layer, weights, biases, noise):
    now = scheduled(configs.load("configs/imagenet_2012.py"), epoch)
    assert now.rates[layer]["learning_rate"] == pytest.approx(weights)
    assert now.rates[layer]["bias_learning_rate"] == pytest.approx(biases)
    assert now.color_noise == pytest.approx(noise)
    if layer != "conv1":
        assert now.learning_rate == pytest.approx(weights)  # the one that is shown


KINDS = [
    ("constant", {}, {0: 0.01, 50: 0.01}),
    ("steps", {"step_epochs": (30.0, 60.0)}, {0: 0.01, 29.9: 0.01, 30: 1e-3, 60: 1e-4}),
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
        now = scheduled(c, epoch)
        assert now.learning_rate == pytest.approx(rate, abs=1e-8), epoch
        assert now.rates["conv3"]["learning_rate"] == now.learning_rate


SCALINGS = [
    # scaling, batch_size, scaling_batch_size, what 0.01 becomes
    ("none", 1024, 256, 0.01),
    ("linear", 256, 256, 0.01),
    ("linear", 1024, 256, 0.04),
    ("sqrt", 1024, 256, 0.02),
    ("linear", 64, 256, 0.0025),
    ("linear", 1024, 128, 0.08),
]


@pytest.mark.parametrize(("scaling", "batch_size", "at", "rate"), SCALINGS)
def test_learning_rate_grows_with_the_batch_size(scaling, batch_size, at, rate):
    c = default_config()
    c.batch_size = batch_size
    c.schedule.scaling, c.schedule.scaling_batch_size = scaling, at
    c.optimizer.bias_learning_rate = 2.0
    now = scheduled(c, 1)
    assert now.learning_rate == pytest.approx(rate)
    assert now.rates["fc6"]["learning_rate"] == pytest.approx(rate)
    assert now.rates["fc6"]["bias_learning_rate"] == pytest.approx(2 * rate)


def test_scaling_holds_under_a_warm_up_and_not_for_a_change_to_an_absolute_value():
    c = default_config()
    c.batch_size = 1024
    c.schedule.scaling = "linear"
    c.schedule.warmup_epochs = 10.0
    c.schedule.changes = ((20.0, "all", "learning_rate", 0.003),)
    rates = {epoch: float(scheduled(c, epoch).learning_rate) for epoch in (5, 10, 19, 20)}
    assert rates == pytest.approx({5: 0.02, 10: 0.04, 19: 0.04, 20: 0.003})


def test_the_pods_rate_warms_up_to_22_and_falls_as_a_square():
    """LARS paper: 22 at 32K images, γ (1 − t/T)², here over the 95 epochs after the warm-up."""
    c = configs.load("configs/imagenet_pod.py")
    for epoch, rate in {1: 4.4, 5: 22.0, 52.5: 5.5, 100: 0.0}.items():
        now = scheduled(c, epoch)
        assert now.learning_rate == pytest.approx(rate, abs=1e-5), epoch
        assert now.rates["fc8"]["bias_learning_rate"] == pytest.approx(rate * 0.3 / 22, abs=1e-6)


def test_plateau_divides_by_ten_three_times_when_error_stops_improving():
    c = default_config()
    c.schedule.kind = "plateau"
    c.schedule.patience = 2
    plateau = optim.plateau(c)
    state = plateau.init(params())
    scales = []
    for error in [0.9, 0.8, 0.8, 0.8, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7]:
        _, state = plateau.update({}, state, value=error)
        scales.append(round(float(state.scale), 6))
    assert scales == [1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01, *[0.001] * 5]
    assert scheduled(c, 0, state.scale).learning_rate == pytest.approx(1e-5)


BAD_CHANGES = [
    ((1, "conv9", "learning_rate", 0.1), "conv9"),
    ((1, "conv1", "learning_rat", 0.1), "the nearest are learning_rate, bias_learning_rate$"),
    ((1, "conv1", "color_noise", 0.1), "data"),
    ((1, "all", "learning_rate"), "epoch, layer, field, value"),
    ((1, "all", "learning_rate", "low"), "numbers"),
]


@pytest.mark.parametrize(("change", "told"), BAD_CHANGES)
def test_a_change_of_what_does_not_exist_is_refused(change, told):
    c = default_config()
    c.schedule.changes = (change,)
    with pytest.raises(UserError, match=told):
        optim.make_schedule(c, STEPS_PER_EPOCH)


UNKNOWN = [
    ("schedule.kind", "cosin", "cosine"),
    ("schedule.scaling", "square", "none, linear, sqrt"),
    ("optimizer.kind", "adam", "sgd, lars"),
]


@pytest.mark.parametrize(("field", "value", "told"), UNKNOWN)
def test_unknown_kind_is_refused(field, value, told):
    c = default_config()
    part, name = field.split(".")
    c[part][name] = value
    with pytest.raises(UserError, match=f"{field}='{value}'.*{told}"):
        optim.make_schedule(c, STEPS_PER_EPOCH)
