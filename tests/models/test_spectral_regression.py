"""Regression by attention: its density by loops, contexts, masks, series, and all routines."""

import math

import numpy as np
import pytest
import torch

from bayesattn.inference import NUTS, SVGD, SVI, DensitySettings, LogDensity
from bayesattn.models import (
    AttentionRegression,
    FrequencyMixture,
    FrequencyPairs,
    MagnitudePrior,
    RandomFrequencies,
)
from tests import reference
from tests.models import cases
from tests.models.cases import run

POINTS, CONTEXT, DIM, HEADS, FREQUENCIES, COMPONENTS, SERIES = 7, 5, 2, 3, 11, 4, 2
LAGS = (0.0, 0.1, 0.3, 0.7)
FLOOR = 1e-3
close = torch.testing.assert_close

KERNELS = {
    "one set": RandomFrequencies(FREQUENCIES, scale=0.7, scale_spread=0.6, correlation_shape=1.5),
    "pairs": FrequencyPairs(FREQUENCIES, scale=0.7, scale_spread=0.6, correlation_shape=1.5),
    "mixture": FrequencyMixture(COMPONENTS, 1.7, mean_scale=1.3, scale=0.4, scale_spread=0.6),
}
every_kernel = pytest.mark.parametrize("name", KERNELS)


def make_model(name, **settings):
    """Regression with each of the kernels and all that it can have."""
    defaults = {
        "num_heads": HEADS,
        "lags": LAGS,
        "direction": (1.0, 2.0),
        "magnitudes": MagnitudePrior(temperature_spread=0.8, power_spread=0.4),
        "readout_concentration": 1.6,
        "noise_prior_scale": 0.7,
        "floor": FLOOR,
    }
    return AttentionRegression(KERNELS[name], **defaults | settings)


def make_data(generator, *lead, points=POINTS):
    """Inputs and targets."""
    inputs = torch.randn(*lead, points, DIM, generator=generator)
    return inputs, torch.randn(*lead, points, generator=generator)


def draw_values(model, data, generator):
    """Values of all latent sites, drawn from the prior."""
    values = cases.draw_values(model, data, generator)
    return {site: value for site, value in values.items() if site not in ("point", "series")}


# ---------------------------------------------------------------- by hand


def kernel_by_hand(name, values, head, x, y):
    """One number, from the sums over frequencies or components."""
    if name == "mixture":
        total, left = 0.0, 1.0
        for index in range(COMPONENTS):
            stick = 1.0 if index == COMPONENTS - 1 else values["stick"][head][index]
            mean = values["component_mean"][head][index]
            scale = values["component_scale"][head][index]
            spread = sum((s * (a - b)) ** 2 for s, a, b in zip(scale, x, y, strict=True))
            turn = sum(m * (a - b) for m, a, b in zip(mean, x, y, strict=True))
            decay = math.exp(-2 * math.pi**2 * spread)
            total += stick * left * decay * math.cos(2 * math.pi * turn)
            left *= 1 - stick
        return total
    # A member of a pair meets both members.
    normal = np.array(values["normal_frequency"]).reshape(HEADS, -1, FREQUENCIES, DIM)
    factor = np.array(values["head_factor"])
    members = values["frequency_scale"][head] * sum(
        factor[head][other] * normal[other] for other in range(HEADS)
    )
    total, count = 0.0, len(members)
    for index in range(FREQUENCIES):
        for one in members[:, index]:
            for two in members[:, index]:
                turn = sum(a * b for a, b in zip(one, x, strict=True))
                turn -= sum(a * b for a, b in zip(two, y, strict=True))
                total += math.cos(2 * math.pi * turn)
    return total / (count**2 * FREQUENCIES)


def magnitude_by_hand(values, head, key):
    p = 1 + values["power_excess"][head]
    norm = DIM ** (1 - 2 / p) * sum(abs(x) ** p for x in key) ** (2 / p)
    return norm / (2 * values["temperature"][head] * math.sqrt(DIM))


def expected_by_hand(name, values, query, keys, targets, visible):
    """What heads say together at one point, and the weights of each."""
    total, weights = 0.0, np.zeros((HEADS, len(keys)))
    for head in range(HEADS):
        for j, key in enumerate(keys):
            if visible[j]:
                square = kernel_by_hand(name, values, head, query, key) ** 2
                logit = math.log(square + FLOOR) + magnitude_by_hand(values, head, key)
                weights[head, j] = math.exp(logit)
        if weights[head].sum() > 0:
            weights[head] /= weights[head].sum()
        total += values["readout"][head] * float(weights[head] @ np.array(targets))
    return total, weights


