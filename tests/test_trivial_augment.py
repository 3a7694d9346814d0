"""TrivialAugment: which operations there are, and how they are drawn."""

import collections

import jax
import numpy as np
import pytest
from images import photograph

from alexnet_jax.data.trivial_augment import OPERATIONS, apply, trivial_augment


def test_each_image_gets_one_operation_of_one_of_31_strengths():
    image = photograph(0, 40, 40)  # a shift by 32 pixels leaves some of it
    cases = [(o, b, s) for o in range(len(OPERATIONS)) for b in range(31) for s in (-1, 1)]
    operations, bins, signs = np.array(cases).T
    every = jax.jit(jax.vmap(lambda o, b, s: apply(image, o, b / 30, s)))(operations, bins, signs)
    names = collections.defaultdict(set)
    for operation, result in zip(operations, np.asarray(every), strict=True):
        names[result.tobytes()].add(list(OPERATIONS)[operation])
    keys = jax.random.split(jax.random.PRNGKey(0), 1000)
    results = np.asarray(jax.jit(jax.vmap(lambda key: trivial_augment(image, key)))(keys))
    drawn = collections.Counter(frozenset(names[result.tobytes()]) for result in results)
    certain = {name: drawn[frozenset({name})] for name in OPERATIONS}
    # Weak operations change nothing, so their results are those of the identity.
    assert sum(drawn.values()) == sum(certain.values()) + sum(
        count for found, count in drawn.items() if len(found) > 1 and "identity" in found
    )
    for name in certain.keys() - {"identity"}:
        assert 40 <= certain[name] <= 105, name  # 71 of 1,000 on average, but for weak ones


def test_values_are_whole_numbers_from_0_to_255():
    images = np.float32([photograph(n, 24, 24) for n in range(64)]) + 0.3
    keys = jax.random.split(jax.random.PRNGKey(1), 64)
    found = np.asarray(jax.jit(jax.vmap(trivial_augment))(images, keys))
    assert found.min() >= 0 and found.max() <= 255
    np.testing.assert_array_equal(found, np.floor(found))


def test_an_image_of_one_color_has_no_contrast_to_raise():
    image = np.full((16, 16, 3), 77, np.uint8)
    for name in ("autocontrast", "equalize"):
        found = apply(image, list(OPERATIONS).index(name), 1.0, 1.0)
        np.testing.assert_array_equal(found, image)


@pytest.mark.parametrize("platform", ["default", "tpu"])
def test_equalizing_on_accelerators_is_that_on_cpu(platform, monkeypatch):
    image, equalize = photograph(3, 24, 24), list(OPERATIONS).index("equalize")
    expected = apply(image, equalize, 1.0, 1.0)
    monkeypatch.setattr(
        jax.lax,
        "platform_dependent",
        lambda *args, default, **others: others.get(platform, default)(*args),
    )
    np.testing.assert_array_equal(apply(image, equalize, 1.0, 1.0), expected)
