"""Trains AlexNet: `python train.py --config configs/quickstart.py`. The same command resumes."""

import argparse
import sys
from pathlib import Path

from alexnet_jax import config as configs
from alexnet_jax import hosts, runtime
from alexnet_jax.errors import EXIT_STOPPED, exits_cleanly
from alexnet_jax.train import Stopped, train_and_evaluate


@exits_cleanly
def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", type=Path, help="default: runs/<config name>")
    config, args = configs.parse(sys.argv[1:], parser)
    sys.stdout.reconfigure(line_buffering=True)  # so that a log file is never behind
    runtime.set_up()
    with hosts.joined():
        try:
            train_and_evaluate(config, args.workdir or Path("runs") / config.name)
        except Stopped as stopped:
            print(f"{stopped}; the same command goes on from there", file=sys.stderr)
            return EXIT_STOPPED
    return 0


if __name__ == "__main__":
    main()
