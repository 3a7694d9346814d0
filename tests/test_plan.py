"""The plan of a TPU slice: how it reads compiled programs, and a real one compiled by libtpu."""

import importlib.util
import json
import os
import sys
import tempfile

import numpy as np
import pytest
from commands import run
from PIL import Image

from alexnet_jax import config, plan, store
from alexnet_jax.analysis import figures as plots
from alexnet_jax.analysis import tpu
from alexnet_jax.utils.errors import EXIT_USER_ERROR, UserError

PLAN = ("--config", "configs/imagenet_pod.py")
V5E = tpu.CHIPS["v5e"]
PROGRAM = """HloModule step

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%cond (p: (s32[])) -> pred[] {
  %limit = s32[]{:T(128)} constant(12)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%body (p: (s32[])) -> (s32[]) {
  %slice.1 = f32[224,224,3]{2,1,0} fusion(%p), kind=kLoop, backend_config={"estimated_cycles":"50"}
}

%gathers (p: bf16[16,8]) -> bf16[64,8] {
  %all-gather.1 = bf16[64,8]{1,0} all-gather(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
}

%continues (p: bf16[16,8]) -> bf16[64,8] {
  %all-gather.2 = bf16[64,8]{1,0} all-gather(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %while.1 = (s32[]) while(%x), condition=%cond, body=%body
  %fusion.1 = f32[8]{0} fusion(%x), kind=kLoop, calls=%add, metadata={op_name="relu"}, backend_config={"estimated_cycles":"1000"}
  %async-collective-start = (bf16[16,8]{1,0}, bf16[64,8]{1,0}) fusion(%x), kind=kCustom, calls=%gathers
  %fusion.2 = bf16[64,8]{1,0} fusion(%x), kind=kCustom, calls=%continues, backend_config={"estimated_cycles":"200"}
  %all-reduce.1 = (f32[100]{0}, f32[4,25]{1,0}) all-reduce(%x, %x), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %reduce-scatter.1 = f32[10]{0} reduce-scatter(%x), replica_groups=[2,4]<=[8], dimensions={0}
  %all-to-all.1 = pred[4,8]{1,0} all-to-all(%x), replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
  %all-reduce.2 = f32[]{:T(128)} all-reduce(%x), replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}, to_apply=%add
  %scatter.1 = f32[1000,1000]{1,0} scatter(%x, %x, %x)
  ROOT %out = f32[8]{0} bitcast(%x)
}
"""  # noqa: E501


def test_cycles_are_those_of_the_entry_and_of_a_loop_each_time_it_runs():
    operations, unknown = tpu.entry_operations(PROGRAM)
    assert operations == [(1000, "fusion.1", "relu"), (600, "while.1", ""), (200, "fusion.2", "")]
    assert unknown == {"scatter": 1}


SENT = [  # kind, dtypes, payload bytes, group, bytes sent
    ("all-gather", "bf16", 64 * 8 * 2, (0, 1, 2, 3), 0.75 * 1024),
    ("all-reduce", "f32", 800, (0, 1, 2, 3, 4, 5, 6, 7), 2 * 7 / 8 * 800),
    ("reduce-scatter", "f32", 4 * 40, (0, 1, 2, 3), 0.75 * 160),
    ("all-to-all", "pred", 32, (0, 4), 0.5 * 32),
    ("all-reduce", "f32", 4, (0, 4), 4.0),
]


def test_collectives_are_read_with_their_groups_and_those_begun_early_count_once():
    found = tpu.collectives(PROGRAM, 8)
    assert [(*collective, collective.bytes_sent) for collective in found] == SENT


ASYNCHRONOUS = """HloModule step

ENTRY %main (x: f32[8]) -> f32[64] {
  %all-gather-start.1 = (f32[8]{0}, f32[64]{0}) all-gather-start(%x), dimensions={0}
  %all-reduce-start.1 = f32[100]{0} all-reduce-start(%x), to_apply=%add
  %all-gather-done.1 = f32[64]{0} all-gather-done(%all-gather-start.1)
  %all-reduce-done.1 = f32[100]{0} all-reduce-done(%all-reduce-start.1)
}
"""


def test_of_what_is_started_and_awaited_the_output_counts_once_and_all_chips_take_part():
    everyone = tuple(range(8))
    assert tpu.collectives(ASYNCHRONOUS, 8) == [
        ("all-gather", "f32", 4 * 64, everyone),
        ("all-reduce", "f32", 4 * 100, everyone),
    ]


LINKS = [  # extent of a group of chips on a 16 × 16 torus, links to others of it
    ([(x, y) for x in range(16) for y in range(16)], 4),
    ([(x, 0) for x in range(16)], 2),
    ([(x, 0) for x in range(8)], 1),
    ([(x, y) for x in range(4) for y in range(4)], 2),
    ([(x, y) for x in (0, 8) for y in range(16)], 2),
    ([(0, 0), (8, 0)], 1),
]


@pytest.mark.parametrize(("group", "count"), LINKS)
def test_chips_of_a_group_talk_over_the_links_between_neighbours(group, count):
    assert tpu.links(group, (16, 16), V5E) == count


def test_an_all_reduce_over_a_pod_takes_its_bytes_over_four_links():
    everyone = tpu.Collective("all-reduce", "f32", 200_000_000, tuple(range(256)))
    expected = 2 * 255 / 256 * 200e6 / (4 * 50e9)
    assert tpu.seconds(everyone, 4, V5E) == pytest.approx(expected)