def log_normal(value, median, spread):
    return reference.normal_log_density([math.log(value / median)], spread) - math.log(value)


def log_beta(value, a, b):
    constant = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    return constant + (a - 1) * math.log(value) + (b - 1) * math.log(1 - value)


def log_prior_by_hand(name, values):
    """Of all sites, written out."""
    total = sum(
        log_normal(temperature, 1.0, 0.8) + log_normal(excess, 1.0, 0.4)
        for temperature, excess in zip(values["temperature"], values["power_excess"], strict=True)
    )
    total += math.lgamma(HEADS * 1.6) - HEADS * math.lgamma(1.6)
    total += 0.6 * sum(math.log(share) for share in values["readout"])
    total += math.log(2) + reference.normal_log_density([values["noise_scale"]], 0.7)
    if name == "mixture":
        sticks, means, scales = (
            np.ravel(values[site]) for site in ("stick", "component_mean", "component_scale")
        )
        total += sum(log_beta(stick, 1.0, 1.7) for stick in sticks)
        total += reference.normal_log_density(means, 1.3)
        return total + sum(log_normal(scale, 0.4, 0.6) for scale in scales)
    total += sum(log_normal(scale, 0.7, 0.6) for scale in values["frequency_scale"])
    total += reference.normal_log_density(np.ravel(values["normal_frequency"]), 1.0)
    # The LKJ law of three heads at 1.5: integrals of 1 - z² over a line, of the root of it over
    # a disk.
    _, second, third = (values["head_factor"][head][head] for head in range(HEADS))
    return total + math.log(second**2 * third) - math.log(4 / 3 * 2 * math.pi / 3)


def log_joint_by_hand(name, values, inputs, target, mask):
    """Log prior and pseudo-likelihood of one data set."""
    total = 0.0
    for i in range(len(inputs)):
        if mask[i]:
            visible = [j != i and bool(mask[j]) for j in range(len(inputs))]
            expected, _ = expected_by_hand(name, values, inputs[i], inputs, target, visible)
            total += reference.normal_log_density([target[i] - expected], values["noise_scale"])
    return total


def plain(values):
    return {site: value.tolist() for site, value in values.items()}


# ---------------------------------------------------------------- the program


def unrecorded(model, *args, **kwargs):
    settings = DensitySettings(compile="none")
    return LogDensity(model, *args, settings=settings, **kwargs)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("one set", "none"),
        ("pairs", "none"),
        ("mixture", "record"),
        pytest.param("one set", "record", marks=pytest.mark.slow),
        pytest.param("pairs", "record", marks=pytest.mark.slow),
    ],
)
def test_log_density_is_the_formula(name, mode, generator):
    """Mutants: a point that sees itself, any prior left out or another."""
    model, (inputs, target) = make_model(name), make_data(generator)
    settings = DensitySettings(compile=mode)
    density = LogDensity(model, inputs, target, settings=settings)
    particles = 0.5 * torch.randn(2, density.dim, generator=generator)
    recorded, score = density.value_and_score(particles)
    constrained, determinants = density.constrain(particles), density.log_determinant(particles)
    assert score.isfinite().all()
    for row in range(2):
        values = {site: value[row] for site, value in constrained.items()}
        by_hand = log_prior_by_hand(name, plain(values))
        data = inputs.tolist(), target.tolist(), [True] * POINTS
        by_hand += log_joint_by_hand(name, plain(values), *data)
        assert run(model, (inputs, target), values)[1].item() == pytest.approx(by_hand, rel=1e-11)
        by_hand += determinants[row].item()
        assert recorded[row].item() == pytest.approx(by_hand, rel=1e-11)


@every_kernel
def test_series_share_one_kernel_and_padding_never_matters(name, generator):
    """Mutants: keys or targets at padding that take part, kernels of each series."""
    model, (inputs, target) = make_model(name), make_data(generator, SERIES)
    mask = torch.ones(SERIES, POINTS, dtype=torch.bool)
    mask[1, 4:] = False
    values = draw_values(model, (inputs, target), generator)
    sites, log_joint = run(model, (inputs, target, None, None, mask), values)
    by_hand = log_prior_by_hand(name, plain(values)) + sum(
        log_joint_by_hand(name, plain(values), *rows)
        for rows in zip(inputs.tolist(), target.tolist(), mask.tolist(), strict=True)
    )
    assert log_joint.item() == pytest.approx(by_hand, rel=1e-11)
    junk = 100 * torch.randn(SERIES, POINTS, DIM, generator=generator)
    other = torch.where(mask[..., None], inputs, junk), torch.where(mask, target, 100.0)
    after, same = run(model, (*other, None, None, mask), values)
    close(same, log_joint)
    close(after["expected_target"][mask], sites["expected_target"][mask])
    assert (sites["attention"][1, ..., 4:] == 0).all()


