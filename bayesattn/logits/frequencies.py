r"""Frequencies of random features: independent, orthogonal or quasi-random normal vectors.

.. math:: w_m \sim N(0, I), \qquad
    \operatorname{E} \cos(2 \pi s\, w_m \cdot \delta) = e^{-2 \pi^2 s^2 \lVert \delta \rVert^2}

All three have this mean; the latter two have less spread about it, quasi-random ones where there
are many.

Source:
    Rahimi and Recht (2007), Random features for large-scale kernel machines.
    Yu et al. (2016), Orthogonal random features, arXiv:1610.09072.
    Avron et al. (2016), Quasi-Monte Carlo feature maps, arXiv:1412.8293.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from bayesattn.argument_checks import check_choice, check_count

__all__ = ["FREQUENCY_DRAWS", "normal_frequencies"]

FREQUENCY_DRAWS = ("independent", "orthogonal", "quasi")


def normal_frequencies(
    num_sets: int,
    num_frequencies: int,
    dim: int,
    *,
    draw: str = "orthogonal",
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "set frequency dim"]:
    """Draw standard normal vectors, for each of several sets by itself.

    On the CPU, whatever the default device, so that a seed gives the same ones everywhere.

    Args:
        num_sets: Number of sets, such as heads.
        num_frequencies: Number of vectors of each set.
        dim: Their width.
        draw: "independent"; "orthogonal", where the vectors of each block of ``dim`` are at right
            angles and have lengths of independent ones; "quasi", a scrambled Sobol sequence's
            normal quantiles.
        generator: Of the randomness; the global one if None.
        dtype: The default type if None.

    Raises:
        ValueError: If a size is not positive, or the draw is none of these.
    """
    check_choice("draw", draw, FREQUENCY_DRAWS)
    sizes = {"num_sets": num_sets, "num_frequencies": num_frequencies, "dim": dim}
    for name, size in sizes.items():
        check_count(name, size)
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if draw == "quasi":
        sets = [_quasi_normal(num_frequencies, dim, generator) for _ in range(num_sets)]
        return torch.stack(sets).to(dtype)
    # In double precision, so that a seed means the same vectors in any type.
    settings = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
    normal = torch.randn(num_sets, num_frequencies, dim, **settings)
    if draw == "independent":
        return normal.to(dtype)
    blocks = -(-num_frequencies // dim)
    square = torch.randn(num_sets, blocks, dim, dim, **settings)
    directions, triangle = torch.linalg.qr(square)
    # Signs make the directions uniform, whatever convention the factorization has.
    directions = directions * triangle.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]
    rows = directions.mT.flatten(1, 2)[:, :num_frequencies]
    return (rows * normal.norm(dim=-1, keepdim=True)).to(dtype)


def _quasi_normal(
    num_frequencies: int, dim: int, generator: torch.Generator | None
) -> Float[Tensor, "frequency dim"]:
    seed = int(torch.randint(2**31, (), generator=generator, device="cpu"))
    points = torch.quasirandom.SobolEngine(dim, scramble=True, seed=seed).draw(
        num_frequencies, dtype=torch.float64
    )
    # Points of the sequence are multiples of 2^-30 and may be zero; half of one keeps quantiles.
    return torch.special.ndtri(points.clamp(2.0**-31, 1 - 2.0**-31))
