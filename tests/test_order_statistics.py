"""Order statistics against sorting, whatever selects them."""

import pytest
import torch

from bayesattn import order_statistics
from bayesattn.order_statistics import smallest_but

# Either side of where the selection changes.
SIZES = (1, 2, 7, 8, order_statistics._FEWEST - 1, order_statistics._FEWEST, 10007)


def lower_median(values):
    return smallest_but(values, (values.shape[-1] - 1) // 2)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [(), (3,), (2, 3)])
def test_is_the_lower_middle_of_the_sorted_entries(size, dtype, rows, generator):
    values = torch.randn(*rows, size, generator=generator, dtype=dtype)
    expected = values.sort(-1).values[..., (size - 1) // 2]
    found = lower_median(values.requires_grad_())
    assert torch.equal(found, expected)
    assert not found.requires_grad


@pytest.mark.parametrize("size", SIZES[-3:])
def test_maps_over_batches(size, generator):
    values = torch.randn(5, size, 3, generator=generator)
    mapped = torch.vmap(torch.vmap(lower_median, in_dims=1), in_dims=0)(values)
    assert torch.equal(mapped, lower_median(values.mT))


@pytest.mark.parametrize("size", SIZES[-3:])
def test_leaves_its_input_alone_and_keeps_no_view_of_it(size, generator):
    values = torch.randn(2, size, generator=generator)
    before = values.clone()
    median = lower_median(values)
    assert torch.equal(values, before)
    assert median.untyped_storage().nbytes() <= 2 * 8


@pytest.mark.parametrize("size", SIZES[-2:])
def test_can_be_held_by_a_graph(size, generator):
    values = torch.randn(2, size, generator=generator)
    graph = torch.fx.experimental.proxy_tensor.make_fx(lower_median)(values)
    assert torch.equal(graph(values + 1.0), lower_median(values + 1.0))


@pytest.mark.parametrize("size", SIZES[2:])
def test_any_rank_can_be_asked_for(size, generator):
    values = torch.randn(3, size, generator=generator)
    for rank in (0, 1, size // 3, size - 1):
        assert torch.equal(smallest_but(values, rank), values.sort(-1).values[..., rank])
