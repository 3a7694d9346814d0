"""The convolutions of `owt` and `paper`, for the references; without JAX, so for PyTorch's too."""

FILTERS = {"owt": (64, 192, 384, 256, 256), "paper": (96, 256, 384, 384, 256)}
GROUPS = {"owt": (1, 1, 1, 1, 1), "paper": (1, 2, 1, 2, 2)}
SIZES = (11, 5, 3, 3, 3)
POOLED = (1, 2, 5)
NORMED = (1, 2)  # of `paper`
