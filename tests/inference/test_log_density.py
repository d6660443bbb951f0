"""What LogDensity promises at each call, whatever has happened since it was made."""

import dataclasses
import functools
import gc

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer.reparam import LocScaleReparam
from torch import nn
from torch.distributions import constraints

from bayesattn.inference import DensitySettings, GraphCache, LogDensity, RecordingError
from bayesattn.inference.bijections import bijection
from bayesattn.inference.running import seeded

Y = torch.tensor([0.3, -1.2, 2.0, 0.7, 0.1, -0.4], dtype=torch.float64)
ROW = torch.tensor([[0.6]], dtype=torch.float64)


def noisy(y, scale=1.0):
    location = pyro.sample("location", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(location, scale), obs=y)


def expected(y=Y, scale=1.0, location=0.6):
    prior = dist.Normal(0.0, 1.0).log_prob(torch.tensor(location))
    return (prior + dist.Normal(location, scale).log_prob(y).sum())[None]


def value(density, row=ROW, **subsample):
    return density.value_and_score(row, subsample or None)[0]


def close(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


# What is baked in, and changes.


@dataclasses.dataclass
class Options:
    scale: float


def test_an_options_object_is_read_anew():
    options, density = Options(1.0), None

    def model(y, options):
        noisy(y, options.scale)

    density = LogDensity(model, Y, options)
    close(value(density), expected())
    options.scale = 2.0
    close(value(density), expected(scale=2.0))
    options.scale = 1.0
    close(value(density), expected())
    assert density.settings.graphs.num_recordings == 2


def test_variables_of_the_program_are_read_anew():
    scale, shift, helper = 1.0, torch.tensor(0.0), lambda y: y

    def model(y):
        noisy(helper(y) + shift, scale)

    density = LogDensity(model, Y)
    close(value(density), expected())
    shift.fill_(0.5)
    close(value(density), expected(Y + 0.5))
    assert density.settings.graphs.num_recordings == 1
    shift = torch.tensor(2.0)
    close(value(density), expected(Y + 2.0))
    scale = 3.0
    close(value(density), expected(Y + 2.0, 3.0))
    net = nn.Linear(1, 1, device="meta").to_empty(device="cpu")
    nn.init.ones_(net.weight), nn.init.ones_(net.bias)

    def other_helper(y):
        return net(y[:, None])[:, 0]

    helper = other_helper
    close(value(density), expected(Y + 3.0, 3.0))
    count = density.settings.graphs.num_recordings
    net.load_state_dict({"weight": torch.zeros(1, 1), "bias": torch.ones(1)}, assign=True)
    close(value(density), expected(torch.full((6,), 3.0), 3.0))
    assert density.settings.graphs.num_recordings == count


def test_numpy_arrays_are_taken_as_they_were():
    array = Y.numpy().copy()
    density = LogDensity(lambda y: noisy(torch.as_tensor(y)), array)
    close(value(density), expected())
    array += 1.0
    close(value(density), expected())
    close(value(density, ROW.repeat(2, 1)), expected().repeat(2))
    close(value(LogDensity(lambda y: noisy(torch.as_tensor(y)), array)), expected(Y + 1.0))


def test_data_are_read_at_each_call():
    y, more = Y.clone(), {"shift": [torch.zeros(1)]}

    def model(y, more, *, scales):
        noisy(y + more["shift"][0], scales[0])

    density = LogDensity(model, y, more, scales=(torch.tensor(1.0),))
    close(value(density), expected())
    y += 1.0
    more["shift"][0].fill_(2.0)
    close(value(density), expected(Y + 3.0))
    assert density.settings.graphs.num_recordings == 1


def test_partial_arguments_are_data_too():
    y = Y.clone()
    density = LogDensity(functools.partial(functools.partial(noisy, y), scale=2.0))
    close(value(density), expected(scale=2.0))
    y += 1.0
    close(value(density), expected(Y + 1.0, 2.0))
    again = LogDensity(functools.partial(noisy, scale=2.0), y, settings=density.settings)
    close(value(again), expected(Y + 1.0, 2.0))
    assert density.settings.graphs.num_recordings == 1


class Net(nn.Module):
    """A module that keeps what it saw, as many do."""

    def __init__(self):
        super().__init__()
        self.linear, self.power, self.calls = nn.Linear(1, 1), 1.0, 0

    def forward(self, y):
        self.calls += 1
        self.seen = self.linear(y[:, None])[:, 0] * self.power
        return self.seen

    def program(self, y):
        noisy(self(y))


def test_modules_may_keep_what_they_saw_and_change_what_they_are():
    with seeded(0):
        net, other = Net(), Net()
    density = LogDensity(net.program, Y)

    def check(recordings):
        close(value(density), expected(net(Y).detach()))
        assert density.settings.graphs.num_recordings == recordings

    check(1)
    density.constrain(ROW)
    check(2)
    density.constrain(ROW)
    check(2)
    net.power = 3.0
    check(3)
    net.linear = other.linear
    check(4)
    net.linear.weight.data = torch.ones(1, 1)
    check(4)


def test_bound_methods_and_cache_are_shared_by_what_they_are():
    with seeded(0):
        net, other = Net(), Net()
    settings = DensitySettings()
    for owner, recordings in ((net, 1), (net, 1), (other, 2)):
        close(value(LogDensity(owner.program, Y, settings=settings)), expected(owner(Y).detach()))
        assert settings.graphs.num_recordings == recordings


def test_programs_of_one_name_do_not_share_graphs():
    settings = DensitySettings()

    def make(scale):
        def model(y):
            noisy(y, scale)

        return model

    for scale in (1.0, 2.0):
        close(value(LogDensity(make(scale), Y, settings=settings)), expected(scale=scale))
    first = settings.graphs.num_recordings
    gc.collect()
    for scale in (3.0, 4.0, 5.0):
        close(value(LogDensity(make(scale), Y, settings=settings)), expected(scale=scale))
    assert settings.graphs.num_recordings == first + 3


def test_autocast_and_default_dtype_are_part_of_the_key():
    def model(y):
        noisy((y[None] @ torch.full((6, 6), 0.3))[0])

    density = LogDensity(model, Y.float())
    plain = value(density)
    assert density.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert (value(density) - plain).abs() > 1e-4
    close(value(density), plain)
    constants = LogDensity(lambda: noisy(torch.ones(2)))
    assert value(constants).dtype == torch.float64
    torch.set_default_dtype(torch.float32)
    value(constants)
    torch.set_default_dtype(torch.float64)
    assert constants.settings.graphs.num_recordings == 2


def test_inference_mode_and_gradients_around_a_call_do_not_matter():
    y = Y.clone().requires_grad_()
    density = LogDensity(noisy, y)
    results = density.value_and_score(ROW.clone().requires_grad_())
    assert not any(result.requires_grad for result in results)
    with torch.inference_mode():
        made = Y + 0.0
        close(value(LogDensity(noisy, made), ROW + 0.0), expected())
        close(value(density, ROW + 0.0), expected())
    close(value(LogDensity(noisy, made)), expected())


# What comes back.


def test_results_share_no_memory_with_what_was_given():
    density = LogDensity(noisy, Y)
    row = ROW.clone()
    location = density.constrain(row)["location"]
    score = density.value_and_score(row)[1]
    row += 1.0
    score += 1.0
    assert location == 0.6
    close(value(density), expected())
    torch.testing.assert_close(density.value_and_score(ROW)[1], Y.sum()[None, None] - 7 * 0.6)


def test_particles_of_any_layout_and_dtype_share_one_recording():
    density = LogDensity(noisy, Y)
    rows = torch.randn(3, 1, generator=torch.Generator().manual_seed(0))
    wide = torch.cat([rows, rows], 1).T.contiguous().T[:, :1]
    wanted = value(density, rows)
    close(value(density, wide), wanted)
    torch.testing.assert_close(value(density, rows.float()), wanted, rtol=1e-6, atol=1e-6)
    assert density.settings.graphs.num_recordings == 1


def test_calls_leave_nothing_behind():
    density = LogDensity(noisy, Y)
    for _ in range(3):
        value(density)
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(30):
        value(density)
    gc.collect()
    assert len(gc.get_objects()) - before < 20


def test_scores_and_hessians_are_derivatives(generator):
    def model(y):
        share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
        scale = pyro.sample("scale", dist.HalfCauchy(1.0))
        with pyro.plate("row", len(y)):
            kind = pyro.sample("kind", dist.Categorical(share))
            pyro.sample("y", dist.Normal(kind * 1.0, scale), obs=y)

    density = LogDensity(model, Y)
    rows = torch.randn(2, 3, generator=generator)
    _, scores, hessians = density.value_score_and_hessian(rows)
    torch.testing.assert_close(scores, density.value_and_score(rows)[1])
    torch.testing.assert_close(hessians, hessians.mT)
    step = 1e-5
    for axis, shift in enumerate(step * torch.eye(3)):
        (upper, above), (lower, below) = (
            density.value_and_score(rows + sign * shift) for sign in (1, -1)
        )
        torch.testing.assert_close(
            (upper - lower) / (2 * step), scores[:, axis], rtol=1e-6, atol=1e-7
        )
        torch.testing.assert_close(
            (above - below) / (2 * step), hessians[:, axis], rtol=1e-6, atol=1e-7
        )


SUPPORTS = {
    "greater than": constraints.greater_than(-2.0),
    "greater or equal": constraints.greater_than_eq(1.0),
    "less than": constraints.less_than(3.0),
    "half-open interval": constraints.half_open_interval(-1.0, 4.0),
    "real vectors": constraints.independent(constraints.real, 2),
    "ordered": pyro.distributions.constraints.ordered_vector,
    "positive ordered": pyro.distributions.constraints.positive_ordered_vector,
    "positive definite": constraints.positive_definite,
    "correlation matrix": pyro.distributions.constraints.corr_matrix,
    "lower Cholesky": constraints.lower_cholesky,
    "correlation Cholesky": constraints.corr_cholesky,
    "mixed": constraints.cat([constraints.real, constraints.positive], dim=-1, lengths=[1, 2]),
    "stacked": constraints.stack(
        [constraints.real, constraints.positive, constraints.real], dim=-1
    ),
}
SHAPES = {"real vectors": (2, 3)} | dict.fromkeys(
    ["lower Cholesky", "correlation Cholesky", "positive definite", "correlation matrix"], (3, 3)
)


@pytest.mark.parametrize("name", SUPPORTS)
def test_every_bijection_goes_there_and_back_with_its_determinant(name, generator):
    support = SUPPORTS[name]
    event = SHAPES.get(name, (3,))

    def model():
        with pyro.plate("draw", 2):
            pyro.sample("x", dist.ImproperUniform(support, (), event))

    density = LogDensity(model)
    rows = torch.randn(3, density.dim, generator=generator)
    values = density.constrain(rows)
    assert values["x"].shape == (3, 2, *event)
    assert support.check(values["x"]).all()
    torch.testing.assert_close(density.unconstrain(values), rows, rtol=1e-6, atol=1e-8)
    transform = bijection(support)
    images = (
        rows.reshape(3, 2, -1)
        if len(event) == 1
        else rows.reshape(3, 2, *density.sites[0].unconstrained_shape[1:])
    )
    determinant = transform.log_abs_det_jacobian(images, transform(images)).flatten(1).sum(1)
    close(density.log_determinant(rows), determinant)
    close(value(density, rows), determinant)


def test_the_determinant_is_neither_scaled_nor_masked():
    def model():
        with poutine.scale(scale=3.0), poutine.mask(mask=torch.tensor(False)):
            pyro.sample("x", dist.Exponential(1.0))
        with poutine.scale(scale=3.0):
            pyro.sample("z", dist.Exponential(1.0))

    rows = torch.tensor([[0.3, -0.5]])
    close(value(LogDensity(model), rows), rows.sum(1) - 3 * rows[:, 1].exp())


def test_handlers_around_a_program_belong_to_it():
    def model(y):
        with pyro.plate("group", 2):
            group = pyro.sample("group_mean", dist.Normal(1.0, 2.0))
        pyro.sample("y", dist.Normal(group.sum(), 1.0), obs=y)

    rows = torch.tensor([[0.3, -0.5]])
    conditioned = poutine.condition(lambda: model(None), data={"y": Y[0]})
    wanted = dist.Normal(1.0, 2.0).log_prob(rows).sum(1) + dist.Normal(-0.2, 1.0).log_prob(Y[:1])
    close(value(LogDensity(conditioned), rows), wanted)
    close(value(LogDensity(poutine.scale(model, scale=2.0), Y[0]), rows), 2 * wanted)
    moved = poutine.reparam(model, config={"group_mean": LocScaleReparam(0.0)})
    density = LogDensity(moved, Y[0])
    assert [site.name for site in density.sites] == ["group_mean_decentered"]
    likelihood = dist.Normal((1.0 + 2.0 * rows).sum(1), 1.0).log_prob(Y[:1])
    close(value(density, rows), dist.Normal(0.0, 1.0).log_prob(rows).sum(1) + likelihood)


def test_partly_observed_sites(generator):
    seen = torch.tensor([True, False, True, True, False, True])

    def model(y):
        location = pyro.sample("location", dist.Normal(0.0, 1.0))
        with pyro.plate("row", 6):
            pyro.sample("y", dist.Normal(location, 1.0), obs=y, obs_mask=seen)

    density = LogDensity(model, Y)
    rows = torch.randn(2, density.dim, generator=generator)
    for row, got in zip(rows, value(density, rows), strict=True):
        rest = dist.Normal(row[0], 1.0).log_prob(row[1:])[~seen].sum()
        close(got, (expected(Y[seen], location=float(row[0])) + rest)[0])


# How it is evaluated.


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize(
    ("compile_", "decides"), [("record", False), ("none", False), ("none", True)]
)
def test_random_operations_are_shared_fresh_and_reproducible(compile_, chunk_size, decides):
    def model(y):
        location = pyro.sample("location", dist.Normal(0.0, 1.0))
        noise = torch.randn(6)
        if decides and location > 0:
            noise = noise * 1.0
        with pyro.plate("row", 6):
            pyro.sample("y", dist.Normal(location, 1.0), obs=y + noise)

    settings = DensitySettings(compile=compile_, chunk_size=chunk_size, stochastic=True)
    density, again = (LogDensity(model, Y, settings=settings) for _ in range(2))
    rows = ROW.repeat(5, 1)
    first, second = value(density, rows), value(density, rows)
    assert first.unique().numel() == second.unique().numel() == 1
    assert first[0] != second[0]
    close(value(again, rows), first)
    close(value(again, rows), second)


def test_unrecorded_programs_may_decide_and_write():
    def model(y):
        location = pyro.sample("location", dist.Normal(0.0, 1.0))
        mean = torch.zeros(6)
        for place in range(6):
            mean[place] = location if float(location) > 0.5 else 2 * location
        with pyro.plate("row", 6):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    density = LogDensity(model, Y, settings=DensitySettings(compile="none"))
    rows = torch.tensor([[0.6], [0.2]])
    values, scores, hessians = density.value_score_and_hessian(rows)
    close(values[:1], expected())
    close(
        values[1:],
        expected(location=0.4)
        - expected(torch.zeros(0), location=0.4)
        + expected(torch.zeros(0), location=0.2),
    )
    close(scores[:, 0], torch.stack([Y.sum() - 7 * 0.6, 2 * Y.sum() - 25 * 0.2]))
    close(hessians[:, 0, 0], torch.tensor([-7.0, -25.0]))
    close(density.unconstrain(density.constrain(rows)), rows)
    with pytest.raises(RecordingError, match="site 'location'"):
        LogDensity(model, Y).value_and_score(rows)


def test_recurrent_networks_run_unrecorded(generator):
    with seeded(0):
        net = nn.GRU(1, 2)

    def model(y):
        scale = pyro.sample("scale", dist.Normal(0.0, 1.0))
        pyro.factor("f", net(y[:, None, None] * scale)[0].sum())

    density = LogDensity(model, Y, settings=DensitySettings(compile="none"))
    wanted = net(Y[:, None, None] * 0.6)[0].sum() + dist.Normal(0.0, 1.0).log_prob(ROW[0, 0])
    close(value(density)[0], wanted.detach())
    with pytest.raises(RecordingError, match="a module in it, writes"):
        value(LogDensity(model, Y))


def test_graphs_with_attention_do_not_grow_with_the_particles(generator):
    with seeded(0):
        layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    x = torch.randn(2, 3, 4, generator=generator)

    def model(x):
        scale = pyro.sample("scale", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        pyro.factor("f", layer(x * scale).sum())

    density = LogDensity(model, x)
    for count in (2, 30):
        density.value_and_score(torch.zeros(count, 4))
    sizes = [len(g.module.graph.nodes) for g in density.settings.graphs.graphs.values()]
    assert sizes[0] == sizes[1] < 250


def test_random_indices_are_uniform_and_without_replacement(generator):
    def model(y):
        location = pyro.sample("location", dist.Normal(0.0, 1.0))
        with pyro.plate("row", 6, subsample_size=2) as index:
            pyro.sample("y", dist.Normal(location, 1.0), obs=y[index])

    density = LogDensity(model, Y)
    drawn = torch.stack([density.draw_subsample(generator)["row"] for _ in range(600)])
    assert (drawn[:, 0] != drawn[:, 1]).all()
    # 200 expected each; five standard deviations of a hypergeometric count.
    assert (drawn.flatten().bincount(minlength=6) - 200).abs().max() < 58
    with pytest.raises(ValueError, match=r"unknown plates \['column'\]; subsampled are: \['row'\]"):
        density.value_and_score(ROW, {"row": drawn[0], "column": drawn[0]})


# What is refused.


def pair():
    pyro.sample("scale", dist.Gamma(2.0, 1.0))
    pyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))


