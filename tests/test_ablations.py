"""`model.ablation`: the paper's ablations as edits of a variant's list of layers."""

import jax
import numpy as np
import pytest
from narrow_model import NARROW, apply, images, random_variables

from alexnet_jax import VARIANTS, AlexNet, convert, default_config, export, inference, layer_table
from alexnet_jax.data.augment import Statistics
from alexnet_jax.models.ablations import ABLATIONS, ablate
from alexnet_jax.models.alexnet import Dropout, MaxPool, ReLU, Tanh, kernel_layers, named_layers
from alexnet_jax.models.build import build_model
from alexnet_jax.training import finetune, sharding
from alexnet_jax.training.optimizer import make_schedule
from alexnet_jax.utils.errors import UserError


def ablated_config(*names, variant="paper", **fields):
    config = default_config()
    config.parallel = "jit"
    config.model.variant, config.model.ablation = variant, names
    config.model.width, config.model.num_classes = NARROW, 10
    config.image_size, config.augment.crop_size = 72, 64
    config.augment.mean = "channel"
    with config.unlocked():
        config.update_from_flattened_dict(fields)
    return config


# ------------------------------------------------------------------------------------------
# What each ablation changes
# ------------------------------------------------------------------------------------------

FC7_AND_FC8 = 4096 * 4096 + 4096 + 4096 * 1000 + 1000


def weights(outputs, inputs, size=1):
    return outputs * inputs * size**2 + outputs


# Parameters at 224 pixels by the paper's formulas; the inputs of grouped layers are halved.
PARAMS = {
    ("no_lrn",): 60_965_224,
    ("pool_2x2",): 60_965_224,  # the maps have the same sizes
    ("tanh",): 60_965_224,
    ("no_dropout",): 60_965_224,
    ("one_tower",): 62_378_344,
    ("half_filters",): weights(48, 3, 11)
    + weights(128, 24, 5)
    + weights(192, 128, 3)
    + weights(192, 96, 3)
    + weights(256, 96, 3)
    + weights(4096, 9216)
    + FC7_AND_FC8,
    ("no_conv3",): 60_965_224 - weights(384, 256, 3) - 384 * (192 - 128) * 9,
    ("no_conv4",): 60_965_224 - weights(384, 192, 3),
    ("no_conv5",): 60_965_224 - weights(256, 192, 3) + 4096 * 6 * 6 * (384 - 256),
    ("no_conv3", "no_conv4"): 60_965_224
    - weights(384, 256, 3)
    - weights(384, 192, 3)
    - 256 * (192 - 128) * 9,
    ("no_fc6",): 60_965_224 - weights(4096, 9216) + 4096 * (9216 - 4096),
    ("no_fc7",): 60_965_224 - weights(4096, 4096),
    ("no_fc6", "no_fc7"): 60_965_224
    - weights(4096, 9216)
    - weights(4096, 4096)
    + 1000 * (9216 - 4096),
}


@pytest.mark.parametrize("names", PARAMS, ids=",".join)
def test_ablated_paper_has_the_parameters_of_the_formulas(names):
    rows = layer_table(AlexNet(ablate("paper", names)), (224, 224, 3))
    assert sum(row.params for row in rows) == PARAMS[names]
    (last_pool,) = [row for row in rows if row.name.startswith("pool")][-1:]
    assert last_pool.output_shape[:2] == (6, 6)


def test_one_tower_without_lrn_is_variant_single_with_the_dropout_of_the_paper():
    single = tuple(Dropout() if isinstance(x, Dropout) else x for x in VARIANTS["single"])
    assert ablate("paper", ("one_tower", "no_lrn")) == single


def test_no_ablation_returns_the_variant_by_its_name():
    assert ablate("paper", ()) == "paper"


def test_removed_layer_takes_its_nonlinearity_and_norm_but_not_its_pooling():
    before, after = named_layers("bn"), named_layers(ablate("bn", ("no_conv5",)))
    gone = ["conv5", "bn5", "relu5"]
    assert list(after.values()) == [x for name, x in before.items() if name not in gone]
    assert list(after)[list(after).index("relu4") :][:3] == ["relu4", "pool4", "fc5"]


def test_order_of_the_names_does_not_matter():
    names = ("tanh", "no_conv4", "half_filters", "no_conv3")
    assert ablate("paper", names) == ablate("paper", names[::-1])


def test_tanh_network_computes_what_its_list_of_layers_does():
    x = images(63)
    by_hand = tuple(Tanh() if isinstance(x, ReLU) else x for x in VARIANTS["paper"])
    models = [AlexNet(v, 10, width=NARROW) for v in (ablate("paper", ("tanh",)), by_hand)]
    variables = random_variables(models[0], x)
    first, second = (np.asarray(apply(model, variables, x)) for model in models)
    np.testing.assert_array_equal(first, second)
    assert np.ptp(first) > 0


