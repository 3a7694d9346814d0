"""What is told of a compiled step, on programs for the eight CPU devices taken for a 2×4 slice."""

import itertools
import re

import jax
import jax.numpy as jnp
import pytest
from test_step import STATS, config

from alexnet_jax import plan
from alexnet_jax.analysis import slice_costs, tpu
from alexnet_jax.training import optimizer as optim
from alexnet_jax.training import placement
from alexnet_jax.training import sharding as parallel
from alexnet_jax.training import train_step as step
from alexnet_jax.utils import process as runtime

V5E = tpu.CHIPS["v5e"]
SLICE = list(itertools.product(range(2), range(4)))
BATCH, GROUP = 16, 4
NARROW = {"model.width": 0.05}
IMAGE_BYTES = 72 * 72 * 3
CYCLES = 1500  # of each fusion: a microsecond


def compiled_for_the_slice(kind):
    c = plan._with(config("owt", hybrid_group=GROUP, **NARROW), kind, "float32")
    model = parallel.build_model(c)
    state = jax.eval_shape(lambda: step.init_state(model, c))
    steps = parallel.compile_steps(c, model, STATS, optim.make_schedule(c, 10.0))
    placed = jax.tree.map(lambda x, sharding: x.update(sharding=sharding), state, steps.shardings)
    lowered = steps.train_step.lower(placed, slice_costs.batch_of(c, steps.batch_sharding))
    program = lowered.compile(compiler_options=runtime.CPU_OPTIONS)
    return slice_costs.Layout(c, steps, state, program, SLICE)


@pytest.fixture(scope="module")
def layouts():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placement, "LEAST_SHARDED", 1000)  # this network is a narrow one
        return {
            kind: compiled_for_the_slice(kind) for kind in ("mesh.data", "mesh.zero", "mesh.hybrid")
        }


@pytest.fixture(scope="module")
def rows(layouts):
    return {kind: slice_costs.row_of(layout, V5E, hosts=2) for kind, layout in layouts.items()}


