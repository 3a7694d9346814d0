"""Costs of a training step on a TPU slice, and the command that prints them."""

import contextlib
import dataclasses
import importlib.util
import json
import os
import sys
from types import SimpleNamespace

import jax
import pytest
from commands import run

from alexnet_jax import config as configs
from alexnet_jax import plan
from alexnet_jax.analysis import hlo, step_costs, targets
from alexnet_jax.training import sharding
from alexnet_jax.utils.errors import EXIT_USER_ERROR, UserError

POD = ("--config", "configs/imagenet_pod.py")
V5E = targets.load("v5e")
BATCH, GROUP, KINDS = 16, 4, ("mesh.data", "mesh.zero", "mesh.hybrid")
# The eight CPU devices of the tests stand for a slice of 2 × 4 chips.
SLICE = [SimpleNamespace(coords=(x, y)) for x in range(2) for y in range(4)]


def narrow_config(kind, **fields):
    c = configs.default_config()
    c.image_size, c.augment.crop_size, c.batch_size = 72, 64, BATCH
    c.model.variant, c.model.num_classes, c.model.width = "single", 8, 0.0625
    c.parallel, c.hybrid_group = kind, GROUP
    c.update_from_flattened_dict(fields)
    return c


@pytest.fixture(scope="module")
def steps():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "MIN_SHARDED", 1000)  # because the network is narrow
        compiled = {
            kind: step_costs.compile_step(narrow_config(kind), jax.devices()) for kind in KINDS
        }
    return {kind: step._replace(devices=SLICE) for kind, step in compiled.items()}


@pytest.fixture(scope="module")
def costs(steps):
    return {kind: step_costs.step_costs(step, V5E, num_hosts=2) for kind, step in steps.items()}


