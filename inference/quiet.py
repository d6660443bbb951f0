"""Running Pyro code as a pure function of tensors, without its checks and its global state."""

import contextlib
import functools
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from pyro.poutine import runtime
from pyro.poutine.indep_messenger import IndepMessenger
from pyro.poutine.subsample_messenger import SubsampleMessenger
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bayesattn.inference.running import private_param_store
from bayesattn.inference.traceable import traceable_distributions

__all__ = ["apart_from_handlers", "data_defaults", "quiet_pyro"]

_EMPTY_STORE: dict[str, Any] = {"params": {}, "constraints": {}}


@contextlib.contextmanager
def apart_from_handlers() -> Iterator[None]:
    """Run Pyro code as if no handler or plate were active around it.

    Handlers of an outer program would see the sites of this one, and its plates would push the
    plates of this one to other dimensions.
    """
    allocator = runtime._DIM_ALLOCATOR
    outer, allocator._stack = allocator._stack, []
    try:
        with poutine.block():
            yield
    finally:
        allocator._stack = outer


@contextlib.contextmanager
def quiet_pyro(args: tuple, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Run Pyro code as a pure function: no validation, an empty parameter store, plain attention.

    Validation reads tensors in Python, which no transform allows; fused attention and the encoder
    layer's inference path have no rule for every transform, their plain formulas do.
    """
    fastpath = torch.backends.mha.get_fastpath_enabled()
    with (
        pyro.validation_enabled(False),
        traceable_distributions(),
        apart_from_handlers(),
        private_param_store(_EMPTY_STORE),
        data_defaults(args, kwargs),
        _counting_plates(),
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message=".*was not registered in the param store")
        # Slow batching rules inside of torch are not the caller's concern.
        warnings.filterwarnings("ignore", message="There is a performance drop")
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fastpath)


@contextlib.contextmanager
def data_defaults(args: tuple, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Let constants, as in ``Normal(0., 1.)``, take the data's float dtype and device."""
    tensors = [leaf for leaf in tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor)]
    floats = [tensor.dtype for tensor in tensors if tensor.is_floating_point()]
    before = torch.get_default_dtype()
    device = next((t.device for t in tensors if t.device.type != "cpu"), None)
    try:
        if floats:
            torch.set_default_dtype(functools.reduce(torch.promote_types, floats))
        with contextlib.nullcontext() if device is None else device:
            yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _counting_plates() -> Iterator[None]:
    """Let loops over full plates count in Python: recorded indices have no values."""
    original = IndepMessenger.__iter__

    def counted(plate: IndepMessenger) -> Iterator[Any]:
        if not isinstance(plate, SubsampleMessenger) or plate.subsample_size == plate.size:
            plate._indices = range(plate.size)  # type: ignore[assignment]
        return original(plate)

    IndepMessenger.__iter__ = counted  # type: ignore[method-assign]
    try:
        yield
    finally:
        IndepMessenger.__iter__ = original  # type: ignore[method-assign]
