"""The reader of compiled programs, on short texts and on programs whose bytes are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from alexnet_jax.analysis import hlo, targets


def program(entry, *computations):
    """Returns the text of a program with these lines in its entry computation."""
    lines = "\n".join(f"  {line}" for line in entry)
    main = f"ENTRY %main (x: f32[100]) -> f32[100] {{\n{lines}\n  ROOT %out = f32[100] copy(%x)\n}}"
    return "\n\n".join(("HloModule step, is_scheduled=true", *computations, main, ""))


def sent(text, num_devices=8):
    """Returns (kind, payload bytes, number of devices, runs) of each collective."""
    found = hlo.collectives(text, num_devices)
    return [(c.kind, c.payload_bytes, len(c.group), c.runs) for c in found]


X = "%x = f32[100]{0:T(128)} parameter(0)"
Y = "%y = bf16[4,25]{1,0:T(8,128)(2,1)S(1)} parameter(1)"
ALL = "replica_groups={{0,1,2,3,4,5,6,7}}, use_global_device_ids=true, to_apply=%add"


@pytest.mark.parametrize(
    ("line", "kind", "payload", "bytes_sent"),
    [
        (f"f32[100]{{0}} all-reduce(%x), {ALL}", "all-reduce", 400, 2 * 7 / 8 * 400),
        (f"(f32[100], bf16[4,25]) all-reduce(%x, %y), {ALL}", "all-reduce", 600, 2 * 7 / 8 * 600),
        (f"f32[4,25]{{1,0}} all-reduce(%y), {ALL}", "all-reduce", 400, 2 * 7 / 8 * 400),
        (f"f32[800]{{0}} all-gather(%x), {ALL}", "all-gather", 3200, 7 / 8 * 3200),
        (f"f32[13]{{0}} reduce-scatter(%x), {ALL}", "reduce-scatter", 400, 7 / 8 * 400),
        (f"f32[100]{{0}} all-to-all(%x), {ALL}", "all-to-all", 400, 7 / 8 * 400),
        (
            "f32[100]{0} collective-permute(%x), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}",
            "collective-permute",
            400,
            400,
        ),
    ],
)
def test_bytes_that_a_device_sends(line, kind, payload, bytes_sent):
    (found,) = hlo.collectives(program([X, Y, f"%c = {line}"]), 8)
    assert (found.kind, found.payload_bytes) == (kind, payload)
    assert found.bytes_sent == pytest.approx(bytes_sent)


@pytest.mark.parametrize(
    ("written", "group"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", (0, 1, 2, 3)),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=mesh['a'=4,'b'=2] {'b'}", (0, 1)),
        ("replica_groups=mesh['a'=4,'b'=2] {'a'}", (0, 2, 4, 6)),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", (0, 4)),
        ("dimensions={0}", (0, 1, 2, 3, 4, 5, 6, 7)),
        ("source_target_pairs={{0,2},{2,4},{4,0},{1,3},{3,1}}", (0, 2, 4)),
        ("source_target_pairs={{0,1},{1,2}}", (0, 1, 2)),
    ],
)
def test_groups_of_devices(written, group):
    text = program([X, f"%c = f32[100]{{0}} all-to-all(%x), channel_id=1, {written}"])
    assert hlo.collectives(text, 8)[0].group == group


def test_asynchronous_pairs_count_once():
    text = program(
        [
            X,
            f"%g = (f32[100]{{0}}, f32[800]{{0}}) all-gather-start(%x), {ALL}",
            f"%r = f32[100]{{0}} all-reduce-start(%x), {ALL}",
            f"%s = ((f32[100]{{0}}), f32[13]{{0}}) reduce-scatter-start(%x), {ALL}",
            "%g2 = f32[800]{0} all-gather-done(%g)",
            "%r2 = f32[100]{0} all-reduce-done(%r)",
            "%s2 = f32[13]{0} reduce-scatter-done(%s)",
        ]
    )
    assert sent(text) == [
        ("all-gather", 3200, 8, 1),
        ("all-reduce", 400, 8, 1),
        ("reduce-scatter", 400, 8, 1),
    ]


def fused(name, flag_start, target):
    """Returns a computation with an all-gather that libtpu runs beside other operations."""
    return f"""%{name} (x.1: f32[100]) -> f32[800] {{
  %x.1 = f32[100]{{0}} parameter(0)
  %g.1 = f32[800]{{0}} all-gather(%x.1), {ALL}, backend_config={{"async_collective_fusion_config":{{"flag_start":"{flag_start}","flag_end":"8"}}}}
  ROOT %c.1 = f32[800]{{0}} custom-call(%g.1), custom_call_target="{target}"
}}"""  # noqa: E501


def test_fusions_that_continue_a_collective_do_not_count():
    text = program(
        [
            X,
            "%start = f32[800]{0} fusion(%x), kind=kCustom, calls=%begin",
            "%beside = f32[800]{0} fusion(%start), kind=kCustom, calls=%continue",
            "%done = f32[800]{0} fusion(%beside), kind=kCustom, calls=%end",
        ],
        fused("begin", -1, "AsyncCollectiveStart"),
        fused("continue", 2, "Other"),
        fused("end", 2, "AsyncCollectiveDone"),
    )
    assert sent(text) == [("all-gather", 3200, 8, 1)]
    assert hlo.operation_cycles(text) == ([], {})


def test_all_reduce_scatter_fusion_is_a_reduce_scatter():
    text = program(
        [X, "%f = f32[13]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.2"],
        f"""%all-reduce-scatter.2 (input: f32[100]) -> f32[13] {{
  %input = f32[100]{{0}} parameter(0)
  %r = f32[100]{{0}} all-reduce(%input), {ALL}
  ROOT %s = f32[13]{{0}} dynamic-slice(%r, %r), dynamic_slice_sizes={{13}}
}}""",
    )
    assert sent(text) == [("reduce-scatter", 400, 8, 1)]


# A loop for (i = 2; i < 12; i += step) as libtpu writes it: the counter is the loop's element 1.
LOOP = """%condition (p.1: (f32[100], s32[])) -> pred[] {{
  %limit = {integer}[]{{:T(128)}} constant(12)
  %p.1 = (f32[100], {integer}[]) parameter(0)
  %i.1 = {integer}[] get-tuple-element(%p.1), index=1
  ROOT %less = pred[]{{:T(512)}} compare(%i.1, %limit), direction={direction}
}}

