"""Label smoothing, MixUp, CutMix, random erasing and moving averages of the parameters."""

import dataclasses
import signal

import commands
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats
from test_train_step import BATCH_SIZE, BATCHES, Program, assert_close, make_batch, make_config

from alexnet_jax import inference
from alexnet_jax.data.augment import Statistics, make_augment
from alexnet_jax.training import sharding
from alexnet_jax.training.metrics import read_metrics
from alexnet_jax.training.optimizer import make_optimizer
from alexnet_jax.training.sharding import make_parallel, to_host
from alexnet_jax.training.train_step import averaged, cross_entropy
from alexnet_jax.utils.errors import UserError

RNG = np.random.default_rng(0)
LOGITS = jnp.float32(RNG.normal(size=(6, 10)) * 3)
LABELS = jnp.int32(RNG.integers(0, 10, 6))


# ------------------------------------------------------------------------------------------
# Label smoothing
# ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_smoothed_loss_is_that_of_smoothed_labels(smoothing):
    smoothed = optax.smooth_labels(jax.nn.one_hot(LABELS, 10), smoothing)
    expected = optax.softmax_cross_entropy(LOGITS, smoothed)
    np.testing.assert_allclose(cross_entropy(LOGITS, LABELS, smoothing), expected, rtol=1e-5)


def test_training_smooths_labels_and_evaluation_does_not():
    batch = make_batch()
    plain, smooth = (Program(make_config(label_smoothing=s), "jit") for s in (0.0, 0.5))
    sums = [to_host(p.eval_step(p.state, p.put(batch))) for p in (plain, smooth)]
    assert sums[0] == sums[1]
    losses = [p.train([batch])[1][0]["loss"] for p in (plain, smooth)]
    assert losses[0] == pytest.approx(float(sums[0]["loss"]) / BATCH_SIZE, rel=1e-4)
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


# ------------------------------------------------------------------------------------------
# MixUp and CutMix
# ------------------------------------------------------------------------------------------

SIDE = 24


def mixed(mixup=0.0, cutmix=0.0, count=2000, seed=0):
    """White images whose partners are black."""
    c = make_config(**{"augment.mixup": mixup, "augment.cutmix": cutmix})
    images = np.zeros((count, SIDE, SIDE, 3), np.float32)
    images[::2] = 1.0
    keys = jax.random.split(jax.random.PRNGKey(seed), count)
    found = jax.jit(make_augment(c).mix)(images, jnp.arange(count), keys)
    return {name: np.asarray(x) for name, x in found.items()}


def test_partner_of_image_i_is_image_i_xor_1_and_both_have_the_same_share():
    found = mixed(mixup=1.0)
    np.testing.assert_array_equal(found["label"], np.arange(2000))
    np.testing.assert_array_equal(found["partner_label"], np.arange(2000) ^ 1)
    np.testing.assert_array_equal(found["share"][::2], found["share"][1::2])


@pytest.mark.parametrize("alpha", [0.2, 1.0, 5.0])
def test_mixup_averages_pixels_with_shares_of_a_beta_distribution(alpha):
    found = mixed(mixup=alpha)
    shares = found["share"][::2]
    white, black = found["image"][::2], found["image"][1::2]
    np.testing.assert_allclose(white, np.broadcast_to(shares[:, None, None, None], white.shape))
    np.testing.assert_allclose(black, 1 - white, atol=1e-6)
    assert stats.kstest(shares, stats.beta(alpha, alpha).cdf).pvalue > 0.01


def test_cutmix_takes_one_rectangle_and_the_share_is_what_is_left():
    found = mixed(cutmix=1.0)
    for image, share in zip(found["image"][::2], found["share"][::2], strict=True):
        kept = image[..., 0] == 1
        assert set(np.unique(image)) <= {0.0, 1.0}
        assert kept.mean() == pytest.approx(share, abs=1e-6)
        rows, columns = (~kept).any(axis=1), (~kept).any(axis=0)
        assert (~kept).sum() == rows.sum() * columns.sum()  # a rectangle
    # The area that a box of share 1 - λ has inside the image, for λ uniform (Beta(1, 1)).
    rng = np.random.default_rng(1)
    half = np.floor(0.5 * np.sqrt(rng.uniform(size=20000)) * SIDE)
    center = rng.integers(0, SIDE, (2, 20000))
    sides = np.minimum(center + half, SIDE) - np.maximum(center - half, 0)
    assert stats.ks_2samp(found["share"][::2], 1 - sides.prod(axis=0) / SIDE**2).pvalue > 0.01


def test_with_both_each_pair_gets_one_of_them():
    found = mixed(mixup=1.0, cutmix=1.0)
    is_cut = [len(np.unique(image)) == 2 or image.min() in (0, 1) for image in found["image"][::2]]
    assert 0.45 < np.mean(is_cut) < 0.55


