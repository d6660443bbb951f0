"""T steps of EM attention, against loops, and as a part of networks: gradients, masks, vmap."""

import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import vmap

import bayesattn as ba
from bayesattn.iterated_attention import em_attention, log_normal, log_shares
from bayesattn.normalizations import DoublyNormalized

close = functools.partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
BATCH, HEADS, QUERIES, KEYS, DIM, VALUE_DIM = 2, 3, 5, 7, 11, 13


def problem(generator, lead=(BATCH, HEADS), scale=1.0):
    shapes = ((QUERIES, DIM), (KEYS, DIM), (KEYS, VALUE_DIM))
    return tuple(scale * torch.randn((*lead, *shape), generator=generator) for shape in shapes)


def masks_of(generator):
    """The last query sees no key, and the first key no query."""
    pairs = torch.rand(HEADS, QUERIES, KEYS, generator=generator) < 0.7
    pairs[:, -1], pairs[:, :, 0], pairs[:, 0, 1:] = False, False, True
    query_mask = torch.tensor([[True] * QUERIES, [True, True, False, True, True]])
    key_mask = torch.tensor([[True] * 5 + [False] * 2, [True] * KEYS])
    return {"attn_mask": pairs, "query_mask": query_mask, "key_mask": key_mask}


def by_hand(query, key, value, num_steps, variance, log_mixing, seen):
    """EM on one mixture, one responsibility at a time; values are averaged in the last step."""
    center = query.copy()
    for number in range(num_steps):
        shares = np.zeros(seen.shape)
        for j in range(len(key)):
            joint = {
                i: math.exp(log_mixing[i] - sum((key[j] - center[i]) ** 2) / (2 * variance))
                for i in range(len(query))
                if seen[i, j]
            }
            for i, term in joint.items():
                shares[i, j] = term / sum(joint.values())
        averaged = value if number == num_steps - 1 else key
        moved = np.zeros((len(query), averaged.shape[1]))
        for i in range(len(query)):
            for j in range(len(key)):
                if seen[i, j]:
                    moved[i] += shares[i, j] / shares[i].sum() * averaged[j]
        center = moved
    return center


