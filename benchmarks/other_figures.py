"""Figures that the project claims and no benchmark makes, and where they come from."""

from typing import NamedTuple

from figures import DATA, EXPORT, FAST, PODS, README, RECIPES


class Other(NamedTuple):
    """Figures of some pages, and their source."""

    figures: str
    pages: tuple[str, ...]
    source: str


OTHERS = (
    Other(
        "40.7 / 18.2 %, 42.6 / 19.6 %, 43.48 / 20.93 % and the other errors called known",
        (README,),
        "what the authors of those networks published; nothing was trained on ImageNet here",
    ),
    Other("top-1 with SGD and LARS at large batches", (RECIPES,), "the LARS paper"),
    Other(
        "parameters of the variants; the quickstart's table of layers",
        (README,),
        "`alexnet_jax.models.alexnet.layer_table`; checked by `tests/test_readme.py`",
    ),
    Other(
        "262 GB, 41 GB and 26 minutes for ImageNet",
        (README, DATA),
        "1,331,167 images times the bytes an image of `preparation`; 1,331,167 / its images a "
        "second",
    ),
    Other(
        "20 kills without a loss",
        (PODS,),
        "`python tests/soak.py --kills 20`, ten minutes; it exits with 1 if anything differs",
    ),
    Other(
        "14 convolutions and 10 matrix products on a GPU",
        (FAST,),
        "`tests/test_compiled_step.py` counts them",
    ),
    Other(
        "errors of converted and exported networks: 1e-4, 1e-5, to the bit",
        ("docs/convert.md", EXPORT),
        "the bounds that `tests/test_convert_*.py` and `tests/test_export.py` hold",
    ),
    Other(
        "83 million multiply-adds of a crop; 33 MB of an index; 12 MB of ZeRO's share",
        (RECIPES, "docs/serve.md", PODS),
        "arithmetic of shapes",
    ),
    Other(
        "lines, tables and percentages in blocks of text that a command printed",
        (README, "docs/evaluate.md", EXPORT, "docs/finetune.md", "docs/visualize.md"),
        "samples of the command above each block, from one run",
    ),
    Other(
        "what was measured while a choice was made: 866 against 900 ms (kernels in place), 1.3 "
        "against 0.75 GB (XLA's schedule), 15 to 20 % (a scan), 8 to 13 % (malloc), 3 %, 4e-6 "
        "against 4e-7 (Winograd), cycles of changes that were not kept",
        (FAST,),
        "no command any more: the other choice is no longer in the program",
    ),
    Other(
        "10 µs a shuffled index, 25,000 to 28,000 images/s; 3 ms with Pillow; 3,000 to 4,600 "
        "images/s with the page cache dropped; 249 to 363 MB for smaller stores",
        (DATA,),
        "the same; the last by `input_pipeline.py --images 512` to `2048`",
    ),
    Other(
        "1.21 to 1.26 and 1.04 times (LRN); 9 s of compiling, 4.4 MB an image and 1.8 GB of an "
        "exported program; 0.6 GB of a decoded upload; 90.0 % after 120 epochs; 90.4 and 89.8 % "
        "on `paper`; 578 MB of a naive sharding",
        (FAST, EXPORT, "docs/serve.md", "docs/finetune.md", PODS),
        "measured once, by no command that is kept",
    ),
    Other(
        "anything of a GPU or a TPU that runs, and of training on ImageNet",
        (README, FAST, PODS),
        "not measured: none was at hand",
    ),
)
