"""The pure steps: what they compute, that any step can be replayed, on one device or many."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alexnet_jax.config import default_config
from alexnet_jax.data import augment
from alexnet_jax.models.alexnet import AlexNet, layer_table
from alexnet_jax.training import optimizer as optim
from alexnet_jax.training import placement
from alexnet_jax.training import sharding as parallel
from alexnet_jax.training import train_step as step
from alexnet_jax.utils import process as runtime
from alexnet_jax.utils.errors import UserError

STATS = augment.Statistics(np.full((72, 72, 3), 100, np.float32), np.eye(3, dtype=np.float32) * 9)
NO_CHANCE = {"flip": False, "color_noise": 0.0, "crop_size": 72}


def config(variant="paper", chance=False, **fields):
    """A narrow network of ten classes on 72×72 images."""
    c = default_config()
    c.image_size, c.augment.crop_size, c.batch_size = 72, 64, 16
    c.augment.pixel_scale = 1 / 64
    c.model.variant, c.model.num_classes, c.model.width = variant, 10, 0.1
    c.model.init, c.model.hidden_bias = "he", 0.0
    if not chance:
        c.model.dropout = 0.0
        c.augment.update(NO_CHANCE)
    c.update_from_flattened_dict(fields)
    return c


def batch(count=16, seed=0):
    random = np.random.default_rng(seed)
    return {
        "image": random.integers(0, 256, (count, 72, 72, 3), np.uint8),
        "label": random.integers(0, 10, count).astype(np.int32),
    }


def compiled(c, kind):
    c.parallel = kind
    model = AlexNet(
        c.model.variant,
        10,
        dropout=c.model.dropout,
        initializer="he",
        hidden_bias=0.0,
        width=c.model.width,
        batch_axes=placement.batch_axes(c),
        fc_axis=placement.fc_axis(c),
    )
    schedule = optim.make_schedule(c, steps_per_epoch=10.0)
    steps = parallel.compile_steps(c, model, STATS, schedule)
    return steps, model, steps.place(jax.device_put(initial(model, c), steps.shardings))


def initial(model, c, **options):
    return runtime.run_once(functools.partial(step.init_state, model, c), **options)


def run(c, kind, batches):
    steps, _, state = compiled(c, kind)
    history = []
    for b in batches:
        state, metrics = steps.train_step(state, steps.place_batch(b))
        history.append({k: float(v) for k, v in steps.unplace(metrics).items()})
    return placement.whole(steps.unplace(state)), history


def assert_close(tree, other, tolerance):
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * float(np.abs(b).max()))


SEVERAL_DEVICES = ("pmap", "mesh.data", "mesh.zero", "mesh.hybrid")


@functools.cache
def run_on_one_device(variant):
    return run(config(variant, chance=True), "jit", BATCHES)


# Batches in which rounding, which differs by the batch's parts, turns no ReLU on or off.
BATCHES = [batch(seed=n) for n in range(20, 22)]


@pytest.mark.parametrize(
    ("variant", "kind"),
    [
        *(("paper", kind) for kind in SEVERAL_DEVICES),
        pytest.param("bn", "mesh.zero", marks=pytest.mark.slow),
        pytest.param("owt", "mesh.hybrid", marks=pytest.mark.slow),
    ],
)
def test_every_kind_on_eight_devices_equals_one_device(variant, kind):
    """Dropout, crops, flips and colours on: an image's draws go by its place in the batch."""
    assert jax.device_count() == 8
    one, metrics_one = run_on_one_device(variant)
    several, metrics = run(config(variant, chance=True, hybrid_group=4), kind, BATCHES)
    assert_close(several.params, one.params, 2e-4)
    assert_close(several.opt_state, one.opt_state, 2e-3)
    assert_close(several.batch_stats, one.batch_stats, 2e-4)
    for a, b in zip(metrics, metrics_one, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("mesh.hybrid", {"optimizer.kind": "lars", "optimizer.clip_norm": 0.5}),
    ],
)
def test_norms_are_of_whole_arrays_where_devices_have_shares(kind, fields):
    """LARS takes one of each kernel, clipping one of all gradients."""
    one, metrics_one = run(config(**fields), "jit", BATCHES)
    several, metrics = run(config(**fields), kind, BATCHES)
    assert_close(several.params, one.params, 2e-4)
    assert ("grad_norm" in metrics[0]) == ("optimizer.clip_norm" in fields)
    assert metrics[0] == pytest.approx(metrics_one[0], rel=1e-4)


def bytes_on_one_device(tree):
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def initial_as_trained(c, kind):
    """The initial state as train.py makes it, where it will lie; and the same on one device."""
    steps, model, _ = compiled(c, kind)
    state = initial(model, c, out_shardings=steps.shardings)
    one = initial(model, c)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(one), strict=True):
        np.testing.assert_array_equal(a, b)
    return state, one


