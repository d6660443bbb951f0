"""Every choice of logits with a kernel, as it starts and as it may be after training."""

import torch

from bayesattn.logits import (
    GaussianLogits,
    ImplicitSpectralLogits,
    Magnitude,
    Matern,
    PositiveFeatures,
    RationalQuadratic,
    RBFMagnitude,
    SchoenbergMixture,
    SpectralLogits,
    SpectralMixture,
)

HEADS, DIM = 3, 5

# Those that start exactly at the softmax.
EXACT = {
    "gaussian": lambda: GaussianLogits(HEADS, DIM),
    "rbf_magnitude": lambda: RBFMagnitude(num_heads=HEADS),
    "rational_quadratic": lambda: RationalQuadratic(HEADS, DIM),
    "matern_1/2": lambda: Matern(HEADS, DIM, smoothness="1/2"),
    "matern_3/2": lambda: Matern(HEADS, DIM, smoothness="3/2"),
    "matern_5/2": lambda: Matern(HEADS, DIM, magnitude=Magnitude(num_heads=HEADS)),
    "schoenberg": lambda: SchoenbergMixture(HEADS, DIM, 3),
    "spectral_mixture": lambda: SpectralMixture(HEADS, DIM, 2),
    "spectral": lambda: SpectralLogits(HEADS, DIM, 7),
    "spectral_pairs": lambda: SpectralLogits(HEADS, DIM, 7, is_stationary=False),
    "implicit": lambda: ImplicitSpectralLogits(HEADS, DIM, 7, hidden_dim=4),
    "implicit_pairs": lambda: ImplicitSpectralLogits(
        HEADS, DIM, 7, hidden_dim=4, is_stationary=False, pool="first"
    ),
    "implicit_shared": lambda: ImplicitSpectralLogits(
        HEADS, DIM, 7, hidden_dim=4, pool="none", couples_heads=False
    ),
}
# Those that are near it for many features.
NEAR = {
    "spectral_plain": lambda: SpectralLogits(HEADS, DIM, 7, square="plain"),
    "spectral_unbiased": lambda: SpectralLogits(HEADS, DIM, 7, square="unbiased"),
    "positive_features": lambda: PositiveFeatures(HEADS, DIM, 13),
}
ALL = EXACT | NEAR


def made(name, *, moved=0.0):
    """One of them, with parameters moved from the start as training might."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        logits = ALL[name]()
        with torch.no_grad():
            for parameter in logits.parameters():
                parameter += moved * torch.rand_like(parameter)
    return logits


def fitted_excess(logits, points, target, num_steps):
    """Train logits of points with themselves towards weights; the cross-entropy less its least."""
    least = torch.special.entr(target).sum(-1).mean()
    optimizer = torch.optim.Adam(logits.parameters(), 0.1)

    def excess():
        return -(target * logits(points, points).log_softmax(-1)).sum(-1).mean() - least

    for _ in range(num_steps):
        optimizer.zero_grad()
        excess().backward()
        optimizer.step()
    return excess().item()
