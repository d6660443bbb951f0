"""Steps of EM on attention's mixtures: where they lead, that they climb, and what masks leave."""

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bayesattn as ba
from bayesattn.inference import SVGD
from bayesattn.models import (
    DirichletMixing,
    KeysFromQueries,
    NormMixing,
    QueriesFromKeys,
    UniformMixing,
    VariancePrior,
)
from tests.models.mixture_cases import (
    DIM,
    KEYS,
    MASKS,
    QUERIES,
    VALUE_DIM,
    VARIANTS,
    hardest_masks,
    log_joint_by_enumeration,
    log_prior_of,
    make_masks,
    make_problem,
    pairs_of,
    start,
    step,
)

close = functools.partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
every_variant = pytest.mark.parametrize("name", VARIANTS)
sizes = st.integers(1, 5)


@every_variant
def test_the_m_step_is_where_the_expected_log_joint_has_no_slope(name, generator):
    """The expectation is the program's; centers are moved before the variance is."""
    model, data = VARIANTS[name], make_problem(generator)
    masks = hardest_masks(model, generator)
    state = start(model, data, masks, generator)
    posterior = model.responsibilities(state, *data, **masks)
    moved = step(model, state, data, masks)
    assert moved.keys() == state.keys()
    for site in state:
        at = dict(moved)
        if site in ("center", "retrieved_query") and "variance" in state:
            at["variance"] = state["variance"]
        at[site] = at[site].clone().requires_grad_()
        table = log_joint_by_enumeration(model, data, masks, at)
        value = torch.where(posterior > 0, posterior * table, 0.0).sum()
        value = value + log_prior_of(model, data, masks, at)
        (slope,) = torch.autograd.grad(value, at[site])
        if site == "mixing":
            slope = slope - slope.mean(-1, keepdim=True)
        close(slope, torch.zeros_like(slope), atol=1e-9)


@st.composite
def problems(draw):
    """A mixture with data, masks and a state, of any small sizes."""
    model = VARIANTS[draw(st.sampled_from(sorted(VARIANTS)))]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    size = {"queries": draw(sizes), "keys": draw(sizes)}
    lead = (2,)
    data = make_problem(generator, lead, dim=draw(sizes), value_dim=draw(sizes), **size)
    scale = draw(st.sampled_from([0.1, 1.0, 10.0]))
    data = tuple(scale * part for part in data)
    masks = hardest_masks(model, generator, lead=lead, **size) if draw(st.booleans()) else {}
    return model, data, masks, start(model, data, masks, generator)


@settings(max_examples=80)
@given(problems())
def test_no_step_lowers_the_log_joint_of_any_mixture(problem):
    model, data, masks, state = problem
    before = model.log_density(state, *data, **masks)
    for _ in range(3):
        state = step(model, state, data, masks)
        after = model.log_density(state, *data, **masks)
        assert after.isfinite().all()
        assert (after >= before - 1e-9 * (1 + before.abs())).all()
        before = after


@settings(max_examples=100)
@given(problems())
def test_no_key_is_explained_away(problem):
    """Its column sums to at least one over the most keys that a query may see, at any state."""
    model, data, masks, state = problem
    if isinstance(model, QueriesFromKeys):
        model = KeysFromQueries()
        state = start(model, data, masks, torch.Generator().manual_seed(0))
    weights = model.weights(state, *data, **masks)
    seen = pairs_of(masks, weights.shape)
    close(weights.sum(-1), seen.any(-1).double())
    bound = 1 / seen.sum(-1).amax(-1, keepdim=True).clamp_min(1)
    mass = weights.sum(-2)
    assert (mass >= bound - 1e-12)[seen.any(-2)].all()
    assert (mass[~seen.any(-2)] == 0).all()


def test_softmax_explains_a_key_away_where_its_rival_does_not():
    """The bound is not met by chance: two keys, one of which every query prefers by far."""
    query, key = torch.ones(3, 1), torch.tensor([[20.0], [-20.0]])
    softmax, doubly = QueriesFromKeys(), KeysFromQueries()
    assert softmax.weights({}, query, key).sum(0)[1] < 1e-12
    state = doubly.initial_state(query, key)
    close(doubly.weights(state, query, key).sum(0), torch.full((2,), 1.5))


@pytest.mark.parametrize("kind", MASKS)
def test_a_step_of_retrieval_is_softmax_attention_over_the_keys(kind, generator):
    """A step of a Hopfield network, from the cue; with a finite cue scale, on the way there."""
    data, masks = make_problem(generator), make_masks(kind, generator)
    query, key, _ = data
    free, tied = QueriesFromKeys(cue_scale=math.inf), QueriesFromKeys(cue_scale=2.0)
    live = pairs_of(masks, (*query.shape[:-1], KEYS)).any(-1)
    average = ba.attention(query, key, key, **masks)
    moved = step(free, free.initial_state(*data, **masks), data, masks)["retrieved_query"]
    close(moved, torch.where(live[..., None], average, query))
    gain = 4 / (4 + DIM**0.5)
    moved = step(tied, tied.initial_state(*data, **masks), data, masks)["retrieved_query"]
    close(moved, torch.where(live[..., None], query + gain * (average - query), query))


