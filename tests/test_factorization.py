"""Factorization of heads' products: against dense tensors, another package, and known answers."""

import warnings

import pytest
import tensorly
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensorly.decomposition import parafac

from bayesattn.alternating_least_squares import Factors, HeadProducts, sweep
from bayesattn.factor_starts import START_NAMES, start_factors
from bayesattn.factorization import factorize
from bayesattn.head_decomposition import head_factors, truncated_heads
from bayesattn.width_choice import width_for_error

HEADS, DIM, QUERY, KEY = 3, 5, 11, 13


@pytest.fixture
def heads(generator):
    """Weights of heads, of a batch of layers if asked for."""

    def build(*layers, num_heads=HEADS, dim=DIM, query=QUERY, key=KEY):
        return (
            torch.randn(*layers, num_heads, dim, query, generator=generator),
            torch.randn(*layers, num_heads, dim, key, generator=generator),
        )

    return build


@pytest.fixture
def shareable(generator):
    """Heads that each mix some of a few components that all share, and noise beside them."""

    def build(width, *, num_heads=6, dim=5, query=23, key=19, noise=0.0):
        shared = [torch.randn(width, size, generator=generator) for size in (query, key)]
        sides = []
        for _ in range(num_heads):
            chosen = torch.randperm(width, generator=generator)[:dim]
            sizes = torch.randn(dim, 1, generator=generator)
            sides.append((sizes * shared[0][chosen], shared[1][chosen]))
        found = [torch.stack(side) for side in zip(*sides, strict=True)]
        return [
            side + noise * side.std() * torch.randn(side.shape, generator=generator)
            for side in found
        ]

    return build


def dense(query, key):
    return torch.einsum("...hdq,...hdk->...hqk", query, key)


def rebuilt(factors):
    query, mixing, key = factors[:3]
    return torch.einsum("...rq,...hr,...rk->...hqk", query, mixing, key)


def norm(tensor):
    return tensor.square().sum((-3, -2, -1)).sqrt()


