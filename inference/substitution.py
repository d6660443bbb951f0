r"""One run of a Pyro program at given values of its latent sites, and the log joint of that run.

.. math:: \log p(x(u), y) + \log |\det \partial x / \partial u|

where each latent site's value :math:`x` comes from its slice of :math:`u` by the bijection onto the
support that the site has *in that run*, so that supports may depend on other latents.
"""

import weakref
from collections.abc import Mapping
from typing import Any

import pyro.poutine as poutine
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import constraints

from bayesattn.inference import enumeration
from bayesattn.inference.arguments import Bound
from bayesattn.inference.bijections import bijection
from bayesattn.inference.program import Program

__all__ = ["Substitution", "joint_trace", "log_joint"]


class Substitution(Messenger):
    """Gives a run its latent values, subsample indices and parameters, and sums log determinants.

    Args:
        program: What the first run told.
        unconstrained: The unconstrained vector, or None where ``constrained`` is given.
        constrained: Values of the latent sites; their unconstrained images are collected.
        subsample: Indices of the subsampled plates.
        parameters: Values of the ``pyro.param`` sites.

    Attributes:
        values: Each latent site's constrained value, once the run has met it.
        images: Each latent site's unconstrained value.
        log_determinants: One for each latent site met whose support is not the whole line.
        last_site: The last site met.
    """

    def __init__(
        self,
        program: Program,
        *,
        unconstrained: Tensor | None = None,
        constrained: Mapping[str, Tensor] | None = None,
        subsample: Mapping[str, Tensor] | None = None,
        parameters: Mapping[str, Tensor] | None = None,
    ):
        super().__init__()
        self._latents = {site.name: site for site in program.latents}
        self._unconstrained = unconstrained
        self._constrained = {} if constrained is None else constrained
        self._subsample = {} if subsample is None else subsample
        self._parameters = {} if parameters is None else parameters
        self.values: dict[str, Tensor] = {}
        self.images: dict[str, Tensor] = {}
        self.log_determinants: list[Tensor] = []
        self.last_site: str | None = None

    def _pyro_sample(self, msg: Any) -> None:
        self.last_site = msg["name"]
        if isinstance(msg["fn"], _Subsample):
            if msg["name"] in self._subsample:
                msg["value"] = self._subsample[msg["name"]]
            return
        site = self._latents.get(msg["name"])
        if site is None or msg["is_observed"]:
            return
        transform: Any = bijection(msg["fn"].support)
        if self._unconstrained is None:
            value = self._constrained[site.name]
            image = transform.inv(value)
        else:
            image = self._unconstrained[site.start : site.stop]
            image = image.reshape(site.unconstrained_shape).to(site.dtype)
            value = transform(image)
        if msg["fn"].support is not constraints.real:
            self.log_determinants.append(transform.log_abs_det_jacobian(image, value).sum())
        self.values[site.name], self.images[site.name] = value, image
        msg["value"], msg["done"] = value, True

    def _pyro_param(self, msg: Any) -> None:
        if msg["name"] in self._parameters:
            value: Any = self._parameters[msg["name"]]
            # Subsampling plates ask a parameter for the value that an optimizer would move.
            value.unconstrained = weakref.ref(value)
            msg["value"], msg["done"] = value, True


def joint_trace(bound: Bound, program: Program, run: Substitution) -> Any:
    """Run a program under a substitution; return its Pyro trace with the log density of each site.

    Discrete latent sites are enumerated.
    """
    model = bound.model
    if program.discrete:
        model = enumeration.enumerated(model, program.event_start)
    with run:
        trace = poutine.trace(model).get_trace(*bound.args, **bound.kwargs)
    try:
        trace.compute_log_prob()
    except Exception:
        met = (name for name, site in trace.nodes.items() if site["type"] == "sample")
        run.last_site = next((n for n in met if "log_prob" not in trace.nodes[n]), run.last_site)
        raise
    return trace


def log_joint(trace: Any, program: Program, run: Substitution) -> Tensor:
    """Log joint density of a run, discrete sites summed out, with its log determinants, in nats.

    Sums are taken in the precision of the unconstrained vector, which may exceed the program's.
    """
    if program.discrete:
        terms = enumeration.log_terms(trace)
    else:
        terms = [site["log_prob"] for site in trace.nodes.values() if site["type"] == "sample"]
    total = torch.zeros((), dtype=program.dtype, device=program.device)
    for term in (*terms, *run.log_determinants):
        total = total + term.sum(dtype=torch.promote_types(term.dtype, program.dtype))
    return total.to(program.dtype)