def bytes_of(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def fc_kernel_bytes(layout):
    params = layout.state.params
    return bytes_of([params[layer]["kernel"] for layer in placement.SPLIT_LAYERS])


def test_a_batch_has_an_eighth_of_its_images_on_a_chip(layouts):
    sharding = layouts["mesh.zero"].compiled.batch_sharding
    batch = slice_costs.batch_of(layouts["mesh.zero"].config, sharding)
    assert (batch["image"].shape, batch["image"].dtype) == ((BATCH, 72, 72, 3), jnp.uint8)
    assert (batch["label"].shape, batch["label"].dtype) == ((BATCH,), jnp.int32)
    assert sharding.shard_shape(batch["image"].shape) == (BATCH // 8, 72, 72, 3)


def test_memory_is_what_the_architecture_and_the_kind_of_sharing_give(layouts):
    whole = bytes_of(layouts["mesh.data"].state.params)
    fc = fc_kernel_bytes(layouts["mesh.hybrid"])
    held = {kind: slice_costs.memory(layout) for kind, layout in layouts.items()}
    assert held["mesh.data"]["params"] == whole
    assert held["mesh.hybrid"]["params"] == whole - fc + fc / GROUP
    assert whole / 8 < held["mesh.zero"]["params"] < whole / 6  # small arrays stay whole
    for of_kind in held.values():
        assert of_kind["optimizer"] == of_kind["params"]  # a velocity for each
        assert of_kind["batch"] == BATCH / 8 * (IMAGE_BYTES + 4)  # of a label


def test_activations_are_the_outputs_of_a_chip_s_images_in_the_model_s_dtype(layouts):
    layout = layouts["mesh.data"]
    sides = {"conv1": 17, "conv2": 8, "conv3": 4, "conv4": 4, "conv5": 4}  # of 72×72 pixels
    pooled = {"conv1": 8, "conv2": 4, "conv5": 2}
    values = 0
    for layer, arrays in layout.state.params.items():
        places = sides.get(layer, 1) ** 2 + pooled.get(layer, 0) ** 2
        values += places * arrays["bias"].size
    held = slice_costs.memory(layout)["activations"]
    assert held == BATCH / 8 * values * 4
    half = config("owt", parallel="mesh.data", **NARROW, **{"model.dtype": "bfloat16"})
    assert slice_costs.memory(layout._replace(config=half))["activations"] == held / 2


def test_in_total_a_chip_holds_what_goes_in_what_does_not_replace_it_and_temporaries(layouts):
    for layout in layouts.values():
        held, found = slice_costs.memory(layout), layout.program.memory_analysis()
        state_and_batch = held["params"] + held["optimizer"] + held["batch"]
        assert found.argument_size_in_bytes == pytest.approx(state_and_batch, abs=64)
        metrics = found.output_size_in_bytes - found.alias_size_in_bytes
        assert held["total"] == found.argument_size_in_bytes + metrics + held["temporaries"]
        assert 0 < metrics < 1000


def sent_of(layout):
    return slice_costs.communication(layout, layout.program.as_text(), V5E)


METRICS = pytest.approx(0, abs=64)  # bytes of sums that go with the gradients


def test_data_parallelism_sends_each_gradient_in_one_all_reduce_over_two_links(layouts):
    (sent,) = sent_of(layouts["mesh.data"])
    assert (sent["kind"], sent["dtypes"], sent["group"], sent["links"]) == (
        "all-reduce",
        "f32",
        8,
        2,
    )
    assert sent["payload_bytes"] - bytes_of(layouts["mesh.data"].state.params) == METRICS
    assert sent["bytes_sent"] == 2 * 7 / 8 * sent["payload_bytes"]
    assert sent["seconds"] == pytest.approx(sent["bytes_sent"] / (2 * 50e9))


def test_zero_gathers_what_it_scatters_and_sends_no_more_bytes(layouts):
    payloads = {}
    for sent in sent_of(layouts["mesh.zero"]):
        assert sent["group"] == 8
        payloads.setdefault(sent["kind"], []).append(sent["payload_bytes"])
    gathered, reduced = sum(payloads["all-gather"]), sum(payloads["all-reduce"])
    assert sorted(payloads["reduce-scatter"]) == sorted(payloads["all-gather"])
    assert gathered + reduced - bytes_of(layouts["mesh.zero"].state.params) == METRICS
    assert reduced < gathered / 50


def test_hybrid_sums_a_quarter_of_the_fc_kernels_between_its_two_groups(layouts):
    """Each group is a row of the slice, whose chips have one link to the next."""
    layout = layouts["mesh.hybrid"]
    sent = sent_of(layout)
    fc = fc_kernel_bytes(layout)
    summed = {s["group"]: s["payload_bytes"] for s in sent if s["kind"] == "all-reduce"}
    assert summed.keys() == {2, 8}
    assert summed[2] == fc / GROUP
    assert summed[8] - (bytes_of(layout.state.params) - fc) == METRICS
    assert {s["links"] for s in sent if s["group"] == GROUP} == {1}
    assert {"all-to-all", "all-gather", "reduce-scatter"} == {
        s["kind"] for s in sent if s["group"] == GROUP
    }


class WithCycles:
    """A program in which each fusion has cycles, as libtpu writes them and the CPU's does not."""

    def __init__(self, program):
        self.memory_analysis = program.memory_analysis
        cycles = f', backend_config={{"estimated_cycles":"{CYCLES}"}}'
        self.text, _ = re.subn(r"^.* fusion\(.*$", rf"\g<0>{cycles}", program.as_text(), flags=re.M)

    def as_text(self):
        return self.text


def test_a_row_adds_up(layouts):
    layout = layouts["mesh.data"]
    layout = layout._replace(program=WithCycles(layout.program))
    entry = layout.program.as_text().partition("\nENTRY")[2].partition("\n}")[0]
    row = slice_costs.row_of(layout, V5E, hosts=2)
    assert row["cycles"] == CYCLES * entry.count(" fusion(") > 0
    assert row["compute_s"] == pytest.approx(row["cycles"] / 1.5e9)
    assert row["communication_s"] == sum(sent["seconds"] for sent in row["collectives"]) > 0
    assert row["bytes_sent"] == sum(sent["bytes_sent"] for sent in row["collectives"])
    assert row["step_s"] == row["compute_s"] + row["communication_s"]
    assert row["step_s_if_all_overlaps"] == max(row["compute_s"], row["communication_s"])
    assert row["images_per_s"] == pytest.approx(BATCH / row["step_s"])
    assert row["images_per_s_of_a_host"] == pytest.approx(row["images_per_s"] / 2)
    assert (row["layout"], row["gradient_dtype"], row["chips"]) == ("mesh.data", "float32", 8)


def test_a_layout_fits_as_long_as_a_chip_holds_the_total(layouts, rows):
    total = rows["mesh.data"]["memory"]["total"]
    for bytes_of_chip, fits in ((total, True), (total - 1, False)):
        chip = V5E._replace(hbm_bytes=bytes_of_chip)
        assert slice_costs.row_of(layouts["mesh.data"], chip, hosts=1)["fits"] is fits


def test_one_chip_computes_as_much_as_each_of_four_and_sends_nothing(layouts, rows):
    """No figure for it where it would have to hold and update what others hold of the slice."""
    four = {"chips": 4, "compute_s": 1e-3, "images_per_s": 9000.0}
    for kind, alone in (("mesh.data", [(1, BATCH / 4 / 1e-3)]), ("mesh.zero", [])):
        found = slice_costs.scaling(rows[kind] | four, layouts[kind], "v5e:2x2", V5E)
        assert found == [*alone, (4, 9000.0)]


def test_a_row_is_told_in_four_lines(rows):
    row = rows["mesh.hybrid"]
    title, memory, sent, time = plan.describe(row).splitlines()
    assert title == "mesh.hybrid, gradients in float32"
    assert f"{row['memory']['total'] / 1e6:.0f} MB: params" in memory
    assert (
        f"{row['bytes_sent'] / 1e6:.1f} MB a chip: 2 all-reduce (f32) " in sent
    )  # costliest first
    assert f"{row['images_per_s']:,.0f} images/s" in time
    assert "DOES NOT FIT" in plan.describe(row | {"fits": False})
    assert plan.describe(row | {"collectives": []}).splitlines()[2].endswith("a chip: nothing")


def test_layouts_are_compared_with_data_parallelism(rows):
    zero, hybrid, groups = plan._compared(list(rows.values()), GROUP)
    assert zero == (
        "mesh.zero with float32 gradients sends 1.00 of the bytes of mesh.data with float32 "
        "gradients"
    )
    share = rows["mesh.hybrid"]["bytes_sent"] / rows["mesh.data"]["bytes_sent"]
    assert f"mesh.hybrid with float32 gradients sends {share:.2f} of the bytes" in hybrid
    sizes = [int(size) for size in re.findall(r"over groups of (\d)", groups)]
    assert sizes == [2, 4, 8]
    assert "those of 4 are activations" in groups and "those of 2 fc gradients" in groups


def test_what_the_figures_rest_on_is_the_chip_s_and_the_config_s(layouts):
    told = " ".join(plan.assumptions("v5e:2x4", V5E, layouts["mesh.data"].config, 8))
    for figure in ("at 1.50 GHz", "carries 50 GB/s", "2 images a chip; a chip has 16 GB"):
        assert figure in told
    assert "slices smaller than v5e:2x4 are computed" in told