%body (p.2: (f32[100], s32[])) -> (f32[100], s32[]) {{
  %step = {integer}[] constant({step})
  %p.2 = (f32[100], {integer}[]) parameter(0)
  %x.2 = f32[100]{{0}} get-tuple-element(%p.2), index=0
  %i.2 = {integer}[] get-tuple-element(%p.2), index=1
  %copy.2 = {integer}[] copy(%i.2)
  %next = {integer}[] add(%copy.2, %step)
  %r.2 = f32[100]{{0}} all-reduce(%x.2), {ALL}
  %f.2 = f32[100]{{0}} fusion(%r.2), calls=%g, backend_config={{"estimated_cycles":"50"}}
  ROOT %t.2 = (f32[100], {integer}[]) tuple(%f.2, %next)
}}"""
RUNS_LOOP = [
    X,
    "%two = s32[]{:T(128)} constant(2)",
    "%copy.1 = s32[]{:T(128)} copy(%two)",
    "%t.1 = (f32[100], s32[]) tuple(%x, %copy.1)",
]
WHILE = "%w = (f32[100], s32[]) while(%t.1), condition=%condition, body=%body"
FUSED = """%g (x.3: f32[100]) -> f32[100] {
  ROOT %x.3 = f32[100]{0} parameter(0)
}"""


def loop(integer="s32", step=1, direction="LT"):
    return LOOP.format(integer=integer, step=step, direction=direction, ALL=ALL)


@pytest.mark.parametrize(
    ("integer", "step", "trips"), [("s32", 1, 10), ("u32", 2, 5), ("s32", 3, 4)]
)
def test_loops_count_as_often_as_they_run(integer, step, trips):
    text = program([*RUNS_LOOP, WHILE], FUSED, loop(integer, step))
    assert sent(text) == [("all-reduce", 400, 8, trips)]
    assert hlo.operation_cycles(text)[0] == [(50 * trips, "f.2", "")]


def test_trip_counts_that_xla_notes_are_used():
    noted = f'{WHILE}, backend_config={{"known_trip_count":{{"n":"7"}}}}'
    text = program([*RUNS_LOOP, noted], FUSED, loop(direction="GT"))
    assert sent(text) == [("all-reduce", 400, 8, 7)]


def test_other_loops_are_an_error():
    with pytest.raises(ValueError, match="cannot read how many times w runs"):
        sent(program([*RUNS_LOOP, WHILE], FUSED, loop(direction="NE")))


def test_cycles_of_fusions_and_large_operations_without_estimate():
    text = program(
        [
            X,
            "%a = f32[100]{0} fusion(%x), kind=kLoop, calls=%g, "
            'metadata={op_name="relu"}, backend_config={"estimated_cycles":"1000"}',
            '%b = f32[100]{0} add(%a, %a), backend_config={"estimated_cycles":"200"}',
            f'%r = f32[500,500] all-reduce(%x), {ALL}, backend_config={{"estimated_cycles":"9"}}',
            "%s = f32[500,500]{1,0} scatter(%x, %x, %x)",
            "%small = f32[100]{0} scatter(%x, %x, %x)",
            "%d = f32[500,500]{1,0} copy-done(%x)",
        ],
        FUSED.replace("parameter(0)", 'copy(%y), backend_config={"estimated_cycles":"7"}'),
    )
    operations, unknown = hlo.operation_cycles(text)
    assert operations == [(1000, "a", "relu"), (200, "b", "")]
    assert unknown == {"scatter": 1}


# Programs that XLA compiles, in which each collective runs five times on 1 MiB per device.
AXIS, TRIPS, BYTES = "devices", 5, 2**20


def exchange(kind, x):
    """Runs a collective on f32[256, 1024] of each device, and returns the same shape."""
    size = jax.lax.axis_size(AXIS)
    match kind:
        case "all-reduce":
            return jax.lax.psum(x, AXIS) / size
        case "all-gather":
            return jnp.sin(jax.lax.all_gather(x, AXIS)).max(axis=0)
        case "reduce-scatter":
            terms = jnp.concatenate([x * i for i in range(size)])
            return jax.lax.psum_scatter(terms, AXIS, tiled=True)
        case "all-to-all":
            return jax.lax.all_to_all(x, AXIS, 0, 0, tiled=True)
        case "collective-permute":
            return jax.lax.ppermute(x, AXIS, [(i, (i + 1) % size) for i in range(size)])


@pytest.fixture(params=["cpu", pytest.param("v5e:2x4", marks=pytest.mark.plan)])
def devices(request):
    if request.param == "cpu":
        return jax.devices()
    pytest.importorskip("libtpu")
    return targets.topology_devices(request.param)[1]


def compile_on(devices, function, shapes, specs, out_specs, shard_map=False):
    mesh = Mesh(np.array(devices), (AXIS,))
    shardings = [NamedSharding(mesh, spec) for spec in specs]
    inputs = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
        for shape, sharding in zip(shapes, shardings, strict=True)
    ]
    if shard_map:
        mapped = jax.shard_map(
            function, mesh=mesh, in_specs=tuple(specs), out_specs=out_specs, check_vma=False
        )
        return jax.jit(mapped).lower(*inputs).compile().as_text()
    out = NamedSharding(mesh, out_specs)
    return jax.jit(function, out_shardings=out).lower(*inputs).compile().as_text()


@pytest.mark.parametrize(
    ("kind", "payload", "factor"),
    [
        ("all-reduce", BYTES, 2 * 7 / 8),
        ("all-gather", 8 * BYTES, 7 / 8),
        ("reduce-scatter", 8 * BYTES, 7 / 8),
        ("all-to-all", BYTES, 7 / 8),
        ("collective-permute", BYTES, 1),
    ],
)
def test_collectives_of_a_compiled_scan(kind, payload, factor, devices):
    def step(x, _):
        return x + exchange(kind, x), None

    split = PartitionSpec(AXIS)
    text = compile_on(
        devices,
        lambda x: jax.lax.scan(step, x, None, length=TRIPS)[0],
        [(8 * 256, 1024)],
        [split],
        split,
        shard_map=True,
    )
    assert sent(text) == [(kind, payload, 8, TRIPS)]
    total = sum(found.bytes_sent for found in hlo.collectives(text, 8))
    assert total == pytest.approx(TRIPS * factor * payload)


@pytest.mark.plan
@pytest.mark.parametrize("units", [4096, 4608])
def test_product_that_is_scattered_on_tpu(units):
    """4,096 units become a loop over windows of the product, 4,608 an all-reduce-scatter fusion."""
    pytest.importorskip("libtpu")
    _, devices = targets.topology_devices("v5e:2x4")
    text = compile_on(
        devices,
        jnp.matmul,
        [(2048, 8192), (8192, units)],
        [PartitionSpec(None, AXIS), PartitionSpec(AXIS)],
        PartitionSpec(None, AXIS),
    )
    product = 4 * 2048 * units
    total = sum(found.bytes_sent for found in hlo.collectives(text, 8))
    if "windowed_dot_general" in text:  # partial sums travel around the ring in both directions
        assert {kind for kind, *_ in sent(text)} == {"collective-permute"}
        assert 7 / 8 * product <= total <= 9 / 8 * product
    else:
        assert "all-reduce-scatter" in text
        assert sent(text) == [("reduce-scatter", product, 8, 1)]
