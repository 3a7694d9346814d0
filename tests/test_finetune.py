"""Starting from a trained network: what is kept, what stays, what is new, and what it gains."""

import functools
import re
import shutil
import signal
from collections import Counter

import commands
import jax
import numpy as np
import pytest
from images import contents, encode, photograph

from alexnet_jax import config
from alexnet_jax import inference as trained
from alexnet_jax.data import augment
from alexnet_jax.train import train_and_evaluate
from alexnet_jax.training import finetune, placement
from alexnet_jax.training import optimizer as optim
from alexnet_jax.training import sharding as parallel
from alexnet_jax.training import train_step as step
from alexnet_jax.utils.errors import EXIT_STOPPED, UserError

KINDS = ("jit", "mesh.zero", "mesh.hybrid")  # and pmap at the end
FIVE = ("conv1", "conv2", "conv3", "conv4", "conv5")
QUICKSTART = "configs/quickstart.py"


@pytest.fixture(scope="module", autouse=True)
def compiled_sooner():
    """Nothing here runs long enough to be worth XLA's optimizations."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True)
def shared_although_small(monkeypatch):
    """mesh.zero would leave arrays of so narrow a network whole."""
    monkeypatch.setattr(placement, "LEAST_SHARDED", 1000)


def quickstart(**fields):
    """A narrow network of the digits' size."""
    c = config.load(QUICKSTART)
    c.parallel, c.batch_size, c.hybrid_group = "jit", 16, 4
    c.model.variant, c.model.width = "bn", 0.1
    c.update_from_flattened_dict(fields)
    return c


def stats(mean=100.0):
    return augment.Statistics(np.full((72, 72, 3), mean, np.float32), np.eye(3, dtype=np.float32))


@functools.cache
def network(**fields):
    """One that was trained elsewhere: no weight or statistic is like an initial one."""
    c = quickstart(**fields)
    model = parallel.build_model(c)
    state = jax.jit(lambda: step.init_state(model, c))()
    own = {"params": state.params, "batch_stats": state.batch_stats}
    random = np.random.default_rng(1)
    variables = jax.tree.map(
        lambda x: np.float32(x + random.uniform(0.01, 0.02, x.shape)), jax.device_get(own)
    )
    return trained.Trained(c, model, variables, stats(), tuple("0123456789"), 5)


@pytest.fixture(scope="module")
def created(tmp_path_factory):
    """A workdir of `network()`."""
    place, given = tmp_path_factory.mktemp("created") / "run", network()
    trained.create(place, given.config, given.variables, given.stats, given.class_names)
    return place


