"""Heads that share components, their dense products, and laws of components on a few points."""

import torch

from bayesattn.models.component_laws import SIDES


def shared_heads(generator, *, heads, dim, query, key, components, noise=0.02):
    """Weights of heads that each mix some of a layer's components, and a little noise.

    No component is left out, and none is weak.
    """
    pools = [torch.randn(components, size, generator=generator) for size in (query, key)]
    order = [torch.randperm(components, generator=generator) for _ in range(heads * dim)]
    chosen = torch.cat(order)[: heads * dim].view(heads, dim)
    signs = 2.0 * torch.randint(2, (heads, dim, 1), generator=generator) - 1
    sizes = signs * (0.7 + torch.rand(heads, dim, 1, generator=generator))
    sides = sizes * pools[0][chosen], pools[1][chosen]
    return tuple(
        side + noise * torch.randn(side.shape, generator=generator, dtype=side.dtype)
        for side in sides
    )


def units(query_weight, key_weight):
    """Products, dense, in units of their root mean square."""
    dense = torch.einsum("hdq,hdk->hqk", query_weight, key_weight)
    return dense / dense.square().mean().sqrt()


def random_sides(generator, components, query, key, heads):
    """Values of the three sides of components."""
    sizes = zip(SIDES, (query, key, heads), strict=True)
    return {name: torch.randn(components, size, generator=generator) for name, size in sizes}


def approximation(query_component, key_component, mixing):
    """What components make of the products, dense."""
    return torch.einsum("rq,rk,rh->hqk", query_component, key_component, mixing)
