"""Compiling recorded graphs to machine code, and whether that pays.

A graph is compiled as a whole, by Inductor, without TorchDynamo: it is already what a trace would
be, and no guards stand between a step and its graph.
"""

import contextlib
import copy
import functools
import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.fx import GraphModule
from torch.utils._pytree import tree_map

__all__ = ["Compile", "Mode", "compiled", "missing_compiler", "resolved_mode", "silent"]

Compile = Literal["auto", "none", "record", "inductor"]
Mode = Literal["none", "record", "inductor"]

# Compiling takes some 5 to 20 s, and saves .2 to 5 ms a step.
_FEWEST_STEPS = 5000

# Where the compiler tells of operations that it calls by way of Python.
_COMPILER_LOG = logging.getLogger("torch._inductor.ir")


def resolved_mode(choice: Compile, device: torch.device, num_steps: int | None = None) -> Mode:
    """Settle what ``"auto"`` means, once, at the start of a run.

    Compiled for runs of at least 5000 steps where there is a compiler, else recorded. It hangs on
    nothing that is measured, so that a run can be repeated to the last bit.

    Args:
        choice: What was asked for.
        device: Where the graph will run.
        num_steps: How many steps there will be; None where that is not known.

    Raises:
        ValueError: If ``"inductor"`` is asked for without a compiler.
    """
    if choice == "auto":
        if num_steps is None or num_steps < _FEWEST_STEPS:
            return "record"
        missing = missing_compiler(device)
        if missing:
            _tell_once(missing)
        return "record" if missing else "inductor"
    if choice == "inductor":
        missing = missing_compiler(device)
        if missing:
            raise ValueError(f"compile='inductor' needs a compiler: {missing}")
    return choice


def missing_compiler(device: torch.device) -> str:
    """Say what is missing to compile for a device; empty if nothing is."""
    if device.type == "cpu":
        return _missing_cpp_compiler()
    if device.type == "cuda" and not importlib.util.find_spec("triton"):
        return "Triton is not installed"
    return ""


def compiled(module: GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
    """Compile a graph of tensor operations for inputs of these shapes, strides, dtypes and devices.

    Nothing that belongs to the process stays changed: neither random state nor the validation of
    distributions, which the compiler turns off.
    """
    from torch._dynamo.eval_frame import innermost_fn
    from torch._inductor import compile as inductor_compile

    validates = Distribution._validate_args
    on_gpu = any(tensor.device.type == "cuda" for tensor in inputs)
    # Sizes and strides are those of the recording: no need to look at each call.
    options: dict[str, Any] = {"fallback_random": True, "size_asserts": False}
    if on_gpu:
        options["triton.cudagraphs"] = True
    elif _suits_cpp(module, inputs):
        # What calls the loops is C++ too: Python there would take a tenth of a short step.
        options["cpp_wrapper"] = True
    try:
        # The compiler warns of its own use of torch, which is none of the caller's concern.
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=[]),
            warnings.catch_warnings(),
            silent(_COMPILER_LOG),
        ):
            warnings.simplefilter("ignore")
            examples: list[Any] = [tensor.detach() for tensor in inputs]
            # Its passes may write into the graph.
            run: Any = inductor_compile(copy.copy(module), examples, options=options)
    finally:
        Distribution.set_default_validate_args(validates)
    # Without what keeps TorchDynamo out at each call: nothing that calls this is traced by it.
    return _copying(run) if on_gpu else innermost_fn(run)


@contextlib.contextmanager
def silent(logger: logging.Logger) -> Iterator[None]:
    """Let a logger say nothing for a while."""
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _suits_cpp(module: GraphModule, inputs: Sequence[Tensor]) -> bool:
    """Whether C++ may call a graph's operations: there, failing linear algebra says no more why."""
    may_fail = any(
        n.target is torch.ops.aten._linalg_check_errors.default for n in module.graph.nodes
    )
    return not may_fail and all(tensor.device.type == "cpu" for tensor in inputs)


def _copying(run: Callable[..., Any]) -> Callable[..., Any]:
    """Copy results out of the memory that the next replay of a CUDA graph writes."""

    def replay(*inputs: Tensor) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return tree_map(torch.clone, run(*inputs))

    return replay


@functools.cache
def _missing_cpp_compiler() -> str:
    from torch._inductor import cpp_builder

    try:
        cpp_builder.get_cpp_compiler()
    except Exception as error:
        return f"no C++ compiler was found ({type(error).__name__})"
    return ""


@functools.cache
def _tell_once(missing: str) -> None:
    warnings.warn(
        f"graphs are recorded, not compiled, which is slower in long runs: {missing}; "
        "compile='record' asks for this",
        RuntimeWarning,
        stacklevel=4,
    )