@pytest.mark.parametrize("topology", ["v5e", "v9z:2x2", "v5e:2", "16x16"])
def test_topologies_that_are_none_are_refused(topology, monkeypatch):
    monkeypatch.setattr(tpu, "_check_libtpu", lambda: None)
    with pytest.raises(UserError, match="must be like v5e:16x16"):
        tpu.topology_devices(topology)


def test_the_environment_is_libtpu_s_for_as_long_as_it_is_asked():
    before = dict(os.environ)
    with tpu._no_tpu_of_our_own():
        assert os.environ["TPU_SKIP_MDS_QUERY"] == "1"
    assert dict(os.environ) == before


def test_without_libtpu_it_says_what_to_install():
    if importlib.util.find_spec("libtpu"):
        pytest.skip("libtpu is installed")
    done = command("--topology=v5e:2x2")
    assert done.returncode == EXIT_USER_ERROR
    assert "pip install 'libtpu" in done.stderr and "Traceback" not in done.stderr


def test_layouts_are_chosen_by_kind_or_whole_and_all_without_a_choice(monkeypatch, capsys):
    everything = plan._chosen(None)
    assert len(everything) == len(set(everything)) == 6
    assert plan._chosen(["mesh.zero"]) == [("mesh.zero", "float32"), ("mesh.zero", "bfloat16")]
    assert plan._chosen(["mesh.data,bfloat16"]) == [("mesh.data", "bfloat16")]
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # which a command sets
    with pytest.raises(SystemExit, match=f"^{EXIT_USER_ERROR}$"):
        plan.main([*PLAN, "--topology=v5e:2x2", "--layouts", "mesh.data", "pmap"])
    told = capsys.readouterr().err
    assert told.startswith("error: --layouts pmap: it can be mesh.data,float32, mesh.data,bfloat16")


@pytest.mark.parametrize("at_hand", [True, False])
def test_the_reading_rate_is_of_the_config_s_own_store_if_there_is_one(
    at_hand, digits, tmp_path, monkeypatch
):
    monkeypatch.setattr(plan, "TRIAL_S", 0.05)
    monkeypatch.setattr(plan, "TRIAL_IMAGES", 48)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    data_dir = digits if at_hand else tmp_path / "none"
    fields = [("data_dir", str(data_dir)), ("batch_size", "16")]
    settings = config.load("configs/quickstart.py", fields)
    rate, data = plan.reading_rate(settings)
    own = store.store_path(settings, settings.train_split)
    assert data == (own if at_hand else "noise in the page cache")
    assert rate > 0
    assert not list(tmp_path.iterdir())  # the noise is gone again


def test_the_picture_has_a_curve_for_each_layout_on_both_sides(tmp_path):
    curves = {"mesh.data": [(1, 100.0), (4, 380.0), (8, 700.0)], "mesh.zero": [(4, 300.0)]}
    plots.save_scaling(curves, "v5e:2x4", tmp_path / "two.png")
    plots.save_scaling({**curves, "mesh.hybrid": [(4, 90.0)]}, "v5e:2x4", tmp_path / "three.png")
    blue, orange, green = (0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E), (0x2C, 0xA0, 0x2C)
    for name, drawn in (("two", (True, True, False)), ("three", (True, True, True))):
        picture = np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB"))
        for half in np.array_split(picture, 2, axis=1):
            found = [bool((half == color).all(2).any()) for color in (blue, orange, green)]
            assert found == list(drawn)


def command(*more):
    return run(
        *(sys.executable, "-m", "alexnet_jax.plan", *PLAN),
        *more,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
    )


@pytest.mark.tpu
def test_a_plan_of_a_small_slice_holds_together(tmp_path):
    """Four chips: the sums that the architecture gives must come out of the compiled program."""
    if not importlib.util.find_spec("libtpu"):
        pytest.skip("libtpu is not installed: pip install -r requirements-tpu.txt")
    done = command(
        *("--topology=v5e:2x2", "--layouts", "mesh.hybrid,bfloat16", f"--workdir={tmp_path}"),
        *("--config.batch_size=64", "--config.hybrid_group=4", "--config.model.dtype=bfloat16"),
        f"--config.data_dir={tmp_path}",
    )
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "plan.json").read_text())
    (layout,) = told["layouts"]
    whole, fc_kernels = 62_379_720, (9216 + 1000 + 4096) * 4096
    assert layout["memory"]["params"] == 4 * (whole - 3 / 4 * fc_kernels)
    assert layout["memory"]["optimizer"] == layout["memory"]["params"]
    assert layout["fits"] and layout["cycles"] > 1e6
    summed = [c for c in layout["collectives"] if c["kind"] == "all-reduce"]
    sent = sum(c["payload_bytes"] for c in summed if c["payload_bytes"] > 1e6)
    gradients = whole - fc_kernels  # those of the fc kernels stay where they are: one group
    assert sent == pytest.approx(2 * gradients, rel=0.05, abs=64 * 1000 * 2)
    assert told["images_per_s_read"] > 100
    assert (tmp_path / "plan.png").stat().st_size > 10_000
    assert layout["step_s"] == pytest.approx(layout["compute_s"] + layout["communication_s"])
    assert plan.describe(layout) in done.stdout
    for text in told["assumptions"]:
        assert text in done.stdout