@pytest.mark.parametrize("num_steps", [1, 2, 4])
@pytest.mark.parametrize("shares", ["by norms", "given"])
@pytest.mark.parametrize("masked", [False, True])
def test_steps_are_those_of_a_loop(num_steps, shares, masked, generator):
    """Mutants: shares of the moved centers; values in all steps; a mask in the first step only."""
    query, key, value = problem(generator)
    masks = masks_of(generator) if masked else {}
    variance = torch.rand(HEADS, 1, 1, generator=generator) + 2
    log_mixing = torch.randn(BATCH, HEADS, QUERIES, generator=generator)
    chosen = {} if shares == "by norms" else {"log_mixing": log_mixing}
    ours = em_attention(
        query, key, value, num_steps=num_steps, variance=variance, **chosen, **masks
    )
    assert ours.shape == (BATCH, HEADS, QUERIES, VALUE_DIM)
    for b in range(BATCH):
        for h in range(HEADS):
            seen = np.ones((QUERIES, KEYS), bool)
            if masked:
                seen = masks["attn_mask"][h].numpy().copy()
                seen &= masks["query_mask"][b].numpy()[:, None] & masks["key_mask"][b].numpy()
            norms = query[b, h].square().sum(-1) / (2 * variance[h, 0, 0])
            logits = norms if shares == "by norms" else log_mixing[b, h]
            parts = (part[b, h].numpy() for part in (query, key, value))
            expected = by_hand(*parts, num_steps, float(variance[h]), logits.numpy(), seen)
            close(ours[b, h], torch.tensor(expected), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_one_step_is_doubly_normalized_attention(masked, scale, generator):
    """Also of large logits; the square root of the width is the default variance."""
    query, key, value = problem(generator, scale=scale)
    masks = masks_of(generator) if masked else {}
    expected = ba.attention(query, key, value, normalization=DoublyNormalized(), **masks)
    ours = em_attention(query, key, value, **masks)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
    assert (ours[:, :, -1] == 0).all() == masked


def test_keys_are_averaged_by_default(generator):
    query, key, _ = problem(generator)
    assert torch.equal(
        em_attention(query, key, num_steps=2), em_attention(query, key, key, num_steps=2)
    )


@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients(num_steps, masked, generator):
    """Of everything that may be learned; queries without keys are no trouble to them."""
    query, key, value = (part[:, :, :, :3].requires_grad_() for part in problem(generator))
    variance = torch.tensor(1.7, requires_grad=True)
    log_mixing = torch.randn(BATCH, HEADS, QUERIES, generator=generator).requires_grad_()
    masks = masks_of(generator) if masked else {}

    def by_norms(query, key, value, variance):
        return em_attention(query, key, value, num_steps=num_steps, variance=variance, **masks)

    def given(query, key, log_mixing):
        return em_attention(query, key, num_steps=num_steps, log_mixing=log_mixing, **masks)

    assert torch.autograd.gradcheck(by_norms, (query, key, value, variance), fast_mode=True)
    assert torch.autograd.gradcheck(given, (query, key, log_mixing), fast_mode=True)


def test_vmap_is_a_loop_over_particles(generator):
    query, key, value = problem(generator)
    masks = masks_of(generator)
    particles = query + torch.randn(17, *query.shape, generator=generator)
    function = functools.partial(em_attention, num_steps=3, **masks)
    ours = vmap(function, (0, None, None))(particles, key, value)
    close(ours, torch.stack([function(particle, key, value) for particle in particles]))


@given(seed=st.integers(0, 2**16), num_queries=st.integers(1, 4), num_keys=st.integers(1, 4))
def test_each_step_raises_the_likelihood_of_the_keys(seed, num_queries, num_keys):
    generator = torch.Generator().manual_seed(seed)
    query = 2 * torch.randn(num_queries, 2, generator=generator)
    key = 2 * torch.randn(num_keys, 2, generator=generator)
    log_mixing = torch.randn(num_queries, generator=generator).log_softmax(0)
    values = []
    for num_steps in range(4):
        center = query
        if num_steps:
            center = em_attention(
                query, key, num_steps=num_steps, variance=0.8, log_mixing=log_mixing
            )
        joint = log_mixing[:, None] + log_normal(center, key, 0.8)
        values.append(joint.logsumexp(0).sum())
    rises = torch.stack(values).diff()
    assert (rises >= -1e-10).all()


def test_what_stands_in_padding_does_not_matter(generator):
    query, key, value = problem(generator)
    query_mask = torch.tensor([[True] * QUERIES, [True, True, False, True, False]])
    key_mask = torch.tensor([[True] * 5 + [False] * 2, [True] * KEYS])
    other = [
        torch.where(mask[:, None, :, None], part, 1e3)
        for part, mask in ((query, query_mask), (key, key_mask), (value, key_mask))
    ]
    masks = {"query_mask": query_mask, "key_mask": key_mask}
    ours = em_attention(query, key, value, num_steps=3, **masks)
    close(em_attention(*other, num_steps=3, **masks), ours)
    short = (part[:1, :, :5] for part in (key, value))
    close(em_attention(query[:1], *short, num_steps=3), ours[:1])


def test_single_precision_stays(generator):
    parts = [part.float() for part in problem(generator)]
    ours = em_attention(*parts, num_steps=3)
    assert ours.dtype == torch.float32
    exact = em_attention(*(part.double() for part in parts), num_steps=3)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4)


def test_log_normal_is_the_density(generator):
    query, key, _ = problem(generator)
    variance = torch.rand(HEADS, 1, 1, generator=generator) + 0.5
    law = torch.distributions.Normal(query[..., :, None, :], variance.sqrt()[..., None])
    close(log_normal(query, key, variance), law.log_prob(key[..., None, :, :]).sum(-1))


@pytest.mark.parametrize("axis", [-2, -1])
def test_shares_sum_to_one_over_what_is_visible(axis, generator):
    """Over all where nothing is, so that no share is NaN."""
    logits = torch.randn(HEADS, QUERIES, KEYS, generator=generator)
    seen = masks_of(generator)["attn_mask"]
    shares = log_shares(logits, seen, axis).exp()
    close(shares.sum(axis), torch.ones_like(shares.sum(axis)))
    some = seen.any(axis, keepdim=True)
    assert (shares[some & ~seen] == 0).all()
    close(log_shares(logits, None, axis), logits.log_softmax(axis))


def test_errors(generator):
    query, key, value = problem(generator)
    with pytest.raises(ValueError, match="num_steps must be at least one, got 0"):
        em_attention(query, key, value, num_steps=0)
    with pytest.raises(ValueError, match="key_mask: expected"):
        em_attention(query, key, value, key_mask=torch.ones(BATCH, KEYS))