def test_loss_of_a_mixed_image_is_the_mean_over_its_labels():
    c = make_config(**{"augment.mixup": 0.5, "label_smoothing": 0.1})
    program, batch = Program(c, "jit"), make_batch()
    key = jax.random.fold_in(jax.random.fold_in(program.state.key, 0), 0)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(BATCH_SIZE))
    seen = program.augment.mix(program.augment(batch["image"], keys), batch["label"], keys)
    logits = program.model.apply({"params": to_host(program.state.params)}, seen["image"])
    losses, top1 = [], []
    for n in range(BATCH_SIZE):
        share = float(seen["share"][n])
        for label, weight in ((batch["label"][n], share), (batch["label"][n ^ 1], 1 - share)):
            losses.append(weight * float(cross_entropy(logits[n][None], label[None], 0.1)[0]))
            top1.append(weight * float(logits[n].argmax() == label))
    _, (metrics,) = program.train([batch])
    assert metrics["loss"] == pytest.approx(np.sum(losses) / BATCH_SIZE, rel=1e-4)
    assert metrics["top1"] == pytest.approx(np.sum(top1) / BATCH_SIZE, abs=1e-6)


def test_odd_number_of_images_on_a_device_is_refused():
    c = make_config(parallel="mesh.data", batch_size=24, **{"augment.cutmix": 1.0})
    with pytest.raises(UserError, match=r"8 device\(s\) 3 images.*--config.batch_size=32"):
        sharding.build_network(c)


# ------------------------------------------------------------------------------------------
# Random erasing
# ------------------------------------------------------------------------------------------


def test_erasing_leaves_the_mean_in_one_rectangle_of_some_images():
    c = make_config(**{"augment.erase": 0.3, "augment.mean": "channel"})
    c.augment.crop_size = 72
    mean = np.float32([10, 20, 30])
    augment = make_augment(c, Statistics(mean, np.zeros((3, 3), np.float32)))
    images = np.full((2000, 72, 72, 3), 200, np.uint8)
    keys = jax.random.split(jax.random.PRNGKey(0), 2000)
    erased = np.asarray(jax.jit(augment)(images, keys) == 0).all(axis=-1)
    shares = erased.mean(axis=(1, 2))
    assert 0.27 < (shares > 0).mean() < 0.33
    # Most draws fit, so that areas are uniform from 2 to 33 %, nearly.
    areas = shares[shares > 0]
    assert 0.015 < areas.min() < 0.03 and 0.3 < areas.max() < 0.34
    for image in erased[shares > 0][:100]:
        assert image.sum() == image.any(axis=0).sum() * image.any(axis=1).sum()


# ------------------------------------------------------------------------------------------
# Moving averages
# ------------------------------------------------------------------------------------------


def test_average_follows_the_parameters_with_a_decay_that_rises_to_ema_decay():
    program = Program(make_config("bn", **{"optimizer.ema_decay": 0.3}), "jit")
    state = program.state
    expected = to_host({"params": state.params, "batch_stats": state.batch_stats})
    for step in range(1, 6):
        state, _ = program.train_step(state, program.put(make_batch(step)))
        decay = min(0.3, (1 + step) / (10 + step))
        now = to_host({"params": state.params, "batch_stats": state.batch_stats})
        expected = jax.tree.map(lambda a, x, d=decay: d * a + (1 - d) * x, expected, now)
    assert_close(to_host(state.average), expected, 1e-5)
    evaluated = averaged(state)
    assert_close(to_host(evaluated.params), expected["params"], 1e-5)
    assert_close(to_host(evaluated.batch_stats), expected["batch_stats"], 1e-5)


def test_without_averaging_the_state_has_no_average():
    state = Program(make_config(), "jit").state
    assert state.average == {}
    assert averaged(state).params is state.params


# ------------------------------------------------------------------------------------------
# Several devices
# ------------------------------------------------------------------------------------------

EVERYTHING = {
    "label_smoothing": 0.1,
    "augment.mixup": 0.2,
    "augment.cutmix": 1.0,
    "augment.erase": 0.25,
    "augment.trivial": True,
    "augment.mean": "channel",
    "optimizer.ema_decay": 0.99,
    "optimizer.nesterov": True,
}


@pytest.mark.parametrize(
    "kind",
    [
        "mesh.data",
        pytest.param("pmap", marks=pytest.mark.long),
        *(pytest.param(k, marks=pytest.mark.long) for k in ("mesh.zero", "mesh.hybrid")),
    ],
)
def test_every_kind_on_eight_devices_equals_one_device_with_everything(kind, request):
    one, metrics_one = request.getfixturevalue("one_device")
    config = make_config("bn", randomness=True, hybrid_group=4, **EVERYTHING)
    several, metrics = Program(config, kind).train(BATCHES)
    assert_close(several.params, one.params, 1e-3)
    assert_close(several.average, one.average, 1e-3)
    for a, b in zip(metrics, metrics_one, strict=True):
        assert a == pytest.approx(b, rel=1e-3)