def assert_same(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def batch():
    random = np.random.default_rng(0)
    return {
        "image": random.integers(0, 256, (16, 72, 72, 3), np.uint8),
        "label": random.integers(0, 5, 16).astype(np.int32),
    }


FROZEN = {"freeze": ("conv1", "conv3", "fc7"), "model.num_classes": 5}


@functools.cache
def after_two_steps(kind):
    """The states at rest at the start and after two steps, of five new classes."""
    c = quickstart(**FROZEN, parallel=kind, **{"optimizer.layer_rates": (("fc8", 5.0),)})
    source = finetune.with_classes(network(), c, tuple("56789"))
    model = parallel.build_model(c)
    steps = parallel.compile_steps(c, model, stats(), optim.make_schedule(c, 10.0))
    state = jax.jit(lambda: step.init_state(model, c), out_shardings=steps.shardings)()
    start = finetune.with_weights(state, source)
    lie = jax.tree.map(lambda x: x.sharding, start)
    first, state = placement.whole(start), steps.place(start)
    for _ in range(2):
        state, _ = steps.train_step(state, steps.place_batch(batch()))
    return first, placement.whole(steps.unplace(state)), lie


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_starts_with_all_layers_of_its_source_but_a_new_fc8(kind):
    first, _, _ = after_two_steps(kind)
    given = network().variables
    for layer, arrays in given["params"].items():
        if layer != "fc8":
            assert_same(first.params[layer], arrays)
    assert_same(first.batch_stats, given["batch_stats"])
    c = quickstart(**FROZEN)
    by_seed = jax.jit(lambda: step.init_state(parallel.build_model(c), c))().params["fc8"]
    assert by_seed["kernel"].shape[1] == 5
    assert_same(first.params["fc8"], by_seed)


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_layers_and_their_norms_stay_to_the_bit_and_all_others_move(kind):
    first, last, _ = after_two_steps(kind)
    for name, arrays in first.params.items():
        for array, x in arrays.items():
            stays = optim.layer_of(name) in FROZEN["freeze"]
            assert np.array_equal(last.params[name][array], x) == stays, (name, array)
    for name, arrays in first.batch_stats.items():
        for array, x in arrays.items():
            stays = optim.layer_of(name) in FROZEN["freeze"]
            assert np.array_equal(last.batch_stats[name][array], x) == stays, (name, array)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_with_frozen_layers_every_kind_on_eight_devices_equals_one(kind):
    (_, one, _), (_, several, _) = after_two_steps("jit"), after_two_steps(kind)
    for a, b in zip(*map(jax.tree.leaves, (several, one)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-3 * float(np.abs(b).max()))


@pytest.mark.parametrize("kind", KINDS[1:])
def test_there_is_a_velocity_of_what_trains_alone_and_it_lies_as_its_parameter(kind):
    _, last, lie = after_two_steps(kind)
    velocity = last.opt_state[-1].trace
    assert set(velocity) == {name for name in last.params if name[-1] not in "137"}
    for name, arrays in lie.opt_state[-1].trace.items():
        assert arrays == lie.params[name]
    shared = {str(s.spec) for s in jax.tree.leaves(lie.opt_state[-1].trace)}
    assert (len(shared) > 1) == (kind in ("mesh.zero", "mesh.hybrid"))


@pytest.mark.parametrize(("freeze", "convolutions", "products"), [((), 14, 9), (FIVE, 5, 8)])
def test_no_gradient_is_computed_that_no_layer_needs(freeze, convolutions, products):
    """Of the convolutions only the forward ones are left, and fc6's inputs have no gradient."""
    c = quickstart(freeze=freeze, **{"model.variant": "owt"})
    steps = parallel.compile_steps(
        c, parallel.build_model(c), stats(), optim.make_schedule(c, 10.0)
    )
    state = jax.eval_shape(lambda: step.init_state(parallel.build_model(c), c))
    text = jax.export.export(steps.train_step, platforms=["tpu"])(state, batch()).mlir_module()
    count = Counter(re.findall(r"stablehlo\.(convolution|dot_general)", text))
    assert count == {"convolution": convolutions, "dot_general": products + 1}  # colour noise


def test_gradients_of_frozen_layers_are_not_sent_between_devices():
    def sent(freeze):
        c = quickstart(freeze=freeze, parallel="mesh.data", **{"model.variant": "owt"})
        model = parallel.build_model(c)
        steps = parallel.compile_steps(c, model, stats(), optim.make_schedule(c, 10.0))
        state = jax.eval_shape(lambda: step.init_state(model, c))
        return steps.train_step.lower(state, batch()).as_text().count('"stablehlo.all_reduce"')

    assert sent(()) - sent(FIVE) == 2 * len(FIVE)  # a kernel and a bias each


def test_the_classes_output_is_kept_for_the_same_classes_alone():
    c, names = quickstart(), network().class_names
    assert finetune.with_classes(network(), c, names) is network()
    for other in (names[::-1], names[:9]):  # by another order label 0 is another class
        assert "fc8" not in finetune.with_classes(network(), c, other).variables["params"]
    c.freeze = ("fc8",)
    assert finetune.with_classes(network(), c, names) is network()
    with pytest.raises(UserError, match="freeze names fc8, which is new here"):
        finetune.with_classes(network(), c, names[::-1])


def load_source(created, workdir, **fields):
    c = quickstart(init_from=str(created), **fields)
    return finetune.load_source(c, parallel.build_model(c), workdir)


def test_any_network_whose_features_fit_can_be_started_from(created, tmp_path):
    fields = {"model.num_classes": 3, "learning_rate": 1.0, "augment.pixel_scale": 1 / 32}
    source = load_source(created, tmp_path, **fields, **{"augment.channel_scale": (0.5, 0.5, 0.5)})
    assert_same(source.variables, network().variables)
    assert load_source("", tmp_path) is None


UNFIT = [
    (
        {"model.variant": "owt", "model.width": 0.2},
        r"\(model.variant owt, model.width 0.2\); "
        "set --config.model.variant=bn --config.model.width=0.1",
    ),
    ({"augment.mean": "channel"}, r"\(augment.mean channel\); set --config.augment.mean=image"),
    ({"image_size": 80}, r"\(image_size 80\); set --config.image_size=72"),
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


@pytest.mark.parametrize(("fields", "told"), UNFIT)
def test_features_of_other_inputs_are_refused_with_all_that_must_be_set(
    created, tmp_path, fields, told
):
    with pytest.raises(UserError, match=told):
        load_source(created, tmp_path, **fields)


def test_a_layer_of_another_shape_is_named_with_both(tmp_path):
    given = network(**{"augment.mean": "channel"})
    channel_mean = given.stats._replace(mean=np.zeros(3, np.float32))
    names = given.class_names
    trained.create(tmp_path / "source", given.config, given.variables, channel_mean, names)
    fields = {"augment.mean": "channel", "image_size": 100, "augment.crop_size": 96}
    told = r"fc6.kernel has shape \(24, 408\), not \(96, 408\); set --config.augment.crop_size=64"
    with pytest.raises(UserError, match=told):
        load_source(tmp_path / "source", tmp_path / "run", **fields)


def test_a_source_that_is_none_is_refused_before_anything_is_written(created, tmp_path):
    before = contents(created)
    for source, workdir, told in (
        (tmp_path / "none", tmp_path / "run", f"no trained network in {tmp_path}/none"),
        (created, created, "is the workdir of this very run"),
    ):
        with pytest.raises(UserError, match=told):
            train_and_evaluate(quickstart(init_from=str(source)), workdir)
    assert list(tmp_path.iterdir()) == []
    assert contents(created) == before


def test_the_mean_is_the_sources_and_the_colour_noise_that_of_the_new_images(created, tmp_path):
    of_data = augment.Statistics(np.ones((72, 72, 3), np.float32), np.full((3, 3), 7, np.float32))
    c = quickstart(init_from=str(created))
    for source in (network(), None):  # None: going on in a workdir that has lost its file
        found = finetune.statistics(c, source, tmp_path, of_data)
        assert_same(found, augment.Statistics(stats().mean, of_data.noise_basis))
    trained.save_statistics(tmp_path, stats(mean=50.0), ("a",))
    found = finetune.statistics(c, None, tmp_path, of_data)
    assert_same(found.mean, stats(mean=50.0).mean)
    assert finetune.statistics(quickstart(), None, tmp_path, of_data) is of_data


def test_the_config_for_photographs_starts_from_a_network_like_torchvisions(tmp_path):
    photographs = tmp_path / "photographs"
    for number in range(12):
        file = photographs / ("train", "val")[number % 2] / f"class{number % 3}" / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode(photograph(number)))
    c = config.default_config()
    c.model.variant, c.model.width, c.parallel = "owt", 0.1, "jit"
    c.augment.mean, c.augment.pixel_scale = "channel", 1 / 255
    c.augment.channel_scale = (1 / 0.229, 1 / 0.224, 1 / 0.225)
    state = step.init_state(parallel.build_model(c), c)
    mean = 255 * np.array([0.485, 0.456, 0.406], np.float32)
    pixels = augment.Statistics(mean, np.zeros((3, 3), np.float32))
    trained.create(tmp_path / "torchvision", c, {"params": state.params}, pixels, ())
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
    found = trained.load(tmp_path / "run")
    assert found.class_names == ("class0", "class1", "class2")
    assert_same(found.stats.mean, mean)
    assert found.stats.noise_basis.any()
    assert_same(found.variables["params"]["conv2"], state.params["conv2"])
    assert not np.array_equal(
        found.variables["params"]["conv3"]["kernel"], state.params["conv3"]["kernel"]
    )
    summary = (tmp_path / "run" / "summary.txt").read_text()
    assert "frozen: conv1, conv2; " in summary
    assert "step 0; fc8 is new, since the classes are others" in summary


OPTIONS = (
    *("--config.num_epochs=1", "--config.learning_rate=0.001", "--config.checkpoint.every_steps=7"),
    *("--config.parallel=pmap", "--config.freeze=conv1,conv2"),
    "--config.optimizer.layer_rates=(('fc8', 10.0),)",
)
STEPS = 20


@pytest.mark.slow
def test_stopped_and_without_its_source_a_run_goes_on_to_the_same_bits(created, digits, tmp_path):
    """On eight devices, by the real command line."""
    source = tmp_path / "source"
    shutil.copytree(created, source)
    more = (*OPTIONS, f"--config.init_from={source}")
    whole = commands.train(digits, tmp_path / "whole", *more)
    assert whole.returncode == 0, whole.stderr
    told = (
        f"starting from {source}, step 0; the classes are the same",
        "frozen: conv1, conv2; ",
        "compiled by pmap",
    )
    assert all(text in whole.stdout for text in told)
    stopped = commands.signalled_at(digits, tmp_path / "run", "step      9", signal.SIGTERM, *more)
    assert stopped.returncode == EXIT_STOPPED
    summary = (tmp_path / "run" / "summary.txt").read_text()
    assert all(text in summary for text in told[:2])
    shutil.rmtree(source)
    again = commands.train(digits, tmp_path / "run", *more)
    assert again.returncode == 0, again.stderr
    assert "going on from step" in again.stdout
    (step_a, a), (step_b, b) = map(commands.saved_state, (tmp_path / "whole", tmp_path / "run"))
    assert step_a == step_b == STEPS
    assert_same(a, b)
    assert (tmp_path / "run" / "summary.txt").read_text() == summary
    found = trained.load(tmp_path / "run")
    assert_same(found.stats.mean, stats().mean)
    assert_same(found.variables["params"]["conv2"], network().variables["params"]["conv2"])
