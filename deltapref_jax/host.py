"""This process: its place in a JAX job of several, and what it runs on. JAX is not imported here, only asked."""

import contextlib
import functools
import importlib.metadata
import platform
import sys

_PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "transformers", "numpy", "pyarrow", "deltapref-jax")


def process() -> tuple[int, int]:
    """Index of this process in its JAX job, and how many there are; (0, 1) where no such job was joined."""
    jax = sys.modules.get("jax")
    if jax is None or not jax.distributed.is_initialized():
        return 0, 1
    return jax.process_index(), jax.process_count()


def agreed(here: bool) -> bool:
    """What process 0 says; every process of the JAX job must ask."""
    if process()[1] == 1:
        return here
    import numpy as np
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(np.int32(here)))


@functools.cache
def _packages() -> dict[str, str]:
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def versions() -> dict[str, str]:
    """Python, platform and library versions of this process, and its devices where JAX is in use."""
    found = dict(_packages())
    if jax := sys.modules.get("jax"):
        found |= {"device": jax.devices()[0].device_kind, "devices": str(jax.device_count())}
    return found