def bytes_of(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def params(steps):
    """Returns the bytes of all parameters and of the kernels of fc6 to fc8."""
    tree = steps["mesh.data"].state.params
    return bytes_of(tree), bytes_of([tree[fc]["kernel"] for fc in ("fc6", "fc7", "fc8")])


def test_memory_of_each_kind(steps, costs):
    whole, fc = params(steps)
    memory = {kind: costs[kind]["memory"] for kind in KINDS}
    assert memory["mesh.data"]["params"] == whole
    assert memory["mesh.hybrid"]["params"] == whole - fc + fc / GROUP
    assert whole / 8 < memory["mesh.zero"]["params"] < whole / 6  # small arrays are replicated
    for of_kind in memory.values():
        assert of_kind["optimizer"] == of_kind["params"]  # a velocity for each parameter
        assert of_kind["batch"] == BATCH / 8 * (72 * 72 * 3 + 4)  # 4 bytes of a label


def test_total_memory_counts_donated_arrays_once(steps, costs):
    for kind, step in steps.items():
        memory, found = costs[kind]["memory"], step.program.memory_analysis()
        inputs = memory["params"] + memory["optimizer"] + memory["batch"]
        assert found.argument_size_in_bytes == pytest.approx(inputs, abs=64)
        metrics = found.output_size_in_bytes - found.alias_size_in_bytes
        assert 0 < metrics < 1000
        assert memory["total"] == found.argument_size_in_bytes + metrics + memory["temporaries"]


def test_activations_are_the_outputs_of_all_layers(steps, costs):
    sizes = {"conv1": 15, "conv2": 7, "conv3": 3, "conv4": 3, "conv5": 3}  # for 64×64 pixels
    pooled = {"conv1": 7, "conv2": 3, "conv5": 1}
    values = sum(
        (sizes.get(layer, 1) ** 2 + pooled.get(layer, 0) ** 2) * arrays["bias"].size
        for layer, arrays in steps["mesh.data"].state.params.items()
    )
    assert costs["mesh.data"]["memory"]["activations"] == BATCH / 8 * values * 4


SMALL = 2000  # bytes of metrics and of this tiny network's logits


def payloads(costs, kind):
    """Returns the payload bytes by collective and number of devices, without the small ones."""
    sums = {}
    for found in costs[kind]["collectives"]:
        key = (found["kind"], found["group"])
        sums[key] = sums.get(key, 0) + found["runs"] * found["payload_bytes"]
    return {key: size for key, size in sums.items() if size > SMALL}


def test_data_parallelism_sums_every_gradient_over_all_devices(steps, costs):
    whole, _ = params(steps)
    assert payloads(costs, "mesh.data") == {("all-reduce", 8): pytest.approx(whole, abs=64)}
    largest = max(costs["mesh.data"]["collectives"], key=lambda found: found["bytes_sent"])
    assert (largest["dtypes"], largest["links"]) == ("f32", 2)
    assert largest["bytes_sent"] == 2 * 7 / 8 * largest["payload_bytes"]
    assert largest["seconds"] == pytest.approx(largest["bytes_sent"] / (2 * 50e9))


def test_zero_gathers_parameters(steps, costs):
    found = payloads(costs, "mesh.zero")
    whole, fc = params(steps)
    assert found["all-gather", 8] > (whole - fc) / 2
    assert all(group == 8 for _, group in found)


def test_hybrid_sums_the_parts_of_fc_kernels_between_groups(steps, costs):
    whole, fc = params(steps)
    tree = steps["mesh.hybrid"].state.params
    # Every device has all images of its group in fc6 to fc8, so their biases need no more.
    fc_biases = bytes_of([tree[layer]["bias"] for layer in ("fc6", "fc7", "fc8")])
    found = payloads(costs, "mesh.hybrid")
    assert found["all-reduce", 2] == fc / GROUP + fc_biases
    assert found["all-reduce", 8] == pytest.approx(whole - fc - fc_biases, abs=64)
    in_groups = {collective for collective, group in found if group == GROUP}
    assert "all-gather" in in_groups  # activations
    links = {c["group"]: c["links"] for c in costs["mesh.hybrid"]["collectives"]}
    assert links == {2: 1, 4: 1, 8: 2}  # a group is a row of the slice


class ProgramWithCycles:
    """A program with an estimate for each fusion, which libtpu writes and XLA for CPU does not."""

    def __init__(self, program, cycles):
        self.memory_analysis = program.memory_analysis
        self.cost_analysis = program.cost_analysis
        self.text = program.as_text().replace(
            " fusion(", f' fusion(), x={{"estimated_cycles":"{cycles}"}}, y=('
        )

    def as_text(self):
        return self.text


def test_costs_add_up(steps):
    step = steps["mesh.data"]
    step = step._replace(program=ProgramWithCycles(step.program, 1500))
    operations, _ = hlo.operation_cycles(step.program.as_text())
    found = step_costs.step_costs(step, V5E, num_hosts=2)
    assert found["cycles"] == sum(operation.cycles for operation in operations) > 0
    assert found["compute_s"] == pytest.approx(found["cycles"] / 1.5e9)
    assert found["communication_s"] == sum(c["seconds"] for c in found["collectives"]) > 0
    assert found["bytes_sent"] == sum(c["bytes_sent"] for c in found["collectives"])
    assert found["step_s"] == found["compute_s"] + found["communication_s"]
    assert found["step_s_if_all_overlaps"] == max(found["compute_s"], found["communication_s"])
    assert found["images_per_s"] == pytest.approx(BATCH / found["step_s"])
    assert found["images_per_s_per_host"] == pytest.approx(found["images_per_s"] / 2)
    layout = (found["layout"], found["gradient_dtype"], found["devices"])
    assert layout == ("mesh.data", "float32", 8)


def test_layout_fits_into_the_memory_of_a_chip_or_not(steps, costs):
    total = costs["mesh.data"]["memory"]["total"]
    for memory_bytes, fits in ((total, True), (total - 1, False)):
        chip = dataclasses.replace(V5E, memory_bytes=memory_bytes)
        assert step_costs.step_costs(steps["mesh.data"], chip)["fits"] is fits


@pytest.mark.parametrize(
    ("count", "fields", "message"),
    [
        (8, {"batch_size": 12}, "batch_size=12 is not divisible by 8 device"),
        (8, {"hybrid_group": 3}, "do not divide into groups of hybrid_group=3"),
        (6, {"hybrid_group": 6, "batch_size": 18}, "cannot be split over groups of 6"),
    ],
)
def test_configs_that_do_not_fit_the_devices(count, fields, message):
    with pytest.raises(UserError, match=message):
        sharding.build_network(narrow_config("mesh.hybrid", **fields), jax.devices()[:count])


@pytest.mark.parametrize(
    ("group", "count"),  # of chips on a 16 × 16 torus
    [
        ([(x, y) for x in range(16) for y in range(16)], 4),
        ([(x, 0) for x in range(16)], 2),
        ([(x, 0) for x in range(8)], 1),
        ([(x, y) for x in range(4) for y in range(4)], 2),
        ([(x, y) for x in (0, 8) for y in range(16)], 2),
        ([(0, 0), (8, 0)], 1),
    ],
)
def test_links_that_a_group_can_use(group, count):
    assert step_costs.count_links(group, (16, 16), V5E) == count


@pytest.mark.parametrize(
    ("kind", "devices", "links", "bytes_over_a_link"),
    [
        ("all-reduce", 256, 4, 2 * 255 / 256 * 200e6 / 4),
        ("all-gather", 16, 2, 15 / 16 * 200e6 / 2),
        ("collective-permute", 16, 1, 200e6),
        ("all-to-all", 16, 1, 16 / 4 * 200e6),  # half of it crosses the middle of the line
    ],
)
def test_time_of_a_collective(kind, devices, links, bytes_over_a_link):
    for runs in (1, 3):
        collective = hlo.Collective(kind, "f32", 200_000_000, tuple(range(devices)), runs)
        expected = runs * bytes_over_a_link / 50e9
        assert step_costs.seconds(collective, links, V5E) == pytest.approx(expected)


def test_summary_of_a_layout(costs):
    found = costs["mesh.hybrid"]
    summary = plan.describe(found)
    assert summary.startswith("mesh.hybrid, gradients in float32\n")
    assert f"{found['memory']['total'] / 1e6:.0f} MB: params" in summary
    assert f"{found['bytes_sent'] / 1e6:.1f} MB per device" in summary
    assert "× all-reduce of f32 over 2 devices" in summary
    assert f"{found['images_per_s']:,.0f} images/s" in summary
    assert "DOES NOT FIT" in plan.describe(found | {"fits": False})
    assert "no estimate for 3 sort" in plan.describe(
        found | {"operations_without_cycles": {"sort": 3}}
    )


def test_choice_of_layouts():
    everything = plan.choose_layouts(None)
    assert len(everything) == len(set(everything)) == 6
    zero = [("mesh.zero", "float32"), ("mesh.zero", "bfloat16")]
    assert plan.choose_layouts(["mesh.zero"]) == zero
    assert plan.choose_layouts(["mesh.zero,bfloat16", "mesh.zero"]) == zero[::-1]
    with pytest.raises(UserError, match="--layouts pmap does not exist; choose from mesh.data"):
        plan.choose_layouts(["mesh.data", "pmap"])


@pytest.mark.parametrize("topology", ["v5e", "v9z:2x2", "v5e:2", "16x16"])
def test_topologies_that_do_not_exist(topology):
    with pytest.raises(UserError, match="is not a topology; write it like v5e:"):
        targets.topology_devices(topology)


@pytest.mark.parametrize("topology", ["h100:0", "h100:9", "a100:2x4"])
def test_numbers_of_gpus_that_no_machine_has(topology):
    with pytest.raises(UserError, match="the GPUs of one machine are 1 to 8, as in [ah]100:8"):
        targets.topology_devices(topology)


def test_reading_rate_of_prepared_data(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "MEASURED_S", 0.05)

    def rate(data_dir):
        fields = [("data_dir", str(data_dir)), ("batch_size", "16")]
        return plan.reading_rate(configs.load("configs/quickstart.py", fields))

    assert rate(digits) > 0
    assert rate(tmp_path) is None


def command(*more):
    return run(
        *(sys.executable, "-m", "alexnet_jax.plan", *POD),
        *more,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
    )


@pytest.mark.parametrize(
    ("module", "topology", "package"),
    [
        ("libtpu", "v5e:2x2", "libtpu"),
        ("jax_plugins.xla_cuda12", "h100:1", "jax-cuda12-plugin"),
    ],
)
def test_command_without_a_compiler(module, topology, package):
    with contextlib.suppress(ModuleNotFoundError):  # there is no jax_plugins
        if importlib.util.find_spec(module):
            pytest.skip(f"{module} is installed")
    done = command(f"--topology={topology}")
    assert done.returncode == EXIT_USER_ERROR
    assert f"pip install '{package}" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.plan
def test_environment_is_restored_after_libtpu():
    pytest.importorskip("libtpu")
    before = dict(os.environ)
    targets.topology_devices("v5e:2x2")
    assert dict(os.environ) == before
    with pytest.raises(UserError, match="libtpu knows no topology v5e:3x5"):
        targets.topology_devices("v5e:3x5")
    assert dict(os.environ) == before


@pytest.mark.plan
def test_command_for_two_gpus(tmp_path):
    """The gradients of all parameters are added up over NVLink."""
    pytest.importorskip("jax_plugins.xla_cuda12")
    done = command(
        *("--topology=h100:2", "--layouts", "mesh.data,float32", f"--workdir={tmp_path}"),
        *("--config.batch_size=16", f"--config.data_dir={tmp_path}", "--config.model.width=0.25"),
    )
    assert done.returncode == 0, done.stderr
    (layout,) = json.loads((tmp_path / "plan.json").read_text())["layouts"]
    assert plan.describe(layout) in done.stdout
    sent = sum(c["payload_bytes"] for c in layout["collectives"] if c["kind"] == "all-reduce")
    assert sent == pytest.approx(layout["memory"]["params"], rel=0.01)
    assert layout["communication_s"] == pytest.approx(sent / 450e9, rel=0.01)  # 2 (2-1)/2 times
    assert layout["kernels"] > 50 and layout["bytes_moved"] > 5 * sent
    assert layout["step_s"] == layout["compute_s"] + layout["communication_s"]
    slowest = layout["slowest_kernels"][0]
    assert slowest["seconds"] >= slowest["bytes_moved"] / 3.35e12


@pytest.mark.plan
def test_one_device_has_no_layouts_to_choose():
    pytest.importorskip("jax_plugins.xla_cuda12")
    done = command("--topology=h100:1", "--layouts", "mesh.data")
    assert done.returncode == EXIT_USER_ERROR
    assert "error: --layouts needs several devices; leave it out for one" in done.stderr


@pytest.mark.plan
@pytest.mark.long
def test_command_on_a_small_slice(tmp_path):
    """The bytes that the architecture gives come out of the program for four chips."""
    pytest.importorskip("libtpu")
    done = command(
        *("--topology=v5e:2x2", "--layouts", "mesh.hybrid,bfloat16", f"--workdir={tmp_path}"),
        *("--config.batch_size=64", "--config.hybrid_group=4", f"--config.data_dir={tmp_path}"),
    )
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "plan.json").read_text())
    (layout,) = written["layouts"]
    whole, fc_kernels = 62_379_720, (9216 + 1000 + 4096) * 4096
    assert layout["memory"]["params"] == 4 * (whole - 3 / 4 * fc_kernels)
    assert layout["memory"]["optimizer"] == layout["memory"]["params"]
    assert layout["fits"] and layout["cycles"] > 1e6
    summed = [c["payload_bytes"] for c in layout["collectives"] if c["kind"] == "all-reduce"]
    gradients = whole - fc_kernels  # one group shares the fc kernels, so nobody else has copies
    sent = sum(size for size in summed if size > 1e6)
    assert sent == pytest.approx(2 * gradients, rel=0.05, abs=64 * 1000 * 2)
    assert layout["step_s"] == pytest.approx(layout["compute_s"] + layout["communication_s"])
    assert plan.describe(layout) in done.stdout
    assert written["images_per_s_read"] is None
    assert all(text in done.stdout for text in written["assumptions"])
