r"""Summing discrete latent sites out of a Pyro trace, exactly, by variable elimination.

.. math:: \log \sum_z \prod_f e^{\ell_f(z)}

Each factor's axes bear names, so a Markov model that recycles tensor dimensions is summed right.
Masks act inside the sum on what depends on a discrete site, scales outside of it.

Source:
    Obermeyer et al. (2019), Tensor variable elimination for plated factor graphs, arXiv:1902.03210.
    The algorithm over plates is Pyro's.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.infer import config_enumerate
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree, contract_to_tensor
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from bayesattn.inference.log_space import SafeLogRing

__all__ = ["enumerated", "log_terms", "marked", "pointwise_log_likelihood"]


def enumerated(model: Callable, first_available_dim: int) -> Callable:
    """Return the program with every discrete latent site enumerated in parallel.

    Args:
        model: A Pyro program.
        first_available_dim: First tensor dimension, from the right, left of all plates.
    """
    program_marked = marked(model)

    def program(*args: Any, **kwargs: Any) -> Any:
        with _Enumeration(first_available_dim):
            return program_marked(*args, **kwargs)

    return program


def marked(model: Callable) -> Callable:
    """Return the program with every discrete latent site marked for parallel enumeration."""
    return config_enumerate(model, default="parallel")


def log_terms(trace: Any) -> list[Tensor]:
    """Terms whose entries sum to the log joint density of an enumerated trace, in nats.

    Args:
        trace: Trace of a program made by :func:`enumerated`.

    Raises:
        ValueError: If sites that depend on one discrete site have different scales.
    """
    plain, components = _components(trace)
    terms = [site["log_prob"] for site in plain]
    for factors, dims, scale in components:
        summed = contract_tensor_tree(factors, dims, ring=SafeLogRing())
        terms += [scale * term for group in summed.values() for term in group]
    return terms


def pointwise_log_likelihood(trace: Any, observed: tuple[str, ...]) -> dict[str, Tensor]:
    """Log likelihood of each observed site over its plates, discrete sites summed out, unscaled.

    Args:
        trace: Trace of a program made by :func:`enumerated`.
        observed: Names of the observed sites wanted.

    Raises:
        ValueError: If an observation shares a discrete site with another observed site or with
            other elements of its own, so that it has no likelihood of its own.
    """
    plain, components = _components(trace)
    plain_names = {site["name"] for site in plain}
    result = {}
    for name in observed:
        site = trace.nodes[name]
        if name in plain_names:
            value = site["packed"]["unscaled_log_prob"]
            value = packed.scale_and_mask(value, mask=site["packed"]["mask"])
            result[name] = _unpack(value, trace, site)
            continue
        factors, dims, _ = next(c for c in components if c[0] and name in c[0].names)
        others = [other for other in factors.names if other != name and other in observed]
        ordinal = _ordinal(trace, site)
        coupled = [o for o in factors if not ordinal <= o]
        if others or coupled:
            raise ValueError(
                f"observed site {name!r} is coupled to {others or 'its own other elements'} "
                "through a discrete site outside of its plates, so it has no pointwise log "
                "likelihood; score the joint log density instead"
            )
        value = contract_to_tensor(
            OrderedDict(factors), dims, target_ordinal=ordinal, ring=SafeLogRing()
        )
        result[name] = _unpack(value, trace, site)
    return result


class _Enumeration(EnumMessenger):
    """Pyro's enumeration, reading shapes in a way that function transforms allow."""

    def _pyro_post_sample(self, msg: Any) -> None:
        if not isinstance(msg["fn"], TorchDistributionMixin) or msg["value"] is None:
            return
        dims = msg["infer"].setdefault("_dim_to_id", {})
        dims.update(self._param_dims.get(msg["name"], {}))
        value, event_dim = msg["value"], msg["fn"].event_dim
        self._value_dims[msg["name"]] = {
            dim: identity
            for dim, identity in dims.items()
            if value.dim() - event_dim >= -dim and value.shape[dim - event_dim] > 1
        }


class _NamedFactors(OrderedDict):
    """Log factors by the plates around them, with the names of their sites."""

    names: list[str]


def _components(trace: Any) -> tuple[list[Any], list[tuple[_NamedFactors, set[str], Any]]]:
    """Split a trace into sites free of discrete ones, and connected groups to be summed out."""
    trace.compute_log_prob()
    trace.pack_tensors()
    plates = set(trace.plate_to_symbol.values())
    discrete = set(trace.symbol_to_dim) - plates
    sites = [
        site
        for site in trace.nodes.values()
        if site["type"] == "sample" and not isinstance(site["fn"], _Subsample)
    ]
    plain = [s for s in sites if discrete.isdisjoint(s["packed"]["log_prob"]._pyro_dims)]
    groups: list[tuple[set[str], list[Any]]] = []
    for site in sites:
        dims = discrete.intersection(site["packed"]["log_prob"]._pyro_dims)
        if not dims:
            continue
        touched = [group for group in groups if group[0] & dims]
        groups = [group for group in groups if not group[0] & dims]
        members = [member for group in touched for member in group[1]]
        groups.append((dims.union(*(group[0] for group in touched)), [*members, site]))
    return plain, [_factors_of(trace, dims, members) for dims, members in groups]


def _factors_of(
    trace: Any, dims: set[str], sites: list[Any]
) -> tuple[_NamedFactors, set[str], Any]:
    factors = _NamedFactors()
    factors.names = [site["name"] for site in sites]
    for site in sites:
        term = site["packed"]["unscaled_log_prob"]
        if site["infer"].get("_enumerate_dim") is None:
            term = packed.scale_and_mask(term, mask=site["packed"]["mask"])
        factors.setdefault(_ordinal(trace, site), []).append(term)
    scales = [site["scale"] for site in sites]
    if any(not isinstance(scale, float | int) for scale in scales):
        same = all(scale is scales[0] for scale in scales)
    else:
        same = len(set(scales)) == 1
    if not same:
        raise ValueError(
            f"sites {factors.names} share a discrete site but have different scales {scales}; a "
            "scale acts outside of the sum over a discrete site, so all of them need the same"
        )
    return factors, dims, scales[0]


def _ordinal(trace: Any, site: Any) -> frozenset[str]:
    return frozenset(
        trace.plate_to_symbol[frame.name] for frame in site["cond_indep_stack"] if frame.vectorized
    )


def _unpack(value: Any, trace: Any, site: Any) -> Tensor:
    """Lay a packed tensor out over the site's plates, in the order of the site's own axes."""
    frames = sorted((f for f in site["cond_indep_stack"] if f.vectorized), key=lambda f: f.dim)
    symbols = [trace.plate_to_symbol[frame.name] for frame in frames]
    present = [symbol for symbol in symbols if symbol in value._pyro_dims]
    value = value.permute([value._pyro_dims.index(symbol) for symbol in present])
    for axis, (symbol, frame) in enumerate(zip(symbols, frames, strict=True)):
        if symbol not in present:
            value = value.unsqueeze(axis)
        value = value.expand(*value.shape[:axis], frame.size, *value.shape[axis + 1 :])
    return value
