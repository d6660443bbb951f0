"""Tests of bayesattn.inference.optimizers: schedules, further tensors, and forgetting."""

import functools

import pytest
import torch

from bayesattn.inference.optimizers import ScheduledOptimizer, check_optimizer
from bayesattn.inference.schedules import constant, cosine_after_half

SGD = functools.partial(torch.optim.SGD, lr=0.5)


def parameter(value, gradient):
    tensor = torch.tensor([value], requires_grad=True)
    tensor.grad = torch.tensor([gradient])
    return tensor


def test_rate_is_its_own_times_the_factor():
    """Mutant: the factor applied to the rate of the last step."""
    tensor = parameter(1.0, 1.0)
    optimizer = ScheduledOptimizer(SGD, lambda progress: 1 - progress, [tensor])
    for progress in (0.0, 0.5, 0.9):
        optimizer.step(progress)
    torch.testing.assert_close(tensor.detach(), torch.tensor([1 - 0.5 * (1 + 0.5 + 0.1)]))


def test_groups_keep_rates_of_their_own():
    first, second = parameter(0.0, 1.0), parameter(0.0, 1.0)

    def make(tensors):
        return torch.optim.SGD(
            [{"params": tensors[:1], "lr": 2.0}, {"params": tensors[1:]}], lr=1.0
        )

    ScheduledOptimizer(make, lambda _: 0.5, [first, second]).step(0.0)
    assert (first.item(), second.item()) == (-1.0, -0.5)


def test_further_tensors_move_too():
    first, second = parameter(0.0, 1.0), parameter(0.0, 1.0)
    optimizer = ScheduledOptimizer(SGD, constant, [first])
    optimizer.extend([])
    optimizer.extend([second])
    optimizer.step(0.0)
    assert (first.item(), second.item()) == (-0.5, -0.5)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.Adagrad, torch.optim.RMSprop])
def test_a_forgotten_tensor_steps_as_at_first(kind):
    """And one that is not forgotten steps as if nothing had been."""
    make = functools.partial(kind, lr=0.1)
    kept, forgotten, fresh = (parameter(0.0, 1.0) for _ in range(3))
    optimizer = ScheduledOptimizer(make, constant, [kept, forgotten])
    reference = parameter(0.0, 1.0)
    plain = make([reference])
    for _ in range(3):
        optimizer.step(0.0)
        plain.step()
    optimizer.forget(forgotten)
    before = forgotten.item()
    for tensor in (kept, forgotten, reference, fresh):
        tensor.grad = torch.tensor([-0.3])
    optimizer.step(0.0)
    plain.step()
    make([fresh]).step()
    assert kept.item() == reference.item()
    assert forgotten.item() - before == pytest.approx(fresh.item(), abs=1e-12)


def test_cosine_ends_at_zero():
    factors = [cosine_after_half(progress) for progress in (0.0, 0.49, 0.5, 0.75, 1.0)]
    assert factors == pytest.approx([1.0, 1.0, 1.0, 0.5, 0.0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (torch.optim.LBFGS, "LBFGS evaluates the objective by itself"),
        (0.1, "must be a function from a list of tensors to a torch optimizer"),
        (torch.optim.SGD([torch.zeros(1)]), "must be a function from a list of tensors"),
        (lambda tensors: None, "returned None"),
        (lambda: torch.optim.SGD, "failed: .* takes 0 positional arguments"),
    ],
    ids=["closure", "number", "instance", "nothing", "no argument"],
)
def test_what_makes_no_optimizer_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        check_optimizer(make)


@pytest.mark.parametrize("eps", [1e-8, 1e-3])
def test_the_rule_is_adams_own_step(eps, generator):
    """Mutant: epsilon over the corrected root, which eps=1e-8 does not tell apart."""
    make = functools.partial(torch.optim.Adam, lr=0.1, betas=(0.8, 0.95), eps=eps)
    start = torch.randn(5, 3, generator=generator)
    ours, theirs = (start.clone().requires_grad_() for _ in range(2))
    optimizer, plain = ScheduledOptimizer(make, constant, [ours]), make([theirs])
    for _ in range(20):
        gradient = 1e-3 * torch.randn(5, 3, generator=generator)
        moments = optimizer.moments()
        coefficients = torch.tensor(optimizer.coefficients(optimizer.rule, 0.0))
        optimizer.accept(optimizer.rule(ours.detach(), gradient, *moments, coefficients))
        theirs.grad = gradient
        plain.step()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("changes", [{"amsgrad": True}, {"weight_decay": 0.1}, {"maximize": True}])
def test_other_kinds_of_adam_have_no_rule(changes):
    make = functools.partial(torch.optim.Adam, **changes)
    assert ScheduledOptimizer(make, constant, [parameter(0.0, 1.0)]).rule is None
