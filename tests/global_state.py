"""What torch, Pyro, numpy, Python and matplotlib keep for a whole process, and what changed."""

import random
import signal
from typing import Any

import matplotlib as mpl
import numpy as np
import pyro
import torch
from pyro.poutine import runtime


def snapshot() -> dict[str, Any]:
    """Return a copy of the state, by its name in words."""
    params = pyro.get_param_store().get_state()["params"]
    cudnn = torch.backends.cudnn
    return {
        "torch's default dtype": torch.get_default_dtype(),
        "torch's default device": torch.get_default_device(),
        "torch's grad mode": torch.is_grad_enabled(),
        "torch's inference mode": torch.is_inference_mode_enabled(),
        "torch's anomaly mode": torch.is_anomaly_enabled(),
        "torch's autocast mode": torch.is_autocast_enabled("cpu"),
        "torch's number of threads": torch.get_num_threads(),
        "torch's deterministic mode": torch.get_deterministic_debug_mode(),
        "torch's cuDNN flags": (cudnn.enabled, cudnn.benchmark, cudnn.deterministic),
        "torch's matmul precision": torch.get_float32_matmul_precision(),
        "torch's shortcut past attention": torch.backends.mha.get_fastpath_enabled(),
        "torch's random state": torch.get_rng_state(),
        "numpy's random state": np.random.get_state(),
        "numpy's error handling": np.geterr(),
        "Python's random state": random.getstate(),
        "Pyro's param store": {name: value.detach().clone() for name, value in params.items()},
        "Pyro's settings": pyro.settings.get(),
        "Pyro's effect stack": list(runtime._PYRO_STACK),
        "Pyro's plate dimensions": list(runtime._DIM_ALLOCATOR._stack),
        "matplotlib's settings": dict(mpl.rcParams),
        "the interrupt handler": signal.getsignal(signal.SIGINT),
    }


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return the names of what differs between two snapshots."""
    return [name for name in before if not _same(before[name], after[name])]


def _same(before: Any, after: Any) -> bool:
    if isinstance(before, torch.Tensor):
        return before.shape == after.shape and torch.equal(before, after)
    if isinstance(before, np.ndarray):
        return np.array_equal(before, after)
    if isinstance(before, dict):
        return before.keys() == after.keys() and all(_same(before[k], after[k]) for k in before)
    if isinstance(before, list | tuple):
        return len(before) == len(after) and all(map(_same, before, after))
    return before is after or bool(before == after)
