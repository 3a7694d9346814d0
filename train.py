"""Trains AlexNet: `python train.py --config configs/quickstart.py`. The same command resumes."""

from alexnet_jax.train import main

if __name__ == "__main__":
    main()