def test_zero_keeps_an_eighth_of_parameters_and_velocity_on_a_device(monkeypatch):
    monkeypatch.setattr(placement, "LEAST_SHARDED", 1000)  # this network is a narrow one
    shared, whole = initial_as_trained(config(), "mesh.zero")
    assert bytes_on_one_device(shared.params) < bytes_on_one_device(whole.params) / 6
    assert bytes_on_one_device(shared.opt_state) < bytes_on_one_device(whole.opt_state) / 6


def test_hybrid_splits_the_fc_kernels_over_a_group_and_nothing_else():
    state, _ = initial_as_trained(config(hybrid_group=4), "mesh.hybrid")
    for layer, arrays in state.params.items():
        for name, array in arrays.items():
            share = array.addressable_shards[0].data.shape
            parts = 4 if layer.startswith("fc") and name == "kernel" else 1
            assert share == (array.shape[0] // parts, *array.shape[1:]), (layer, name)


@pytest.mark.parametrize("kind", ["mesh.zero"])
def test_gradients_travel_in_the_dtype_asked_for(kind):
    """bfloat16 has three digits; it must show in the update, and in nothing larger."""
    exact, _ = run(config(chance=True), kind, BATCHES[:1])
    fields = {"optimizer.gradient_dtype": "bfloat16"}
    rounded, _ = run(config(chance=True, **fields), kind, BATCHES[:1])
    assert_close(rounded.opt_state, exact.opt_state, 2e-2)
    for a, b in zip(*map(jax.tree.leaves, (rounded.params, exact.params)), strict=True):
        assert a.dtype == np.float32
        assert not np.array_equal(a, b)


def test_random_draws_differ_between_images_devices_and_steps():
    same = np.repeat(batch(1)["image"], 8, axis=0)
    key, noise = step.train_key(0), jnp.float32(0.1)
    c = config(chance=True)
    on_devices = jax.pmap(
        lambda images, n: step.augmented(key, n, images, noise, STATS, c, ("devices",)),
        "devices",
        in_axes=(0, None),
    )
    seen = [np.asarray(on_devices(same.reshape(8, 1, 72, 72, 3), n)) for n in (0, 1)]
    crops = np.concatenate([s.reshape(8, -1) for s in seen])
    assert len(np.unique(crops, axis=0)) == 16


def test_a_step_can_be_replayed_alone():
    """Nothing but (state, batch) decides the outcome, to the last bit."""
    states = []
    for _ in range(2):
        steps, _, state = compiled(config(chance=True), "jit")
        state = state.replace(step=jax.device_put(jnp.int32(7), steps.shardings.step))
        states.append(steps.train_step(state, steps.place_batch(batch()))[0])
    for a, b in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", ["jit", "mesh.hybrid"])
def test_accumulating_gradients_in_parts_equals_the_whole_batch(kind):
    whole, metrics = run(config(), "jit", [batch(seed=n) for n in range(2)])
    parts, part_metrics = run(
        config(**{"optimizer.accumulate_steps": 2}), kind, [batch(seed=n) for n in range(2)]
    )
    assert_close(parts.params, whole.params, 1e-4)
    assert part_metrics[1] == pytest.approx(metrics[1], rel=1e-4)


def test_train_metrics_are_loss_and_accuracies_of_the_batch_before_the_update():
    c = config()
    steps, model, state = compiled(c, "jit")
    b = batch()
    images = augment.center_crop(b["image"], STATS, c)
    logits = np.asarray(jax.jit(model.apply)({"params": state.params}, images), np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    rank = (logits > np.take_along_axis(logits, b["label"][:, None], 1)).sum(1)
    _, metrics = steps.train_step(state, steps.place_batch(b))
    assert float(metrics["loss"]) == pytest.approx(
        -log_probs[range(16), b["label"]].mean(), rel=1e-5
    )
    assert float(metrics["top1"]) == (rank == 0).mean()
    assert float(metrics["top5"]) == (rank < 5).mean()
    assert float(metrics["learning_rate"]) == pytest.approx(0.01)


@pytest.mark.parametrize("kind", ["jit", "pmap", "mesh.hybrid"])
def test_evaluation_counts_each_example_once_and_no_padding(kind):
    steps, _, state = compiled(config(), kind)
    whole = steps.unplace(steps.eval_step(state, steps.place_batch(batch())))
    padded = batch()
    padded["label"][10:] = -1
    first = steps.unplace(steps.eval_step(state, steps.place_batch(padded)))
    rest = batch()
    rest["label"][:10] = -1
    second = steps.unplace(steps.eval_step(state, steps.place_batch(rest)))
    assert float(first["count"]) == 10
    assert float(whole["count"]) == 16
    for key in whole:
        assert float(first[key] + second[key]) == pytest.approx(float(whole[key]), rel=1e-5)


def test_ten_views_average_the_softmax_and_take_the_loss_of_the_average():
    c = config(chance=True, **{"eval.views": "ten"})
    steps, model, state = compiled(c, "jit")
    b = batch()
    views = augment.ten_views(b["image"], STATS, c)
    apply = jax.jit(model.apply)
    probs = np.mean([jax.nn.softmax(apply({"params": state.params}, v)) for v in views], axis=0)
    sums = steps.eval_step(state, steps.place_batch(b))
    of_label = probs[range(16), b["label"]]
    assert float(sums["loss"]) == pytest.approx(-np.log(of_label).sum(), rel=1e-4)
    assert float(sums["top1"]) == (probs.argmax(1) == b["label"]).sum()


def test_fewer_than_five_classes_make_every_label_a_top5_hit():
    logits = jnp.eye(3)
    hits = step._in_first(logits, jnp.arange(3), jnp.mean)
    assert hits == {"top1": 1.0, "top5": 1.0}


def test_training_learns_a_batch_by_heart():
    state, history = run(config(), "jit", [batch()] * 120)
    assert history[0]["loss"] > 2
    assert history[-1]["loss"] < 0.05
    assert history[-1]["top1"] == 1
    assert int(state.step) == 120


def test_bfloat16_keeps_float32_parameters_and_velocity():
    c = config()
    model = AlexNet("paper", 10, dtype="bfloat16", dropout=0.0, width=0.1)
    train_step = step.make_train_step(model, c, STATS, optim.make_schedule(c, 10.0))
    state, metrics = jax.eval_shape(
        lambda batch: train_step(step.init_state(model, c), batch), batch()
    )
    floats = jax.tree.leaves((state.params, state.opt_state, metrics))
    assert {x.dtype for x in floats} == {jnp.dtype("float32")}


BAD = [
    ({"batch_size": 18}, "pmap", "batch_size=18 is not divisible by 8 device.*batch_size=24"),
    ({"batch_size": 18}, "mesh.data", "batch_size=18 is not divisible by 8 device.*batch_size=24"),
    ({"hybrid_group": 3}, "mesh.hybrid", "8 devices do not divide into groups of hybrid_group=3"),
    ({"optimizer.gradient_dtype": "float16"}, "mesh.data", "float32, bfloat16"),
    ({"batch_size": 16, "optimizer.accumulate_steps": 3}, "jit", "3 accumulation"),
    ({"batch_size": 0}, "jit", "at least 1"),
    ({}, "gpu", "auto, jit, pmap, mesh.data, mesh.zero, mesh.hybrid"),
]


@pytest.mark.parametrize(("fields", "kind", "told"), BAD)
def test_what_cannot_be_compiled_is_refused_with_the_mend(fields, kind, told):
    c = config(**fields)
    c.parallel = kind
    with pytest.raises(UserError, match=told):
        parallel.check(c)


def test_auto_shares_the_batch_where_there_are_several_devices():
    assert placement.kind(config()) == "mesh.data"


def test_fc_layers_that_a_group_cannot_share_evenly_are_named():
    c = config(hybrid_group=5)
    c.parallel = "mesh.hybrid"
    rows = layer_table(AlexNet(num_classes=10, width=0.1), (64, 64, 3))
    with pytest.raises(UserError, match="24 values of pool5 .* groups of 5.*hybrid_group"):
        parallel.check_layers(c, rows)


def test_update_is_the_papers_in_the_whole_step():
    """One step against v ← −ε (∇ + 0.0005 w) with the gradient taken outside."""
    c = config()
    steps, model, state = compiled(c, "jit")
    before = jax.tree.map(np.array, state.params)
    images = augment.center_crop(batch()["image"], STATS, c)

    def loss(p):
        logits = model.apply({"params": p}, images, train=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch()["label"]).mean()

    grads = jax.jit(jax.grad(loss))(before)
    after, _ = steps.train_step(state, steps.place_batch(batch()))
    for layer, w in before.items():
        expected = w["kernel"] - 0.01 * (grads[layer]["kernel"] + 5e-4 * w["kernel"])
        np.testing.assert_allclose(after.params[layer]["kernel"], expected, rtol=1e-4, atol=1e-7)
        expected = w["bias"] - 0.01 * grads[layer]["bias"]
        np.testing.assert_allclose(after.params[layer]["bias"], expected, rtol=1e-4, atol=1e-7)