@every_kernel
def test_new_points_attend_to_the_context(name, generator):
    """Mutants: targets that are not the context's, a context that sees itself, no mask."""
    model, (inputs, target) = make_model(name), make_data(generator, points=CONTEXT)
    new = torch.randn(POINTS, DIM, generator=generator)
    values = draw_values(model, (inputs, target), generator)
    mask = torch.tensor([True, True, False, True, True])
    with torch.random.fork_rng():
        sites, _ = run(model, (new, None, inputs, target, None, mask), values)
    for i, point in enumerate(new.tolist()):
        expected, weights = expected_by_hand(
            name, plain(values), point, inputs.tolist(), target.tolist(), mask.tolist()
        )
        assert sites["expected_target"][i].item() == pytest.approx(expected, rel=1e-10)
        close(sites["attention"][i], torch.tensor(weights))
    assert sites["target"].shape == (POINTS,)


@every_kernel
def test_kernel_is_noted_from_the_origin_along_the_direction(name, generator):
    """Mutants: lags that are no distances, one direction for all, heads mixed up."""
    model, data = make_model(name), make_data(generator)
    values = draw_values(model, data, generator)
    sites, _ = run(model, data, values)
    found = sites["kernel"]
    assert found.shape == (HEADS, len(LAGS))
    close(sites["squared_kernel"], found**2)
    for head in range(HEADS):
        for index, lag in enumerate(LAGS):
            place = [lag / 5**0.5, 2 * lag / 5**0.5]
            expected = kernel_by_hand(name, plain(values), head, [0.0, 0.0], place)
            assert found[head, index].item() == pytest.approx(expected, rel=1e-10, abs=1e-12)
    assert model.coords == {"lag": list(LAGS)}
    by_default = run(make_model(name, direction=None), data, values)[0]["kernel"]
    along_first = kernel_by_hand(name, plain(values), 0, [0.0, 0.0], [LAGS[2], 0.0])
    assert by_default[0, 2].item() == pytest.approx(along_first, rel=1e-10)


@every_kernel
def test_one_point_and_one_head(name, generator):
    """A point by itself sees nothing, and is expected at zero."""
    model = make_model(name, num_heads=1)
    inputs, target = make_data(generator, points=1)
    density = unrecorded(model, inputs, target)
    value, score = density.value_and_score(torch.zeros(2, density.dim))
    assert value.isfinite().all()
    assert score.isfinite().all()
    values = draw_values(model, (inputs, target), generator)
    assert not {"readout", "head_factor"} & values.keys()
    sites, _ = run(model, (inputs, target), values)
    assert sites["expected_target"].item() == 0


def test_without_magnitudes_keys_weigh_alike(generator):
    model, data = make_model("one set", magnitudes=None), make_data(generator)
    values = draw_values(model, data, generator)
    assert not {"temperature", "power_excess"} & values.keys()
    # Everything is as near as anything else at frequencies of zero.
    values["normal_frequency"] = torch.zeros_like(values["normal_frequency"])
    weights = run(model, data, values)[0]["attention"]
    away = 1 - torch.eye(POINTS)[:, None]
    close(weights, (away / (POINTS - 1)).expand_as(weights))


@every_kernel
def test_dtype_is_that_of_the_inputs(name, generator):
    data = [part.float() for part in make_data(generator)]
    values = draw_values(make_model(name), data, generator)
    sites, _ = run(make_model(name), data, values)
    sites.pop("point")
    assert {value.dtype for value in [*values.values(), *sites.values()]} == {torch.float32}


# ---------------------------------------------------------------- posteriors

ROUTINES = {
    "svgd": lambda model: SVGD(model, num_particles=3, compile="none"),
    "heads": lambda model: SVGD(model, particle_plate="head", compile="none"),
    "svi": lambda model: SVI(model, guide="normal", compile="none"),
    "nuts": lambda model: NUTS(model, max_tree_depth=1, compile="none"),
}


def short_run(routine, model, *data, **masks):
    length = {"seed": 0, "progress": False}
    length |= {"warmup_steps": 2} if routine == "nuts" else {"num_steps": 2}
    length |= {"num_samples": 3} if routine in ("nuts", "svi") else {}
    return ROUTINES[routine](model).run(*data, **masks, **length)