@every_variant
def test_what_stands_in_padding_does_not_matter(name, generator):
    model, data = VARIANTS[name], make_problem(generator)
    masks = make_masks("padding", generator)
    hidden = {0: masks["query_mask"], 1: masks["key_mask"], 2: masks["key_mask"]}
    noise = [7 * torch.randn(part.shape, generator=generator) for part in data]
    other = tuple(
        torch.where(hidden[axis][:, None, :, None], part, part + noise[axis])
        for axis, part in enumerate(data)
    )
    state, changed = (model.initial_state(*d, **masks) for d in (data, other))
    for _ in range(2):
        weights, same = (
            model.weights(s, *d, **masks) for s, d in ((state, data), (changed, other))
        )
        close(weights, same)
        before, after = (
            model.log_density(s, *d, **masks) for s, d in ((state, data), (changed, other))
        )
        # Padded centers stand at the mode of their priors either way.
        close(before, after, rtol=1e-10)
        state, changed = step(model, state, data, masks), step(model, changed, other, masks)


@every_variant
def test_mixtures_of_a_batch_do_not_meet(name, generator):
    model, data = VARIANTS[name], make_problem(generator)
    masks = hardest_masks(model, generator)
    state = model.initial_state(*data, **masks)
    moved, value = step(model, state, data, masks), model.log_density(state, *data, **masks)
    one = tuple(part[1, 2] for part in data)
    pairs = masks.get("attn_mask")
    of_one = {n: m[1] for n, m in masks.items() if n != "attn_mask"}
    of_one |= {} if pairs is None else {"attn_mask": pairs[2]}
    alone = model.initial_state(*one, **of_one)
    close(model.log_density(alone, *one, **of_one), value[1, 2])
    for site, after in step(model, alone, one, of_one).items():
        close(after, moved[site][1, 2].reshape(after.shape))


@pytest.mark.filterwarnings("ignore::bayesattn.inference.ConvergenceWarning")
@pytest.mark.parametrize("program", [KeysFromQueries, QueriesFromKeys])
def test_arviz_gets_a_name_for_every_axis(program, generator):
    own = {"center_scale": 1.0} if program is KeysFromQueries else {"cue_scale": 1.0}
    model = program(mixing=DirichletMixing(), **own)
    data, masks = make_problem(generator, (3,)), make_masks("padding", generator, (3,))
    routine = SVGD(model, num_particles=2, compile="none")
    tree = routine.run(*data, num_steps=1, progress=False, **masks).to_arviz()
    component = "query" if program is KeysFromQueries else "key"
    latent = "center" if program is KeysFromQueries else "retrieved_query"
    observed = f"observed_{'key' if program is KeysFromQueries else 'query'}"
    axes = {
        "posterior": {
            latent: ("head", "query", "feature"),
            "weights": ("head", "query", "key"),
            "output": ("head", "query", "value_feature"),
        },
        "observed_data": {observed: ("head", observed.split("_")[1], "feature")},
    }
    for group, sites in axes.items():
        for site, names in sites.items():
            assert tree[group][site].dims[-3:] == names
    assert tree["posterior"]["mixing"].dims[-1] == component
    sizes = dict(tree["posterior"]["output"].sizes)
    assert (sizes["query"], sizes["value_feature"]) == (QUERIES, VALUE_DIM)
    given = {"query": "queries", "key": "keys"}[component]
    assert tree["constant_data"][given].dims[-2:] == (component, "feature")
    assert tree["constant_data"]["query_mask"].dims[-1] == "query"


def test_settings_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match="center_scale must be positive, got 0"):
        KeysFromQueries(center_scale=0)
    with pytest.raises(ValueError, match="rate must be positive, got -1"):
        VariancePrior(2.0, -1)
    with pytest.raises(ValueError, match="concentration must be above one, got 1"):
        DirichletMixing(1)
    with pytest.raises(ValueError, match=r"NormMixing\(\) needs a variance that is given"):
        QueriesFromKeys(variance=VariancePrior(2.0, 1.0), mixing=NormMixing())


@pytest.mark.parametrize("model", [KeysFromQueries(), QueriesFromKeys(mixing=UniformMixing())])
def test_arguments_that_do_not_fit_are_refused(model, generator):
    query, key, value = make_problem(generator)
    for call in (model, model.initial_state):
        with pytest.raises(ValueError, match=r"share leading axes and width, got queries"):
            call(query, key[..., :-1], value)
        with pytest.raises(ValueError, match=r"share leading axes and width, got queries"):
            call(query[0], key, value)
        with pytest.raises(ValueError, match="values must be one for each key"):
            call(query, key, value[..., :-1, :])
        with pytest.raises(ValueError, match="must have one floating type"):
            call(query, key.float(), value)
        with pytest.raises(ValueError, match="attn_mask must be boolean, got"):
            call(query, key, value, attn_mask=torch.zeros(QUERIES, KEYS))
        with pytest.raises(ValueError, match="key_mask: expected"):
            call(query, key, value, key_mask=torch.ones(KEYS + 1, dtype=torch.bool))
        with pytest.raises(ValueError, match=r"must be '\[\[batch\] head\] query dim'"):
            call(query[None], key[None], value[None])


def test_learned_shares_are_refused_where_data_see_different_components(generator):
    data, masks = make_problem(generator), make_masks("pairs", generator)
    with pytest.raises(ValueError, match=r"attn_mask goes with shares that are given"):
        KeysFromQueries(mixing=DirichletMixing()).log_density({}, *data, **masks)
