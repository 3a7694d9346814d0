"""Training that starts from a trained network: what is kept, what is frozen, and what is new."""

import functools
import re
import shutil
import signal
from collections import Counter

import commands
import jax
import numpy as np
import optax
import pytest
from images import contents, encode, photograph

from alexnet_jax import config, inference
from alexnet_jax.analysis import hlo
from alexnet_jax.data.augment import Statistics, make_augment
from alexnet_jax.models.build import build_model
from alexnet_jax.train import train_and_evaluate
from alexnet_jax.training import finetune, sharding
from alexnet_jax.training.optimizer import layer_of, make_optimizer
from alexnet_jax.training.train_step import init_state, make_train_step
from alexnet_jax.utils.errors import EXIT_STOPPED, UserError

KINDS = ("jit", "mesh.zero", "mesh.hybrid")  # the slow test below runs pmap
FIVE = ("conv1", "conv2", "conv3", "conv4", "conv5")
QUICKSTART = "configs/quickstart.py"


@pytest.fixture(scope="module", autouse=True)
def fast_compilation():
    """Nothing here runs long enough to be worth XLA's optimizations."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True)
def small_arrays_are_sharded(monkeypatch):
    """By default mesh.zero would replicate all arrays of so narrow a network."""
    monkeypatch.setattr(sharding, "MIN_SHARDED", 1000)


def quickstart(**fields):
    """The quickstart's config with a narrow network."""
    c = config.load(QUICKSTART)
    c.parallel, c.batch_size, c.hybrid_group = "jit", 16, 4
    c.model.variant, c.model.width = "bn", 0.1
    c.update_from_flattened_dict(fields)
    return c


def stats(mean=100.0):
    return Statistics(np.full((72, 72, 3), mean, np.float32), np.eye(3, dtype=np.float32))


def initial_state(c, **options):
    size = c.augment.crop_size
    model, tx = build_model(c), make_optimizer(c, 10.0)
    return jax.jit(lambda: init_state(model, tx, c.seed, (size, size, 3)), **options)()


@functools.cache
def network(**fields):
    """A trained network: none of its weights and statistics equals an initial one."""
    c = quickstart(**fields)
    state = initial_state(c)
    rng = np.random.default_rng(1)
    variables = jax.tree.map(
        lambda x: np.float32(x + rng.uniform(0.01, 0.02, x.shape)),
        jax.device_get({"params": state.params, "batch_stats": state.batch_stats}),
    )
    return inference.Trained(c, build_model(c), variables, stats(), tuple("0123456789"), 5)


@pytest.fixture(scope="module")
def created(tmp_path_factory):
    """A workdir of `network()`."""
    workdir, given = tmp_path_factory.mktemp("created") / "run", network()
    inference.create(workdir, given.config, given.variables, given.stats, given.class_names)
    return workdir


def assert_same(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def batch():
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (16, 72, 72, 3), np.uint8),
        "label": rng.integers(0, 5, 16).astype(np.int32),
    }


def compiled_step(c):
    """Returns how a config spreads over devices, its train step, and shapes of its state."""
    parallel = sharding.make_parallel(c.parallel, c.hybrid_group)
    model = build_model(c, **parallel.model_options(c.optimizer.gradient_dtype))
    augment, tx = make_augment(c, stats()), make_optimizer(c, 10.0)
    step = make_train_step(model, tx, augment, accumulate_steps=c.optimizer.accumulate_steps)
    shapes = jax.eval_shape(lambda: initial_state(c))
    return parallel, parallel.compile_train_step(step, shapes), shapes


FROZEN = {"freeze": ("conv1", "conv3", "fc7"), "model.num_classes": 5}


@functools.cache
def two_steps(kind):
    """Returns the state before and after two steps on five new classes, and its shardings."""
    c = quickstart(**FROZEN, parallel=kind, **{"optimizer.layer_rates": (("fc8", 5.0),)})
    source = finetune.with_classes(network(), c, tuple("56789"))
    parallel, train_step, shapes = compiled_step(c)
    state = initial_state(c, out_shardings=parallel.state_shardings(shapes))
    state = finetune.with_weights(state, source)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    first = sharding.to_host(state)
    for _ in range(2):
        state, _ = train_step(state, parallel.put_batch(batch(), 16))
    return first, sharding.to_host(state), shardings


