"""The first value of a log density, taken eagerly, where much that is wrong shows by its name."""

import random
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from bayesattn.inference.arguments import Bound, describe_arguments, found_nan
from bayesattn.inference.handlers import first_line
from bayesattn.inference.prior_run import protected_tensors
from bayesattn.inference.program import Program
from bayesattn.inference.quiet import quiet_pyro
from bayesattn.inference.running import seeded
from bayesattn.inference.substitution import Substitution, joint_trace, log_joint
from bayesattn.inference.watches import OperationWatch, WriteRefusedError

__all__ = ["check_first_value"]


def check_first_value(
    bound: Bound,
    program: Program,
    *,
    subsample: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    random_numbers: Literal["none", "torch", "any"],
) -> None:
    """Evaluate a program's log joint at its first values; refuse what is no function, or no number.

    Args:
        bound: The program with its arguments.
        program: Its sites.
        subsample: Indices of the subsampled plates.
        parameters: Values of the ``pyro.param`` sites.
        random_numbers: From where a program may draw outside of sample sites.

    Raises:
        ValueError: If the program draws random numbers that it may not, writes what is not its own,
            or has a site whose log probability is NaN or goes over an axis that its data lack.
    """

    def sites(**values: Any) -> dict[str, Any]:
        run = Substitution(program, subsample=subsample, parameters=parameters, **values)
        try:
            trace = joint_trace(bound, program, run)
            log_joint(trace, program, run)
        except WriteRefusedError:
            raise
        except Exception as error:
            raise ValueError(
                f"the model has no log density at or after site {run.last_site!r} on "
                f"{describe_arguments(bound.args, bound.kwargs)}: {first_line(error)}"
            ) from error
        return {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}

    watch = OperationWatch(protected_tensors(*bound))
    with (
        seeded(0, program.device),
        torch.no_grad(),
        quiet_pyro(bound.args, bound.kwargs),
        watch,
    ):
        before = _python_random_states()
        met = sites(constrained=program.first_values)
        drawn = [name for name, state in _python_random_states().items() if state != before[name]]
        if _sites_with_nan(met):
            # A draw from a wide prior may overflow, which is no fault; NaN here too is one.
            origin = torch.zeros(program.dim, dtype=program.dtype, device=program.device)
            met = sites(unconstrained=origin)
    _refuse_random_numbers(watch.random_operations, drawn, random_numbers)
    _refuse_nan(bound, met)
    for name in filter(met.__contains__, program.observed):
        # Left of all plates stand the discrete sites, where there are any.
        axes = program.plate_nesting if program.discrete else met[name]["log_prob"].ndim
        _refuse_spread(name, met[name], axes)


def _python_random_states() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state()
    return {"numpy.random": (kind, keys.tobytes(), *rest), "random": random.getstate()}  # type: ignore[union-attr]


def _refuse_random_numbers(of_torch: list[str], of_python: list[str], allowed: str) -> None:
    refused = [*of_python, *of_torch] if allowed == "none" else of_python
    if not refused or allowed == "any":
        return
    if allowed == "torch":
        raise ValueError(
            f"the model draws random numbers from {refused}, which a recorded graph cannot draw "
            "anew; draw them with torch, or ask for compile='none'"
        )
    raise ValueError(
        f"the model draws random numbers by {refused} outside of pyro.sample, so its log density "
        "is not a function; call .eval() on modules with dropout, or ask for stochastic=True, "
        "which draws them anew at each evaluation, shared by all particles"
    )


def _sites_with_nan(sites: Mapping[str, Any]) -> list[str]:
    return [name for name, site in sites.items() if bool(site["log_prob"].isnan().any())]


def _refuse_nan(bound: Bound, sites: Mapping[str, Any]) -> None:
    names = _sites_with_nan(sites)
    if not names:
        return
    entries = sites[names[0]]["log_prob"].isnan()
    raise ValueError(
        f"the log probability at site {names[0]!r} is NaN in {int(entries.sum())} of "
        f"{entries.numel()} entries{found_nan(*bound)}"
    )


def _refuse_spread(name: str, site: Any, num_axes: int) -> None:
    """Refuse data and distributions that repeat each other where no plate says that they may."""
    plates = {frame.dim: frame for frame in site["cond_indep_stack"] if frame.vectorized}
    distribution, value = site["fn"], site["value"]
    if site["infer"].get("_enumerate_dim") or not isinstance(value, Tensor):
        return
    shape = value.shape[: value.ndim - distribution.event_dim]
    # Left of all plates distributions have the axes of the discrete sites, data have none.
    batch = distribution.batch_shape[-num_axes:] if num_axes else torch.Size()
    free = [axis for axis in range(-max(len(shape), len(batch)), 0) if axis not in plates]
    data_repeated = [axis for axis in free if _size(batch, axis) > _size(shape, axis)]
    distribution_repeated = [axis for axis in free if _size(shape, axis) > _size(batch, axis)]
    # Without plates data may be many draws of one distribution, or one of many.
    if not plates and not (data_repeated and distribution_repeated):
        return
    for repeated, what in ((data_repeated, "data"), (distribution_repeated, "distribution")):
        if repeated:
            sizes = {frame.name: frame.size for frame in plates.values()}
            raise ValueError(
                f"at the observed site {name!r} data of shape {tuple(value.shape)} meet a "
                f"distribution of batch shape {tuple(distribution.batch_shape)} in plates of sizes "
                f"{sizes}, which repeats the {what} along axis {repeated[0]}, for which there is "
                "no plate; check the tensors' shapes"
            )


def _size(shape: torch.Size, axis: int) -> int:
    """Size of an axis counted from the right; one left of the shape."""
    return shape[axis] if -axis <= len(shape) else 1
