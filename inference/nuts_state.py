"""State of Pyro's no-U-turn sampler between two draws, as plain values and tensors."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map_only

__all__ = ["load_sampler_state", "sampler_state"]

_AVERAGES = ("prox_center", "_x_avg", "_g_avg", "_t", "_x_t")
_MOMENTS = ("n_samples", "_mean", "_m2")


def sampler_state(sampler: Any) -> dict[str, Any]:
    """Everything that the next draw depends on, less random numbers.

    Args:
        sampler: A :class:`pyro.infer.NUTS` whose position has one site.
    """
    adapter = sampler._adapter
    matrices = adapter.mass_matrix_adapter
    averages = adapter._step_size_adapt_scheme
    (sites,) = matrices.inverse_mass_matrix
    return {
        "count": [sampler._t, sampler._accept_cnt, float(sampler._mean_accept_prob)],
        "divergences": list(sampler._divergences),
        "position": dict(sampler._z_last),
        "potential": sampler._potential_energy_last,
        "gradients": dict(sampler._z_grads_last),
        "step_size": adapter.step_size,
        "window": adapter._current_window,
        "averages": {n: getattr(averages, n) for n in _AVERAGES if hasattr(averages, n)},
        "inverse_mass_matrix": matrices.inverse_mass_matrix[sites],
        "moments": {n: getattr(matrices._adapt_scheme[sites], n) for n in _MOMENTS},
    }


def load_sampler_state(sampler: Any, state: Mapping[str, Any]) -> None:
    """Go to where a state was taken; the sampler is set up already."""
    adapter = sampler._adapter
    matrices = adapter.mass_matrix_adapter
    (sites,) = matrices.inverse_mass_matrix
    device = matrices.inverse_mass_matrix[sites].device
    state = tree_map_only(Tensor, lambda tensor: tensor.to(device), dict(state))
    sampler._t, sampler._accept_cnt, sampler._mean_accept_prob = state["count"]
    sampler._divergences = state["divergences"]
    sampler._cache(state["position"], state["potential"], state["gradients"])
    adapter.step_size, adapter._current_window = state["step_size"], state["window"]
    # Setting the matrix forgets the moments, so they come after it.
    matrices.inverse_mass_matrix = {sites: state["inverse_mass_matrix"]}
    for name, value in state["moments"].items():
        setattr(matrices._adapt_scheme[sites], name, value)
    for name, value in state["averages"].items():
        setattr(adapter._step_size_adapt_scheme, name, value)