@pytest.mark.parametrize("kind", KINDS)
def test_run_starts_with_all_layers_of_its_source_and_a_new_fc8(kind):
    first, _, _ = two_steps(kind)
    source = network().variables
    for layer, arrays in source["params"].items():
        if layer != "fc8":
            assert_same(first.params[layer], arrays)
    assert_same(first.batch_stats, source["batch_stats"])
    from_seed = initial_state(quickstart(**FROZEN)).params["fc8"]
    assert from_seed["kernel"].shape[1] == 5
    assert_same(first.params["fc8"], from_seed)


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_layers_and_their_batch_norm_stay_bitwise_and_all_others_change(kind):
    first, last, _ = two_steps(kind)
    for before, after in ((first.params, last.params), (first.batch_stats, last.batch_stats)):
        for name, arrays in before.items():
            for array, x in arrays.items():
                stays = layer_of(name) in FROZEN["freeze"]
                assert np.array_equal(after[name][array], x) == stays, (name, array)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_with_frozen_layers_eight_devices_compute_what_one_does(kind):
    (_, one, _), (_, several, _) = two_steps("jit"), two_steps(kind)
    for a, b in zip(*map(jax.tree.leaves, (several, one)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-3 * float(np.abs(b).max()))


@pytest.mark.parametrize("kind", KINDS[1:])
def test_only_layers_that_train_have_a_velocity_sharded_as_the_parameter(kind):
    _, last, shardings = two_steps(kind)
    velocity = optax.tree.get(last.opt_state, "trace")
    assert {name for name in velocity if jax.tree.leaves(velocity[name])} == {
        name for name in last.params if name[-1] not in "137"
    }
    of_velocity = optax.tree.get(shardings.opt_state, "trace")
    for name, arrays in of_velocity.items():
        if jax.tree.leaves(arrays):
            assert arrays == shardings.params[name]
    assert len({str(s.spec) for s in jax.tree.leaves(of_velocity)}) > 1


@pytest.mark.parametrize("accumulate_steps", [1, 2])
@pytest.mark.parametrize(("freeze", "convolutions", "products"), [((), 14, 9), (FIVE, 5, 8)])
def test_gradients_that_no_layer_needs_are_not_computed(
    freeze, convolutions, products, accumulate_steps
):
    """With frozen convolutions only the forward ones remain, and fc6's input has no gradient."""
    fields = {"model.variant": "single", "optimizer.accumulate_steps": accumulate_steps}
    parallel, train_step, shapes = compiled_step(quickstart(freeze=freeze, **fields))
    inputs = shapes, parallel.put_batch(batch(), 16)
    text = jax.export.export(train_step, platforms=["tpu"])(*inputs).mlir_module()
    count = Counter(re.findall(r"stablehlo\.(convolution|dot_general)", text))
    assert count == {"convolution": convolutions, "dot_general": products + 1}  # color noise


@pytest.mark.parametrize("kind", [pytest.param("pmap", marks=pytest.mark.long), "mesh.data"])
def test_gradients_of_frozen_layers_are_not_sent_between_devices(kind):
    def bytes_added_up(freeze):
        c = quickstart(freeze=freeze, parallel=kind, **{"model.variant": "single"})
        parallel, train_step, shapes = compiled_step(c)
        text = train_step.lower(shapes, parallel.put_batch(batch(), 16)).compile().as_text()
        sent = hlo.collectives(text, 8)
        return sum(each.payload_bytes for each in sent if each.kind == "all-reduce")

    params = network(**{"model.variant": "single"}).variables["params"]
    nbytes = {layer: sum(x.nbytes for x in jax.tree.leaves(params[layer])) for layer in params}
    assert bytes_added_up(()) >= sum(nbytes.values())
    trained = sum(nbytes[layer] for layer in params if layer not in FIVE)
    assert trained <= bytes_added_up(FIVE) < trained + 100  # and the metrics


def test_last_layer_is_kept_only_for_the_same_classes():
    c, names = quickstart(), network().class_names
    assert finetune.with_classes(network(), c, names) is network()
    for other in (names[::-1], names[:9]):  # in another order label 0 is another class
        assert "fc8" not in finetune.with_classes(network(), c, other).variables["params"]
    c.freeze = ("fc8",)
    assert finetune.with_classes(network(), c, names) is network()
    with pytest.raises(UserError, match="freeze names fc8, new in this run"):
        finetune.with_classes(network(), c, names[::-1])


def load_source(created, workdir, **fields):
    c = quickstart(init_from=str(created), **fields)
    return finetune.load_source(c, build_model(c), workdir)


def test_source_may_have_other_classes_rates_and_the_same_scale_written_otherwise(
    created, tmp_path
):
    fields = {"model.num_classes": 3, "learning_rate": 1.0, "augment.pixel_scale": 1 / 32}
    source = load_source(created, tmp_path, **fields, **{"augment.channel_scale": (0.5, 0.5, 0.5)})
    assert_same(source.variables, network().variables)
    assert load_source("", tmp_path) is None


UNFIT = [
    (
        {"model.variant": "owt", "model.width": 0.2},
        "this run's model.variant owt, model.width 0.2; "
        "set --config.model.variant=bn --config.model.width=0.1",
    ),
    (
        {"model.conv1_padding": 0},
        "this run's model.conv1_padding 0; set --config.model.conv1_padding=-1",
    ),
    (
        {"augment.mean": "channel"},
        "this run's augment.mean channel; set --config.augment.mean=image",
    ),
    ({"image_size": 80}, "this run's image_size 80; set --config.image_size=72"),
    ({"augment.pixel_scale": 1.0}, "set --config.augment.pixel_scale=0.015625"),
    (
        {"augment.channel_scale": (1.0, 1.0, 2.0)},
        r"set '--config.augment.channel_scale=\(1.0, 1.0, 1.0\)'",
    ),
    (
        {"augment.crop_size": 96, "image_size": 96, "augment.mean": "image"},
        "set --config.image_size=72",
    ),
]


@pytest.mark.parametrize(("fields", "message"), UNFIT)
def test_source_trained_on_other_inputs_is_rejected_with_the_fields_to_set(
    created, tmp_path, fields, message
):
    with pytest.raises(UserError, match=message):
        load_source(created, tmp_path, **fields)


def test_layer_of_another_shape_is_named_with_both_shapes(tmp_path):
    given = network(**{"augment.mean": "channel"})
    channel_mean = given.stats._replace(mean=np.zeros(3, np.float32))
    names = given.class_names
    inference.create(tmp_path / "source", given.config, given.variables, channel_mean, names)
    fields = {"augment.mean": "channel", "image_size": 100, "augment.crop_size": 96}
    message = (
        r"fc6.kernel has shape \(24, 408\), not \(96, 408\); set --config.augment.crop_size=64"
    )
    with pytest.raises(UserError, match=message):
        load_source(tmp_path / "source", tmp_path / "run", **fields)


def test_missing_source_and_own_workdir_are_rejected_before_anything_is_written(created, tmp_path):
    before = contents(created)
    for source, workdir, message in (
        (tmp_path / "none", tmp_path / "run", f"no trained network in {tmp_path}/none"),
        (created, created, "is the workdir of this very run"),
    ):
        with pytest.raises(UserError, match=message):
            train_and_evaluate(quickstart(init_from=str(source)), workdir)
    assert list(tmp_path.iterdir()) == []
    assert contents(created) == before


def test_mean_is_that_of_the_source_and_color_noise_that_of_the_new_images(created, tmp_path):
    of_data = Statistics(np.ones((72, 72, 3), np.float32), np.full((3, 3), 7, np.float32))
    c = quickstart(init_from=str(created))
    for source in (network(), None):  # None: resuming in a workdir whose statistics.npz is lost
        found = finetune.statistics(c, source, tmp_path, of_data)
        assert_same(found, Statistics(stats().mean, of_data.noise_basis))
    inference.save_statistics(tmp_path, stats(mean=50.0), ("a",))
    found = finetune.statistics(c, None, tmp_path, of_data)
    assert_same(found.mean, stats(mean=50.0).mean)
    assert finetune.statistics(quickstart(), None, tmp_path, of_data) is of_data


def test_finetune_config_starts_from_a_network_like_that_of_torchvision(tmp_path):
    photographs = tmp_path / "photographs"
    for number in range(12):
        file = photographs / ("train", "val")[number % 2] / f"class{number % 3}" / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode(photograph(number)))
    c = config.default_config()
    c.model.variant, c.model.width, c.parallel = "owt", 0.1, "jit"
    c.augment.mean, c.augment.pixel_scale = "channel", 1 / 255
    c.augment.channel_scale = (1 / 0.229, 1 / 0.224, 1 / 0.225)
    params = initial_state(c).params
    mean = 255 * np.array([0.485, 0.456, 0.406], np.float32)
    pixels = Statistics(mean, np.zeros((3, 3), np.float32))
    inference.create(tmp_path / "torchvision", c, {"params": params}, pixels, ())
    fields = {
        "init_from": tmp_path / "torchvision",
        "dataset": f"folder:{photographs}",
        "data_dir": tmp_path / "data",
        "model.num_classes": 3,
        "model.width": 0.1,
        "num_epochs": 1,
        "batch_size": 3,
        "parallel": "jit",
    }
    overrides = [(name, str(value)) for name, value in fields.items()]
    train_and_evaluate(config.load("configs/finetune.py", overrides), tmp_path / "run")
    found = inference.load(tmp_path / "run")
    assert found.class_names == ("class0", "class1", "class2")
    assert_same(found.stats.mean, mean)
    assert found.stats.noise_basis.any()
    assert_same(found.variables["params"]["conv2"], params["conv2"])
    assert not np.array_equal(
        found.variables["params"]["conv3"]["kernel"], params["conv3"]["kernel"]
    )
    summary = (tmp_path / "run" / "summary.txt").read_text()
    assert "frozen: conv1, conv2; " in summary
    assert "step 0; new layers, for these classes: fc8" in summary


