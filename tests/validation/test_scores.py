"""The rulers themselves: exact draws pass their own row, and known errors are measured right."""

import pytest
import torch

from tests.validation.references import load, unconstrained
from tests.validation.scores import by_moments, by_quantiles, effective_sample_size, iid_gate

SCORES = [by_moments, by_quantiles]


@pytest.mark.parametrize("score", SCORES)
def test_reference_scored_against_itself_is_exact(score):
    reference = unconstrained(load("gp_regr"))
    scores = score(reference, reference)
    torch.testing.assert_close(scores.shift, torch.zeros(3))
    torch.testing.assert_close(scores.ratio, torch.ones(3))


@pytest.mark.parametrize("score", SCORES)
def test_known_shift_and_stretch_are_measured(score, generator):
    reference = torch.randn(100_001, 2, generator=generator)
    center = reference.quantile(0.5, dim=0) if score is by_quantiles else reference.mean(dim=0)
    stretch = torch.tensor([0.7, 1.3])
    moved = center + (reference - center) * stretch + torch.tensor([0.5, -2.0])
    scores = score(moved, reference)
    torch.testing.assert_close(scores.shift, torch.tensor([0.5, -2.0]), rtol=0.01, atol=0)
    torch.testing.assert_close(scores.ratio, stretch)


def test_one_far_draw_moves_the_mean_and_not_the_median(generator):
    reference = torch.randn(1000, 1, generator=generator)
    spoiled = torch.cat([reference, torch.tensor([[1e4]])])
    assert by_moments(spoiled, reference).worst_shift > 5
    assert by_quantiles(spoiled, reference).worst_shift < 0.01


@pytest.mark.parametrize("name", ["eight_schools", "gp_regr"])
def test_exact_draws_pass_their_gate_and_few_draws_fail_it(name, generator):
    """Of 200 sets 190 pass, less four standard errors 177; a quarter of the draws must not do."""
    reference = unconstrained(load(name))
    gate = iid_gate(reference, 200)

    def passed(num_draws):
        picks = torch.randint(len(reference), (200, num_draws), generator=generator)
        return sum(gate.passes(by_moments(reference[pick], reference)) for pick in picks)

    assert passed(200) > 177
    assert passed(50) < 150


@pytest.mark.parametrize(("num_draws", "shift"), [(10, 0.85), (100, 0.25), (1000, 0.12)])
def test_gate_of_an_ordinary_posterior_shrinks_with_the_root_of_the_draws(num_draws, shift):
    gate = iid_gate(unconstrained(load("kilpisjarvi")), num_draws)
    assert gate.shift == pytest.approx(shift, rel=0.2)
    assert gate.lowest_ratio < 1 < gate.highest_ratio


def test_effective_sample_size_of_a_slow_chain(generator):
    """An autoregression with correlation .9 has (1 - .9) / (1 + .9) effective draws per draw."""
    noise = torch.randn(20_000, 2, generator=generator)
    chain = noise.clone()
    for step in range(1, len(noise)):
        chain[step] = 0.9 * chain[step - 1] + noise[step]
    sizes = effective_sample_size(torch.stack([chain, noise])[:, :, :1])
    assert sizes.shape == (1,)
    slow = effective_sample_size(chain[None])
    torch.testing.assert_close(slow, torch.full((2,), 20_000 * 0.1 / 1.9), rtol=0.2, atol=0)
