"""Contestants in JAX, where it is installed (``pip install 'bayesattn[bench]'``): all jitted.

Steps run in a jitted loop, as NumPyro's own ``run`` does, so that nothing of Python is counted.
"""

import math
from collections.abc import Callable
from typing import Any

import blackjax
import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax
from jax import lax
from numpyro.contrib.einstein import SVGD, RBFKernel

from tests.benchmarks.problems import HEADS, NOISE, WIDTH, Problem
from tests.benchmarks.torch_contestants import BETAS, EPS, RATE

__all__ = ["blackjax_svgd", "by_hand", "numpyro_svgd"]

Advance = Callable[[int], None]
Array = Any


def numpyro_svgd(problem: Problem, num_particles: int) -> Advance:
    """NumPyro's SVGD, RBF kernel."""
    data = _data(problem)
    kernel = RBFKernel()
    svgd = SVGD(
        PROGRAMS[problem.name],
        numpyro.optim.Adam(RATE),
        kernel,
        num_stein_particles=num_particles,
    )
    state = svgd.init(jax.random.PRNGKey(0), *data)
    return _looped(lambda state: svgd.update(state, *data)[0], state)


def blackjax_svgd(problem: Problem, num_particles: int) -> Advance:
    """BlackJAX's SVGD, RBF kernel with its median heuristic."""
    data, value = _data(problem), VALUES[problem.name]
    score = jax.grad(lambda particle: value(particle, *data))
    algorithm = blackjax.svgd(score, optax.adam(RATE))
    state = algorithm.init(_starts(problem, num_particles))
    return _looped(algorithm.step, state)


def by_hand(problem: Problem, num_particles: int) -> Advance:
    """The arithmetic of ours: IMQ kernel, median rule, Gram form, Adam."""
    data, value = _data(problem), VALUES[problem.name]
    score = jax.vmap(jax.grad(lambda particle: value(particle, *data)))
    pairs = jnp.triu_indices(num_particles, 1)

    def step(state: tuple[Array, ...]) -> tuple[Array, ...]:
        particles, mean, square, count = state
        count, (first, second) = count + 1, BETAS
        gradient = -stein_direction(particles, score(particles), pairs)
        mean = mean + (1 - first) * (gradient - mean)
        square = second * square + (1 - second) * gradient**2
        denominator = jnp.sqrt(square) / jnp.sqrt(1 - second**count) + EPS
        particles = particles - RATE / (1 - first**count) * mean / denominator
        return particles, mean, square, count

    start = _starts(problem, num_particles)
    zero = jnp.zeros_like(start)
    return _looped(step, (start, zero, zero, jnp.zeros(())))


def stein_direction(particles: Array, score: Array, pairs: tuple[Array, Array]) -> Array:
    """As in :func:`tests.benchmarks.torch_contestants.stein_direction`."""
    centered = particles - particles.mean(0)
    products = centered @ centered.T
    norms = jnp.diagonal(products)
    distances = jnp.maximum(norms[:, None] + norms - 2 * products, 0)
    entries = jnp.sort(distances[pairs])
    squared = entries[(len(entries) - 1) // 2]
    base = 1 + distances / squared
    gram = lax.rsqrt(base)
    slope = gram / (base * squared)
    drive = gram @ score + slope.sum(1, keepdims=True) * centered - slope @ centered
    return drive / len(particles)


def logistic_program(features: Array, labels: Array) -> None:
    """(a) in NumPyro."""
    weight = numpyro.sample("weight", dist.Normal(jnp.zeros(features.shape[1]), 1.0).to_event(1))
    numpyro.sample("label", dist.Bernoulli(logits=features @ weight).to_event(1), obs=labels)


def logistic_value(particle: Array, features: Array, labels: Array) -> Array:
    """(a) by hand."""
    logits = features @ particle
    return labels @ logits - jax.nn.softplus(logits).sum() - 0.5 * (particle**2).sum()


def attention_program(tokens: Array, target: Array) -> None:
    """(b) in NumPyro."""
    size = 4 * WIDTH**2 + WIDTH
    weights = numpyro.sample("weights", dist.Normal(jnp.zeros(size), 1.0).to_event(1))
    likelihood = dist.Normal(_attended(weights, tokens), NOISE)
    numpyro.sample("target", likelihood.to_event(1), obs=target)


def attention_value(particle: Array, tokens: Array, target: Array) -> Array:
    """(b) by hand."""
    error = (_attended(particle, tokens) - target) / NOISE
    return -0.5 * (error**2).sum() - 0.5 * (particle**2).sum()


PROGRAMS = {"a": logistic_program, "b": attention_program}
VALUES = {"a": logistic_value, "b": attention_value}


def _attended(weights: Array, tokens: Array) -> Array:
    matrices = weights[: 4 * WIDTH**2].reshape(4, WIDTH, HEADS, -1) / math.sqrt(WIDTH)
    query, key, value = (jnp.einsum("std,dhc->shtc", tokens, matrix) for matrix in matrices[:3])
    logits = jnp.einsum("shqc,shkc->shqk", query, key) / math.sqrt(WIDTH // HEADS)
    attended = jnp.einsum("shqk,shkc->sqhc", jax.nn.softmax(logits, -1), value)
    output = matrices[3].reshape(WIDTH, WIDTH)
    features = (attended.reshape(*tokens.shape[:2], WIDTH) @ output).mean(1)
    return features @ weights[4 * WIDTH**2 :]


def _data(problem: Problem) -> tuple[Array, ...]:
    return tuple(jnp.asarray(tensor.numpy()) for tensor in problem.data)


def _starts(problem: Problem, num_particles: int) -> Array:
    return jnp.asarray(problem.starts(num_particles).numpy())


def _looped(step: Callable[[Any], Any], state: Any) -> Advance:
    @jax.jit
    def steps(state: Any, count: Any) -> Any:
        return lax.fori_loop(0, count, lambda _, state: step(state), state)

    def advance(num_steps: int) -> None:
        nonlocal state
        state = jax.block_until_ready(steps(state, num_steps))

    advance(1)
    return advance