BAD_VALUES = {
    "outside": (lambda: {"scale": -torch.ones(1), "x": torch.zeros(1, 2)}, "supports.*'scale'"),
    "no particles": (
        lambda: {"scale": torch.ones(0), "x": torch.zeros(0, 2)},
        "at least one particle",
    ),
    "no axis": (
        lambda: {"scale": torch.tensor(1.0), "x": torch.zeros(1, 2)},
        r"'scale'\] must have",
    ),
    "shape": (
        lambda: {"scale": torch.ones(1), "x": torch.zeros(1, 3)},
        r"'x'\].*2\), got \(1, 3\)",
    ),
    "counts": (lambda: {"scale": torch.ones(2), "x": torch.zeros(1, 2)}, "'scale': 2, 'x': 1"),
    "missing": (lambda: {"scale": torch.ones(1)}, r"\['scale', 'x'\], got \['scale'\]"),
    "unknown": (lambda: dict.fromkeys("xyz", torch.ones(1)), r"got \['x', 'y', 'z'\]"),
}


@pytest.mark.parametrize("name", BAD_VALUES)
def test_values_that_do_not_fit_are_refused(name):
    values, reason = BAD_VALUES[name]
    with pytest.raises(ValueError, match=reason):
        LogDensity(pair).unconstrain(values())