@pytest.mark.parametrize("size", range(63, 75))
def test_pools_without_overlap_give_the_sizes_of_the_paper(size):
    shapes = [
        [row.output_shape[:2] for row in layer_table(AlexNet(v, width=NARROW), (size, size, 3))]
        for v in ("paper", ablate("paper", ("pool_2x2",)))
    ]
    assert shapes[0] == shapes[1]
    assert MaxPool(2, 2, ceil=False) in ablate("paper", ("pool_2x2",))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_ablation_of_every_variant_applies_or_says_why_not(variant):
    for name in (*ABLATIONS, *(f"no_{layer}" for layer in kernel_layers(variant)[1:-1])):
        try:
            layers = ablate(variant, (name,))
        except UserError as error:
            assert name in str(error) and variant in str(error)
        else:
            (*_, last) = layer_table(AlexNet(layers, 10, width=NARROW), (224, 224, 3))
            assert last.output_shape == (10,)


REJECTED = {
    "unknown ablation 'no_lnr' of variant paper; the nearest are no_lrn": ("paper", "no_lnr"),
    "unknown ablation 'no_conv1' .* no_conv3": ("paper", "no_conv1"),  # the only one with stride 4
    "unknown ablation 'no_fc8'": ("paper", "no_fc8"),
    "unknown ablation 'no_conv6' .* no_conv5": ("paper", "no_conv6"),
    "no_lrn changes nothing in variant owt; leave it out": ("owt", "no_lrn"),
    "one_tower changes nothing in variant bn": ("bn", "one_tower"),
    "no_conv2 is impossible in variant paper, because two pooling": ("paper", "no_conv2"),
    "no_dropout changes nothing in variant cifar_80sec": ("cifar_80sec", "no_dropout"),
}


@pytest.mark.parametrize("message", REJECTED)
def test_unknown_and_impossible_ablations_are_rejected_by_name(message):
    variant, name = REJECTED[message]
    with pytest.raises(UserError, match=message):
        build_model(ablated_config(name, variant=variant))


# ------------------------------------------------------------------------------------------
# Everything that reads a config sees the ablated network
# ------------------------------------------------------------------------------------------


def test_layer_table_and_schedule_have_the_layers_that_are_left():
    config = ablated_config("no_conv3", "no_fc6")
    _, _, rows = sharding.build_network(config)
    names = [row.name for row in rows]
    assert names == ["conv1", "pool1", "conv2", "pool2", "conv3", "conv4", "pool4", "fc5", "fc6"]
    config.optimizer.layer_rates = (("fc6", 10.0),)
    make_schedule(config, 10.0)
    for field in ("freeze", "optimizer.layer_rates"):
        bad = ablated_config("no_conv3", "no_fc6")
        value = ("fc8",) if field == "freeze" else (("fc8", 10.0),)
        bad.update_from_flattened_dict({field: value})
        with pytest.raises(UserError, match="unknown layer 'fc8'"):
            make_schedule(bad, 10.0)


@pytest.fixture(scope="module")
def ablated_workdir(tmp_path_factory):
    """Returns the workdir of a random network of `paper` without conv3 and with tanh."""
    workdir = tmp_path_factory.mktemp("ablated") / "run"
    config = ablated_config("no_conv3", "tanh")
    model = build_model(config)
    variables = random_variables(model, images(64))
    stats = Statistics(np.full(3, 100, np.float32), np.zeros((3, 3), np.float32))
    inference.create(workdir, config, variables, stats, [f"c{n}" for n in range(10)])
    return workdir


def test_saved_network_is_loaded_and_exported_as_ablated(ablated_workdir, tmp_path):
    network = inference.load(ablated_workdir)
    assert network.config.model.ablation == ("no_conv3", "tanh")
    assert "tanh1" in named_layers(network.model.variant)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 72, 72, 3)).astype(np.uint8)
    expected = network.predict(pixels)
    assert set(network.features(pixels, ["conv4", "fc7"])) == {"conv4", "fc7"}
    export.export(network, tmp_path / "a.jaxexport", platforms=("cpu",))
    program = jax.export.deserialize((tmp_path / "a.jaxexport").read_bytes())
    np.testing.assert_allclose(program.call(pixels), expected, rtol=1e-4, atol=1e-6)
    assert '"no_conv3"' in (tmp_path / "a.jaxexport.json").read_text()


def test_run_that_starts_from_another_network_needs_the_same_ablation(ablated_workdir, tmp_path):
    config = ablated_config("no_conv3", init_from=str(ablated_workdir))
    with pytest.raises(UserError, match="config.model.ablation=.*no_conv3.*tanh"):
        finetune.load_source(config, build_model(config), tmp_path / "new")
    config.model.ablation = ("tanh", "no_conv3")
    finetune.load_source(config, build_model(config), tmp_path / "new")


def test_ablated_network_does_not_become_torchvisions(ablated_workdir, tmp_path):
    with pytest.raises(UserError, match="variant paper with no_conv3, tanh of width 0.1"):
        convert.to_torch(ablated_workdir, tmp_path / "a.safetensors")