@pytest.mark.parametrize("start", [*START_NAMES, "best"])
@pytest.mark.parametrize("width", [1, 4, 7])
def test_errors_are_those_of_the_dense_tensor(heads, start, width):
    query, key = heads()
    found = factorize(query, key, width, start=start, num_iterations=6)
    exact, product = dense(query, key), rebuilt(found)
    torch.testing.assert_close(found.relative_error, norm(product - exact) / norm(exact))
    by_head = (product - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    torch.testing.assert_close(found.head_errors, by_head)
    torch.testing.assert_close(found.history[-1], found.relative_error)
    assert found.query_weight.shape == (width, QUERY)
    assert found.mixing.shape == (HEADS, width)
    assert found.key_weight.shape == (width, KEY)


def test_a_sweep_solves_each_least_squares_problem(heads, generator):
    """Against solutions by the dense unfoldings."""
    query, key = heads()
    exact = dense(query, key)
    width = 4
    factors = Factors(
        *(
            torch.randn(1, *shape, generator=generator)
            for shape in ((width, QUERY), (HEADS, width), (width, KEY))
        )
    )
    found, explained = sweep(HeadProducts(query[None], key[None]), factors)
    a, m, b = (part[0].clone() for part in factors)

    def solved(unfolding, one, other):
        columns = torch.einsum("ir,jr->ijr", one, other).flatten(0, 1)
        return torch.linalg.lstsq(columns, unfolding.flatten(1).mT).solution

    a = solved(exact.movedim(1, 0), m, b.mT)
    m, a = m * a.norm(dim=1), a / a.norm(dim=1, keepdim=True)
    b = solved(exact.movedim(2, 0), m, a.mT)
    b = b / b.norm(dim=1, keepdim=True)
    m = solved(exact, a.mT, b.mT).mT
    for one, other in zip(found, (a, m, b), strict=True):
        torch.testing.assert_close(one[0], other, rtol=1e-7, atol=1e-7)
    rest = (exact - rebuilt((a, m, b))).square().sum((1, 2))
    torch.testing.assert_close(exact.square().sum((1, 2)) - rest, explained[0])


@pytest.mark.parametrize("start", START_NAMES)
def test_no_sweep_raises_the_error(heads, start):
    query, key = heads(2)
    found = factorize(query, key, 6, start=start, num_iterations=40, tolerance=0)
    falls = found.history[:, :-1] - found.history[:, 1:]
    assert falls.min() >= -1e-12
    assert (found.history[:, 0] - found.history[:, -1]).min() > 1e-3


@given(
    num_heads=st.integers(1, 4),
    dim=st.integers(1, 4),
    query=st.integers(1, 9),
    key=st.integers(1, 9),
    width=st.integers(1, 20),
    seed=st.integers(0, 1000),
)
def test_bounds_and_exactness_at_all_sizes(num_heads, dim, query, key, width, seed):
    generator = torch.Generator().manual_seed(seed)
    sides = [
        torch.randn(num_heads, dim, size, generator=generator, dtype=torch.float64)
        for size in (query, key)
    ]
    found = factorize(*sides, width, num_iterations=12)
    assert 0 <= found.lower_bound <= found.relative_error <= 1 + 1e-9
    if width >= num_heads * dim:
        assert found.relative_error < 1e-12
    torch.testing.assert_close(
        norm(rebuilt(found) - dense(*sides)) / norm(dense(*sides)),
        found.relative_error,
        rtol=1e-6,
        atol=1e-9,
    )


def test_the_bound_is_what_the_unfoldings_say(heads):
    query, key = heads()
    exact = dense(query, key)
    tails = []
    for unfolding in (exact.movedim(1, 0).flatten(1), exact.movedim(2, 0).flatten(1)):
        values = torch.linalg.svdvals(unfolding)
        tails.append(values[6:].norm() / values.norm())
    found = factorize(query, key, 6, num_iterations=1)
    torch.testing.assert_close(found.lower_bound, max(tails))


def test_what_heads_share_is_found_to_the_last_digits_by_algebra_alone(shareable):
    """Alternating least squares from heads apart is stuck far off, as the paper's code would be."""
    query, key = shareable(16)
    algebraic = factorize(query, key, 16, start="algebraic", num_iterations=0)
    apart = factorize(query, key, 16, start="heads", num_iterations=10)
    assert algebraic.relative_error < 1e-9
    assert apart.relative_error > 0.02
    best = factorize(query, key, 16)
    assert best.relative_error < 1e-9
    assert best.starts == ("algebraic",)


def test_components_beyond_what_heads_share_are_zeros(shareable):
    query, key = shareable(9)
    found = factorize(query, key, 14)
    assert found.relative_error < 1e-9
    energy = (
        found.query_weight.norm(dim=1) * found.mixing.norm(dim=0) * found.key_weight.norm(dim=1)
    )
    assert (energy[9:] < 1e-7 * energy[0]).all()


def test_noise_beside_what_heads_share(shareable):
    query, key = shareable(16, noise=0.01)
    found = factorize(query, key, 16, num_iterations=200)
    apart = factorize(query, key, 16, start="heads", num_iterations=0)
    assert found.relative_error < 0.05 < 0.15 < apart.relative_error


@pytest.mark.parametrize("init", ["svd", "random"])
def test_no_worse_than_another_package_after_as_many_sweeps(shareable, init):
    query, key = shareable(16, noise=0.05)
    tensorly.set_backend("numpy")
    tensor = dense(query, key).numpy()
    with warnings.catch_warnings():
        # It fills up with noise where there are fewer heads than components, and says so.
        warnings.simplefilter("ignore")
        theirs = parafac(tensor, 16, n_iter_max=50, init=init, tol=0, random_state=0)
    theirs = tensorly.cp_to_tensor(theirs)
    error = ((theirs - tensor) ** 2).sum() ** 0.5 / (tensor**2).sum() ** 0.5
    found = factorize(query, key, 16, num_iterations=50, tolerance=0)
    assert found.relative_error <= error


def test_a_batch_is_its_layers(heads):
    query, key = heads(2, 3)
    settings = {"num_iterations": 15, "tolerance": 0, "start": "heads"}
    batch = factorize(query, key, 6, **settings)
    assert batch.query_weight.shape == (2, 3, 6, QUERY)
    assert batch.relative_error.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            one = factorize(query[i, j], key[i, j], 6, **settings)
            torch.testing.assert_close(batch.relative_error[i, j], one.relative_error)
            torch.testing.assert_close(batch.mixing[i, j], one.mixing, rtol=1e-6, atol=1e-6)
    assert factorize(query[0], key[0], 6, **settings).layer(1).mixing.shape == (HEADS, 6)


def test_each_layer_has_its_best_start(heads, shareable):
    one, other = shareable(9), shareable(9, noise=0.5)
    query, key = (torch.stack(sides) for sides in zip(one, other, strict=True))
    found = factorize(query, key, 9)
    assert found.starts[0] == "algebraic"
    for place, sides in enumerate((one, other)):
        for start in START_NAMES:
            alone = factorize(*sides, 9, start=start, num_iterations=10)
            assert found.relative_error[place] <= alone.relative_error + 1e-9


def test_seeds_decide_and_global_random_state_does_not(heads):
    query, key = heads()
    one = factorize(query, key, 5, start="random", num_iterations=3, seed=4)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        other = factorize(query, key, 5, start="random", num_iterations=3, seed=4)
    third = factorize(query, key, 5, start="random", num_iterations=3, seed=5)
    assert torch.equal(one.mixing, other.mixing)
    assert not torch.equal(one.mixing, third.mixing)


def test_the_gauge_is_fixed(heads):
    """Energies fall; mixing is as large as in a fresh layer; both sides are balanced; signs."""
    query, key = heads()
    found = factorize(query, key, 6, num_iterations=5)
    sides = [found.query_weight.norm(dim=1), found.key_weight.norm(dim=1)]
    torch.testing.assert_close(*sides)
    torch.testing.assert_close(found.mixing.norm(dim=0), torch.full((6,), (HEADS * DIM / 6) ** 0.5))
    assert (sides[0].diff() <= 1e-12).all()
    for rows in (found.query_weight, found.mixing.mT):
        assert (rows.gather(1, rows.abs().argmax(1, keepdim=True)) > 0).all()


def test_nested_widths(heads):
    query, key = heads()
    found = factorize(query, key, 8)
    narrow = found.truncated(3)
    torch.testing.assert_close(narrow.mixing, found.mixing[:, :3])
    with pytest.raises(ValueError, match="width: expected 1 to 8 components, got 9"):
        found.truncated(9)


def test_nested_errors_are_those_of_truncations(heads):
    query, key = heads(2)
    found = factorize(query, key, 8, num_iterations=5)
    exact = dense(query, key)
    for width in range(1, 9):
        error = norm(rebuilt(found.truncated(width)) - exact) / norm(exact)
        torch.testing.assert_close(found.nested_errors[:, width - 1], error)


def test_head_weights_are_heads_side_by_side_that_compute_the_same(heads):
    found = factorize(*heads(2), 4, num_iterations=5)
    query, key = found.head_weights()
    assert query.shape == (2, HEADS, 4, QUERY)
    torch.testing.assert_close(dense(query, key), rebuilt(found))


def test_more_restarts_are_no_worse(heads):
    query, key = heads(3)
    settings = {"start": "random", "num_iterations": 10, "tolerance": 0}
    one = factorize(query, key, 6, **settings)
    many = factorize(query, key, 6, num_restarts=6, **settings)
    assert (many.relative_error <= one.relative_error).all()
    assert (many.relative_error < one.relative_error).any()


def test_a_layers_start_by_chance_is_the_same_alone_and_in_a_batch(heads):
    query, key = heads(2)
    for start in ("random", "algebraic"):
        settings = {"start": start, "num_iterations": 2, "tolerance": 0}
        batch = factorize(query, key, 6, **settings)
        alone = factorize(query[1], key[1], 6, **settings)
        torch.testing.assert_close(rebuilt(batch.layer(1)), rebuilt(alone), rtol=1e-6, atol=1e-8)


def test_errors_do_not_hang_on_the_scale_of_weights(heads):
    """Of layers far apart in one batch, where products of squares would leave float32."""
    query, key = heads()
    scales = torch.tensor([1e-12, 1.0, 1e12])[:, None, None, None]
    sides = (scales * query).float(), (scales * key).float()
    found = factorize(*sides, 6, num_iterations=5, tolerance=0)
    torch.testing.assert_close(
        found.relative_error, found.relative_error[1].expand(3), rtol=1e-4, atol=0
    )
    assert rebuilt(found).isfinite().all()


def test_moments_of_one_layer_or_each(heads, generator):
    query, key = heads(2)
    tokens = torch.randn(2, 40, QUERY, generator=generator)
    moments = tokens.mT @ tokens
    settings = {"num_iterations": 4, "tolerance": 0}
    each = factorize(query, key, 5, query_moment=moments, **settings)
    for place in range(2):
        alone = factorize(query[place], key[place], 5, query_moment=moments[place], **settings)
        torch.testing.assert_close(each.relative_error[place], alone.relative_error)
    all_alike = factorize(query, key, 5, query_moment=moments[0], **settings)
    torch.testing.assert_close(all_alike.relative_error[0], each.relative_error[0])
    with pytest.raises(ValueError, match=r"query_moment: expected 11 x 11, of one layer or \(2,\)"):
        factorize(query, key, 5, query_moment=moments[:, None], **settings)
    with pytest.raises(ValueError, match="query_moment: expected no negative eigenvalue, got -1"):
        factorize(query, key, 5, query_moment=-torch.eye(QUERY), **settings)


def test_moments_weigh_errors_as_they_move_logits(heads, generator):
    query, key = heads()
    asking = torch.randn(500, QUERY, generator=generator) * torch.linspace(2, 0, QUERY).exp()
    asked = torch.randn(400, KEY, generator=generator) * torch.linspace(0, 2, KEY).exp()
    moments = {
        "query_moment": asking.mT @ asking / 500,
        "key_moment": asked.mT @ asked / 400,
    }

    def logits(product):
        return torch.einsum("xq,hqk,yk->hxy", asking, product, asked)

    exact = logits(dense(query, key))
    plain = factorize(query, key, 5)
    weighed = factorize(query, key, 5, **moments)
    errors = [norm(logits(rebuilt(f)) - exact) / norm(exact) for f in (plain, weighed)]
    torch.testing.assert_close(weighed.relative_error, errors[1], rtol=1e-4, atol=1e-6)
    assert errors[1] < 0.8 * errors[0]
    assert weighed.lower_bound <= weighed.relative_error


def test_singular_moments_do_no_harm(heads, generator):
    query, key = heads()
    asking = torch.randn(4, QUERY, generator=generator)
    found = factorize(query, key, 5, query_moment=asking.mT @ asking)
    exact = torch.einsum("xq,hqk->hxk", asking, dense(query, key))
    error = norm(torch.einsum("xq,hqk->hxk", asking, rebuilt(found)) - exact) / norm(exact)
    assert found.query_weight.isfinite().all()
    torch.testing.assert_close(found.relative_error, error, rtol=1e-2, atol=1e-3)
    full = factorize(query, key, HEADS * DIM, query_moment=asking.mT @ asking)
    torch.testing.assert_close(rebuilt(full), dense(query, key), rtol=1e-6, atol=1e-6)


def test_float32_keeps_its_type_and_tells_errors_truly(shareable):
    query, key = (side.float() for side in shareable(16))
    found = factorize(query, key, 16)
    assert found.mixing.dtype == torch.float32
    assert found.relative_error.dtype == torch.float64
    exact = dense(query.double(), key.double())
    error = norm(rebuilt([part.double() for part in found[:3]]) - exact) / norm(exact)
    assert found.relative_error < 1e-5
    assert error < 1e-5
    half = factorize(query.bfloat16(), key.bfloat16(), 16)
    assert half.mixing.dtype == torch.bfloat16


def test_errors_are_of_what_is_returned_in_a_narrow_type(heads):
    query, key = (side.bfloat16() for side in heads())
    found = factorize(query, key, HEADS * DIM)
    exact = dense(query.double(), key.double())
    error = norm(rebuilt([part.double() for part in found[:3]]) - exact) / norm(exact)
    torch.testing.assert_close(found.relative_error, error, rtol=1e-3, atol=1e-6)
    assert error > 1e-4


def test_moments_of_zeros_weigh_all_alike(heads):
    query, key = heads()
    zeros = {"query_moment": torch.zeros(QUERY, QUERY), "key_moment": torch.zeros(KEY, KEY)}
    found, plain = factorize(query, key, 5, **zeros), factorize(query, key, 5)
    torch.testing.assert_close(rebuilt(found), rebuilt(plain))


def test_an_error_budget_of_weighed_errors(heads, generator):
    """Mutants: bounds, or errors of heads apart, that are not weighed."""
    query, key = heads()
    tokens = torch.randn(500, QUERY, generator=generator) * torch.linspace(3, 0, QUERY).exp()
    settings = {"query_moment": tokens.mT @ tokens / 500, "num_iterations": 20}
    found = width_for_error(query, key, 0.2, **settings)
    width = len(found.query_weight)
    assert found.relative_error <= 0.2
    assert factorize(query, key, width - 1, **settings).relative_error > 0.2
    assert width < len(width_for_error(query, key, 0.2, num_iterations=20).query_weight)


def test_an_error_budget_is_met_where_chance_finds_less_than_heads_apart(heads):
    query, key = heads()
    found = width_for_error(query, key, 0.05, start="random", num_iterations=0)
    assert found.relative_error <= 0.05
    assert found.starts == ("heads",)


def test_an_error_budget_gets_the_smallest_width_that_was_found(shareable):
    query, key = shareable(9)
    found = width_for_error(query, key, 1e-6)
    assert found.query_weight.shape[0] == 9
    budget = width_for_error(query, key, 0.4)
    assert budget.relative_error <= 0.4
    assert budget.query_weight.shape[0] < 9
    narrower = factorize(query, key, budget.query_weight.shape[0] - 1)
    assert narrower.relative_error > 0.4
    with pytest.raises(ValueError, match=r"error must be a number, not negative, got -0\.1"):
        width_for_error(query, key, -0.1)
    with pytest.raises(ValueError, match="of one layer"):
        width_for_error(query[None], key[None], 0.1)


def test_heads_apart_are_the_best_of_each_head(heads):
    query, key = heads()
    factors = head_factors(query, key)
    values = torch.linalg.svdvals(dense(query, key))[:, :DIM]
    torch.testing.assert_close(factors.values, values)
    left, right, error, by_head = truncated_heads(factors, 3)
    exact = dense(query, key)
    torch.testing.assert_close(norm(dense(left, right) - exact) / norm(exact), error)
    torch.testing.assert_close(by_head, values[:, 3:].norm(dim=1) / values.norm(dim=1))
    wide = truncated_heads(factors, 7)
    assert wide[0].shape == (HEADS, 7, QUERY)
    torch.testing.assert_close(dense(*wide[:2]), exact)
    start = start_factors("heads", HeadProducts(query[None], key[None]), 4, torch.Generator())
    kept = values.flatten().sort(descending=True).values[4:].norm() / values.norm()
    torch.testing.assert_close(norm(rebuilt([p[0] for p in start]) - exact) / norm(exact), kept)


def test_weights_of_zeros_and_single_entries(heads):
    query, key = heads()
    found = factorize(0 * query, key, 4)
    assert found.relative_error == 0
    assert not found.mixing.isnan().any()
    some = query.clone()
    some[1] = 0
    assert factorize(some, key, HEADS * DIM).head_errors[1] == 0
    one = factorize(torch.ones(1, 1, 1), torch.ones(1, 1, 1), 1)
    torch.testing.assert_close(rebuilt(one), torch.ones(1, 1, 1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 0}, "width must be a whole number, at least 1, got 0"),
        (
            {"start": "svd"},
            "start must be one of 'heads', 'algebraic', 'random', 'best', got 'svd'",
        ),
        ({"num_restarts": 0}, "num_restarts must be a whole number, at least 1, got 0"),
        ({"num_iterations": -1}, "num_iterations must be a whole number, at least 0, got -1"),
        ({"width": 12, "start": "algebraic"}, "needs a width of at most the number of features 11"),
        ({"tolerance": float("nan")}, "tolerance must be a number, not negative, got nan"),
        ({"width": 2.5}, "width must be a whole number"),
        (
            {"query_weight": torch.ones(3, 5, 11, dtype=torch.int64)},
            "query_weight: expected real floating-point numbers, got torch.int64",
        ),
        ({"query_moment": torch.eye(3)}, "query_moment: expected 11 x 11, got shape"),
        ({"key_moment": torch.full((13, 13), torch.nan)}, "key_moment: expected finite values"),
        ({"key_moment": torch.ones(13, 13).triu()}, "key_moment: expected a symmetric matrix"),
        (
            {"query_weight": torch.ones(5, 11)},
            "query_weight, key_weight: expected 'head dim feature'",
        ),
        ({"key_weight": torch.ones(2, 5, 13)}, "of the same heads and widths"),
        (
            {"query_weight": torch.full((3, 5, 11), torch.inf)},
            "query_weight: expected finite values",
        ),
        (
            {"query_weight": torch.ones(3, 0, 11), "key_weight": torch.ones(3, 0, 13)},
            "no empty axis",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_refuses(heads, settings, message):
    query, key = heads()
    arguments = {"query_weight": query, "key_weight": key, "width": 4} | settings
    with pytest.raises(ValueError, match=message):
        factorize(**arguments)


def test_errors_are_told_to_the_last_digit_where_rows_of_a_head_cancel(generator):
    """Two rows of queries and keys whose products are nearly opposite."""
    query = torch.randn(1, 2, 7, generator=generator)
    key = torch.ones(1, 2, 1)
    query[:, 1] = 1e-9 * torch.randn(1, 7, generator=generator) - query[:, 0]
    found = factorize(query, key, 1)
    assert found.relative_error < 1e-14 / 1e-9
    whole = HeadProducts(query[None], key[None]).squared_norms
    torch.testing.assert_close(whole.sum().sqrt(), norm(dense(query, key)), rtol=1e-5, atol=0)
    torch.testing.assert_close(
        norm(rebuilt(found) - dense(query, key)) / norm(dense(query, key)),
        found.relative_error,
        rtol=0,
        atol=1e-5,
    )
