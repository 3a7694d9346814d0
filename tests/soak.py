"""Kills processes of a run at random moments and compares its checkpoints bit by bit.

    python tests/soak.py --kills 20

Each round starts the same command again and kills one of its processes with SIGKILL at a random
moment after they have joined. The others must end by themselves, and the newest checkpoint must
equal that of an undisturbed run at the same step. After the last kill the run continues to its end
and is compared again. A kill takes about half a minute, up to two if process 0 is left waiting for
JAX's heartbeat timeout. The exit code is 1 if anything differs.
"""

import argparse
import logging
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")

import jax  # noqa: E402
import numpy as np  # noqa: E402
from commands import saved_state, saved_steps  # noqa: E402
from test_hosts import PEER_LOST_CODES, PEER_LOST_WITHIN_S, Cluster, losses  # noqa: E402

EPOCHS = 10
LATEST_KILL_S = 20  # after the processes have joined


def run_of(workdir: Path, data_dir: Path, processes: int) -> Cluster:
    more = (
        *("--config.train_split=train", "--config.eval_split=test", "--config.batch_size=200"),
        f"--config.num_epochs={EPOCHS}",
        "--config.checkpoint.every_steps=5",
        "--config.checkpoint.keep=1000",
    )
    return Cluster(processes, data_dir, workdir, *more)


def kill_one(cluster: Cluster, after: float, random_: random.Random) -> str:
    """Kills a process after some seconds. Returns a report, or "ended before" if too late."""
    cluster.read_to("AlexNet, variant")
    time.sleep(after)
    victim = random_.randrange(len(cluster.processes))
    if any(process.poll() is not None for process in cluster.processes):
        assert cluster.end() == [0] * len(cluster.processes), "\n".join(cluster.outputs)
        return "ended before"
    cluster.processes[victim].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    codes = cluster.end(within=PEER_LOST_WITHIN_S)
    for index, code in enumerate(codes):
        expected = (-signal.SIGKILL,) if index == victim else PEER_LOST_CODES
        assert code in expected, (index, codes, cluster.outputs[index])
    noticed = time.monotonic() - killed
    return f"process {victim} killed after {after:4.1f} s, the others ended {noticed:4.1f} s later"


def equals(workdir: Path, undisturbed: Path) -> str:
    """Compares the newest checkpoint; returns the difference, or "" if there is none."""
    step, state = saved_state(workdir)
    _, expected = saved_state(undisturbed, step)
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True)
    wrong = sum(not np.array_equal(a, b) for a, b in pairs)
    return f"{wrong} arrays differ at step {step}" if wrong else ""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.getLogger("absl").setLevel(logging.ERROR)
    random_ = random.Random(args.seed)
    folder = Path(tempfile.mkdtemp(prefix="alexnet_jax-soak-"))
    whole, killed, data = folder / "whole", folder / "killed", folder / "data"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "cache")
    undisturbed = run_of(whole, data, args.processes)
    assert undisturbed.end() == [0] * args.processes, "\n".join(undisturbed.outputs)
    kills, faults = 0, []
    while kills < args.kills:
        cluster = run_of(killed, data, args.processes)
        outcome = kill_one(cluster, random_.uniform(0, LATEST_KILL_S), random_)
        if outcome == "ended before":
            raise SystemExit(f"the run was over after {kills} kills; raise EPOCHS")
        kills += 1
        saved = saved_steps(killed) if (killed / "checkpoints").is_dir() else []
        difference = equals(killed, whole) if saved else ""
        faults += [difference] if difference else []
        state = difference or (f"step {saved[-1]} is the same" if saved else "nothing saved yet")
        print(f"kill {kills}: {outcome}; {state}", flush=True)
    rest = run_of(killed, data, args.processes)
    assert rest.end() == [0] * args.processes, "\n".join(rest.outputs)
    final = equals(killed, whole) or "parameters, velocity and key are the same"
    same = losses(killed) == losses(whole)
    print(
        f"{kills - len(faults)} of {kills} kills left what an undisturbed run had; at the end "
        f"{final}, and so are all losses: {same}"
    )
    return int(bool(faults) or "differ" in final or not same)


if __name__ == "__main__":
    sys.exit(main())
