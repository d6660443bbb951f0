"""Problems of queries and keys, their masks, and the posterior over assignments one by one."""

import itertools
import math

import pyro.poutine as poutine
import torch

from bayesattn.models import (
    DirichletMixing,
    KeysFromQueries,
    QueriesFromKeys,
    UniformMixing,
    VariancePrior,
)

BATCH, HEADS, QUERIES, KEYS, DIM, VALUE_DIM = 2, 3, 5, 7, 11, 13
MASKS = ("none", "padding", "pairs", "padding and pairs")

# Whatever a mixture may be given in either direction.
SHARED = {
    "by norms": {},
    "equal": {"mixing": UniformMixing(), "variance": 0.7},
    "learned": {"mixing": DirichletMixing(1.5)},
    "latent variance": {"mixing": UniformMixing(), "variance": VariancePrior(3.0, 2.0)},
    "all latent": {"mixing": DirichletMixing(2.0), "variance": VariancePrior(2.0, 1.5)},
}


OWN = {
    KeysFromQueries: {
        "flat": {},
        "priors": {"center_scale": 0.8},
        "values": {"value_variance": 0.6},
        "values with priors": {
            "center_scale": 0.9,
            "value_variance": 0.6,
            "value_center_scale": 1.7,
        },
    },
    QueriesFromKeys: {"data": {}, "cues": {"cue_scale": 0.7}, "retrieval": {"cue_scale": math.inf}},
}
VARIANTS = {
    f"{program.__name__}, {own}, {shared}": program(**OWN[program][own], **SHARED[shared])
    for program in OWN
    for own, shared in itertools.product(OWN[program], SHARED)
}


def make_problem(generator, lead=(BATCH, HEADS), queries=QUERIES, keys=KEYS, dim=DIM, **options):
    """Random queries, keys and values, as the programs take them."""
    sizes = ((queries, dim), (keys, dim), (keys, options.get("value_dim", VALUE_DIM)))
    dtype = options.get("dtype", torch.float64)
    shapes = [(*lead, *size) for size in sizes]
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)


def make_masks(kind, generator, lead=(BATCH, HEADS), queries=QUERIES, keys=KEYS):
    """Masks in which some query sees no key, and some key no query, where there are several."""
    masks = {}
    if "padding" in kind:
        for name, size in (("query_mask", queries), ("key_mask", keys)):
            mask = torch.rand((*lead[:-1], size), generator=generator) < 0.7
            mask[..., 0], mask[..., 1:2] = True, False
            masks[name] = mask
    if "pairs" in kind:
        mask = torch.rand((*lead[-1:], queries, keys), generator=generator) < 0.6
        mask[..., 0, 0], mask[..., 2:3, :], mask[..., :, 3:4] = True, False, False
        masks["attn_mask"] = mask
    return masks


def hardest_masks(model, generator, **sizes):
    """All masks that a mixture takes."""
    learned = isinstance(model.mixing, DirichletMixing)
    return make_masks("padding" if learned else "padding and pairs", generator, **sizes)


def trace_of(model, data, masks, values):
    """Run the program at given values, with the log density of each site."""
    with torch.random.fork_rng(devices=[]):
        trace = poutine.trace(poutine.condition(model, values)).get_trace(*data, **masks)
    trace.compute_log_prob()
    return trace


def log_joint_by_enumeration(model, data, masks, state):
    """Log density of each datum with each component, from the program told all assignments.

    Returns:
        "*problem query key", before any mask of pairs but the program's own.
    """
    is_of_keys = model.component_axis == -2
    count, size = data[0 if is_of_keys else 1].shape[-2], data[1 if is_of_keys else 0].shape[-2]
    columns = []
    for component in range(count):
        chosen = torch.full((*data[0].shape[:-2], size), component)
        trace = trace_of(model, data, masks, state | {"assignment": chosen})
        columns.append(sum(trace.nodes[name]["log_prob"] for name in data_sites(model)))
    return torch.stack(columns, model.component_axis)


def log_prior_of(model, data, masks, state):
    """Log density of all sites that no assignment bears on, cues among them."""
    trace = trace_of(model, data, masks, state)
    known = data_sites(model)
    sites = [n for n in state.keys() | {"observed_query"} if n not in known and n in trace.nodes]
    return sum((trace.nodes[name]["log_prob"].sum() for name in sites), torch.zeros(()))


def data_sites(model):
    """The assignment, and what is drawn given it."""
    if model.component_axis == -2:
        values = () if model.value_variance is None else ("observed_value",)
        return ("assignment", "observed_key", *values)
    return ("assignment", "observed_query" if model.cue_scale is None else "retrieved_query")


def pairs_of(masks, shape):
    """Which pairs take part, put together here once more."""
    seen = masks.get("attn_mask", torch.ones((), dtype=torch.bool)).expand(shape).clone()
    if "query_mask" in masks:
        seen &= masks["query_mask"].unsqueeze(-2).unsqueeze(-1)
        seen &= masks["key_mask"].unsqueeze(-2).unsqueeze(-2)
    return seen


def start(model, data, masks, generator):
    """A state that is no special one, within its supports."""
    state = model.initial_state(*data, **masks)
    for name, value in state.items():
        noise = 0.4 * torch.randn(value.shape, generator=generator, dtype=value.dtype)
        state[name] = value * noise.exp() if name in ("variance", "mixing") else value + noise
    if "mixing" in state:
        state["mixing"] = state["mixing"] / state["mixing"].sum(-1, keepdim=True)
    return state


def step(model, state, data, masks):
    """One step of EM."""
    return model.m_step(state, model.e_step(state, *data, **masks), *data, **masks)