@pytest.fixture(scope="module")
def one_device():
    return Program(make_config("bn", randomness=True, **EVERYTHING), "jit").train(BATCHES)


def test_mixing_sends_nothing_to_another_device():
    c = make_config(**{"augment.mixup": 0.2, "augment.cutmix": 1.0})
    split = make_parallel("mesh.data").batch_sharding
    shapes = ((BATCH_SIZE, 72, 72, 3), np.float32), ((BATCH_SIZE,), np.int32)
    inputs = [jax.ShapeDtypeStruct(*shape, sharding=split) for shape in shapes]
    keys = jax.ShapeDtypeStruct((BATCH_SIZE, 2), np.uint32, sharding=split)
    text = jax.jit(make_augment(c).mix).lower(*inputs, keys).compile().as_text()
    for collective in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
        assert collective not in text


def test_accumulated_parts_are_mixed_before_they_are_split():
    config = make_config(randomness=False, **{"augment.mixup": 0.2})
    whole, metrics = Program(config, "jit").train(BATCHES)
    config.optimizer.accumulate_steps = 2
    parts, part_metrics = Program(config, "jit").train(BATCHES)
    assert_close(parts.params, whole.params, 1e-4)
    assert part_metrics[1] == pytest.approx(metrics[1], rel=1e-4)


# ------------------------------------------------------------------------------------------
# Crop sizes
# ------------------------------------------------------------------------------------------

SIZES = {"schedule.changes": ((0.0, "data", "crop_size", 64), (1.5, "data", "crop_size", 70))}


def test_crop_size_changes_at_its_epoch_and_evaluation_has_its_own():
    c = make_config(randomness=True, **SIZES, **{"eval.crop_size": 72})
    augment = make_augment(c, steps_per_epoch=10.0)
    assert [augment.crop_size_at(step) for step in (0, 14, 15, 99)] == [64, 64, 70, 70]
    images = make_batch()["image"]
    keys = jax.random.split(jax.random.PRNGKey(0), BATCH_SIZE)
    for size in (64, 70):
        sized = dataclasses.replace(augment, crop_size=size)
        assert sized(images, keys).shape == (BATCH_SIZE, size, size, 3)
        assert sized.center(images).shape == (BATCH_SIZE, 72, 72, 3)
        np.testing.assert_array_equal(sized.center(images), augment.center(images))


BAD_SIZES = [
    ({"eval.crop_size": 80}, r"eval.crop_size=80 must lie between 1 and image_size=72"),
    ({"schedule.changes": ((1.0, "data", "crop_size", 0.5),)}, "must lie between 1 and image_size"),
    ({"schedule.changes": ((1.0, "fc6", "crop_size", 64),)}, "crop_size cannot change for 'fc6'"),
    ({"eval.crop_size": 96, "image_size": 128}, "eval.crop_size=96: the network.*at most 66"),
    ({"schedule.changes": ((1.0, "data", "crop_size", 20),)}, "crop_size=20.*at least 63"),
]


@pytest.mark.parametrize(("fields", "message"), BAD_SIZES)
def test_crop_size_that_does_not_fit_is_refused(fields, message):
    c = make_config(randomness=True, **fields)
    with pytest.raises(UserError, match=message):
        make_augment(c)
        make_optimizer(c, 1.0)
        sharding.build_network(c)


def test_owt_takes_any_size():
    c = make_config("owt", randomness=True, image_size=128, **{"eval.crop_size": 128})
    sharding.build_network(c)


# ------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_run_with_everything_resumes_bitwise_and_serves_its_average(digits, tmp_path):
    options = [f"--config.{name}={value}" for name, value in EVERYTHING.items()]
    options += ["--config.schedule.changes=((1.0, 'data', 'crop_size', 66),)", *commands.OFTEN]
    options += ["--config.eval.crop_size=65", "--config.augment.color_noise=0.0"]
    whole = commands.train(digits, tmp_path / "whole", *options)
    assert whole.returncode == 0, whole.stderr
    assert "crops of 66 pixels from here on" in whole.stdout
    assert "without averaging top1" in whole.stdout
    killed = commands.signalled_at(
        digits, tmp_path / "killed", "step     29", signal.SIGKILL, *options
    )
    assert killed.returncode == -signal.SIGKILL
    again = commands.train(digits, tmp_path / "killed", *options)
    assert again.returncode == 0, again.stderr
    (_, expected), (_, state) = (commands.saved_state(tmp_path / w) for w in ("whole", "killed"))
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    network = inference.load(tmp_path / "whole", step=40)
    jax.tree.map(
        np.testing.assert_array_equal, network.variables["params"], state["average"]["params"]
    )
    last = [row for row in read_metrics(tmp_path / "whole") if row["split"] == "eval"][-1]
    assert last.keys() > {"top1", "last_top1"} and last["loss"] != last["last_loss"]
    assert network.augment.view_size == 65
