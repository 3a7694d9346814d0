"""Four CPU devices, and one compilation cache for all the processes that the tests start."""

import os
import tempfile

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="alexnet_jax-test-cache-")
)