OPTIONS = (
    *("--config.num_epochs=1", "--config.learning_rate=0.001", "--config.checkpoint.every_steps=7"),
    *("--config.parallel=pmap", "--config.freeze=conv1,conv2"),
    "--config.optimizer.layer_rates=(('fc8', 10.0),)",
)
STEPS = 20


@pytest.mark.long
def test_stopped_run_resumes_bitwise_on_eight_devices_without_its_source(created, digits, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(created, source)
    more = (*OPTIONS, f"--config.init_from={source}")
    whole = commands.train(digits, tmp_path / "whole", *more)
    assert whole.returncode == 0, whole.stderr
    printed = (
        f"starting from {source}, step 0; same classes",
        "frozen: conv1, conv2; ",
        "parallel=pmap",
    )
    assert all(text in whole.stdout for text in printed)
    stopped = commands.signalled_at(digits, tmp_path / "run", "step      9", signal.SIGTERM, *more)
    assert stopped.returncode == EXIT_STOPPED
    summary = (tmp_path / "run" / "summary.txt").read_text()
    assert all(text in summary for text in printed[:2])
    shutil.rmtree(source)
    again = commands.train(digits, tmp_path / "run", *more)
    assert again.returncode == 0, again.stderr
    assert "resuming from step" in again.stdout
    (step_a, a), (step_b, b) = map(commands.saved_state, (tmp_path / "whole", tmp_path / "run"))
    assert step_a == step_b == STEPS
    assert_same(a, b)
    assert (tmp_path / "run" / "summary.txt").read_text() == summary
    found = inference.load(tmp_path / "run")
    assert_same(found.stats.mean, stats().mean)
    assert_same(found.variables["params"]["conv2"], network().variables["params"]["conv2"])
