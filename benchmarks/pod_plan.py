"""What `python -m alexnet_jax.plan` says of a pod, as rows; needs libtpu, but no TPU.

    python benchmarks/pod_plan.py

Compiles for some minutes. These are the compiler's estimates and published link speeds, not
measurements.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rows import Row, options, row, write

ROOT = Path(__file__).parent.parent
CONFIG = "configs/imagenet_pod.py"
TOPOLOGY = "v5e:16x16"


def planned(layouts: list[str]) -> dict[str, Any]:
    """Returns what the command writes to plan.json."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "alexnet_jax.plan", "--config", CONFIG),
            *("--topology", TOPOLOGY, "--workdir", folder, *layouts),
        ]
        subprocess.run(command, cwd=ROOT, check=True)
        return json.loads(Path(folder, "plan.json").read_text())


def rows_of(layout: dict[str, Any], batch: int) -> list[Row]:
    """Returns the figures of one layout that docs/pods.md tells."""
    what = f"{layout['layout']}, {layout['gradient_dtype']} gradients"
    figures = {
        "estimated images/s": layout["images_per_s"],
        "estimated images/s a host": layout["images_per_s_of_a_host"],
        "ms of computing": 1e3 * layout["compute_s"],
        "ms of communication": 1e3 * layout["communication_s"],
        "MB sent a step and chip": layout["bytes_sent"] / 1e6,
        "MB a chip": layout["memory"]["total"] / 1e6,
        "MB of params a chip": layout["memory"]["params"] / 1e6,
        "estimated cycles": layout["cycles"],
    }
    return [row(what, [value], unit, batch, "bfloat16") for unit, value in figures.items()]


def main() -> None:
    """Lets the command print its plan, and writes its rows if asked."""
    args = options(__doc__, quick="one layout").parse_args()
    plan = planned(["--layouts", "mesh.data,float32"] if args.quick else [])
    batch = round(plan["layouts"][0]["images_per_s"] * plan["layouts"][0]["step_s"])
    write([of for layout in plan["layouts"] for of in rows_of(layout, batch)], args.json)


if __name__ == "__main__":
    main()