@pytest.mark.parametrize(
    ("name", "routine"),
    [
        pytest.param(name, routine, marks=[] if name == "mixture" else pytest.mark.slow)
        for name in KERNELS
        for routine in ROUTINES
    ],
)
@pytest.mark.filterwarnings("ignore::bayesattn.inference.ConvergenceWarning")
def test_routines_run_and_predict(name, routine, generator):
    model, data = make_model(name), make_data(generator)
    posterior = short_run(routine, model, *data)
    new = torch.randn(2, DIM, generator=generator)
    context = {"context_inputs": data[0], "context_target": data[1]}
    seen = posterior.predict(new, **context, seed=0)
    assert seen["expected_target"].shape[2:] == (2,)
    assert seen["attention"].shape[2:] == (2, HEADS, POINTS)
    # Of the latent sites alone, so that it is the same at any arguments.
    close(seen["kernel"], posterior.predict(sites=["kernel"])["kernel"])


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("one set", marks=pytest.mark.slow),
        "pairs",
        pytest.param("mixture", marks=pytest.mark.slow),
    ],
)
def test_arviz_gets_a_name_for_every_axis(name, generator):
    inputs, target = make_data(generator, SERIES)
    posterior = short_run("svgd", make_model(name), inputs, target)
    tree = posterior.to_arviz(dims={"inputs": ["series", "point", "feature"]}, prior_draws=2)
    axes = {site: found.dims[2:] for site, found in tree["posterior"].data_vars.items()}
    assert axes["kernel"] == axes["squared_kernel"] == ("head", "lag")
    assert axes["attention"] == ("series", "point", "head", "context")
    assert axes["expected_target"] == ("series", "point")
    names = {axis for dims in axes.values() for axis in dims}
    assert not [axis for axis in names if "_axis_" in axis]
    assert not names & axes.keys()
    if name == "mixture":
        assert axes["shares"] == axes["component_mean"][:-1] == ("head", "component")
    else:
        assert axes["head_correlation"] == ("head", "other_head")
    assert tree["posterior"]["lag"].values.tolist() == list(LAGS)
    assert tree["prior"]["kernel"].dims == ("chain", "draw", "head", "lag")


# ---------------------------------------------------------------- errors


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": None}, "points without a target have nothing to attend to"),
        ({"target": torch.zeros(3)}, r"target must have .* shape \(7,\), got .* \(3,\)"),
        (
            {"target": torch.zeros(7).long()},
            r"target must have one number a point, of type torch\.float64 .* got torch\.int64",
        ),
        ({"target": torch.zeros(7, dtype=torch.float32)}, r"as the inputs .* got torch\.float32"),
        ({"inputs": np.zeros((7, 2))}, r"inputs must be of type Tensor, got array"),
        ({"mask": [True] * 7}, r"mask must be of type Tensor, got \[True"),
        ({"inputs": torch.zeros(7)}, r"inputs must be floating point vectors .* \(7,\)"),
        ({"mask": torch.ones(7)}, "mask must be boolean"),
        ({"context_inputs": torch.zeros(3, DIM)}, "go together, and one of them is None"),
        (
            {
                "context_inputs": torch.zeros(3, 5, dtype=torch.float64),
                "context_target": torch.zeros(3, dtype=torch.float64),
            },
            "as many series and as wide as inputs",
        ),
        (
            {
                "context_inputs": torch.zeros(3, DIM, dtype=torch.bfloat16),
                "context_target": torch.zeros(3, dtype=torch.bfloat16),
            },
            r"context_inputs must be of the type of inputs, .* got torch\.bfloat16",
        ),
        ({"context_mask": torch.ones(7).bool()}, "context_mask goes with context_inputs"),
    ],
)
def test_data_that_do_not_fit_are_refused(arguments, message, generator):
    inputs, target = make_data(generator)
    with pytest.raises((TypeError, ValueError), match=message):
        make_model("one set")(**{"inputs": inputs, "target": target} | arguments)


@pytest.mark.usefixtures("unchecked_types")
def test_settings_that_do_not_fit_are_refused(generator):
    with pytest.raises(TypeError, match="kernels must be of type KernelPrior"):
        AttentionRegression(3)
    with pytest.raises(ValueError, match="num_heads must be positive, got 0"):
        make_model("one set", num_heads=0)
    model = make_model("one set", direction=(1.0,))
    with (
        torch.random.fork_rng(),
        pytest.raises(ValueError, match=r"direction must be as wide as inputs, 2, got \(1\.0,\)"),
    ):
        model(*make_data(generator))