def test_values_that_are_nan_stay_so():
    values = {"scale": torch.tensor([torch.nan, 1.0]), "x": torch.zeros(2, 2)}
    assert LogDensity(pair).unconstrain(values)[:, 0].isnan().tolist() == [True, False]


@pytest.mark.parametrize("settings", [{"compile": "always"}, {"chunk_size": 0}])
def test_bad_settings_are_refused(settings):
    # The shape checks of the test run refuse wrong types before we do.
    with pytest.raises((ValueError, TypeError), match=str(*settings.values())):
        DensitySettings(**settings)


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="does not take the arguments"):
        LogDensity(noisy, Y, 1.0, 2.0)
    with pytest.raises(ValueError, match=r"argument 'y' is empty: its shape is \(0,\)"):
        LogDensity(noisy, [Y[:0]])


def test_its_text_says_what_it_is():
    text = repr(LogDensity(pair))
    assert "dim=3" in text
    assert "scale()" in text
    assert "x(2,)" in text


def test_bad_entries_are_told_by_site():
    density = LogDensity(pair)
    assert density.site_names(torch.tensor([False, False, True])) == ["x"]
    assert density.site_names(torch.tensor([True, True, False])) == ["scale", "x"]


def test_a_full_cache_stays_right():
    settings = DensitySettings(graphs=GraphCache(max_graphs=1))
    for scale in (1.0, 2.0, 1.0):
        close(value(LogDensity(noisy, Y, scale, settings=settings)), expected(scale=scale))
    assert settings.graphs.num_recordings == 3
