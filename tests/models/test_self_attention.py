"""Self-attention: its functions beside PyTorch's own layer, and what its symmetries leave alone."""

import torch

from bayesattn.models.self_attention import mean_over_tokens, self_attend
from tests.models.cases import (
    DIM,
    NUM_HEADS,
    NUM_SENTENCES,
    NUM_TOKENS,
    WIDTH,
    draw_values,
    make_data,
    make_model,
    run,
)


def projections(generator, width=WIDTH):
    return torch.randn(3, NUM_HEADS, DIM, width, generator=generator)


def test_is_multihead_attention_of_pytorch(generator):
    # PyTorch's layer wants heads that divide the width of the tokens.
    dim = NUM_HEADS * WIDTH
    tokens = torch.randn(NUM_SENTENCES, NUM_TOKENS, dim, generator=generator)
    mask = make_data(generator).mask[1:]
    weights = torch.randn(3, NUM_HEADS, dim, WIDTH, generator=generator) * dim**-0.5
    with torch.random.fork_rng():
        layer = torch.nn.MultiheadAttention(dim, NUM_HEADS, bias=False, batch_first=True)
    layer.in_proj_weight.data = weights.transpose(2, 3).reshape(3 * dim, dim)
    layer.out_proj.weight.data = torch.eye(dim)
    inputs = (tokens[1:],) * 3
    expected, expected_weights = layer(
        *inputs, key_padding_mask=~mask, average_attn_weights=False, need_weights=True
    )
    attended, attention = self_attend(tokens[1:], *weights, mask)
    side_by_side = attended.transpose(1, 2).flatten(2)
    # For words; PyTorch's layer also lets padding ask.
    torch.testing.assert_close(side_by_side[mask], expected[mask])
    for_words = expected_weights * mask[:, None, :, None]
    torch.testing.assert_close(attention, for_words)


def test_order_of_the_words_moves_with_them(generator):
    tokens, mask, _ = make_data(generator)
    weights, order = projections(generator), torch.tensor([3, 1, 4, 0, 2])
    attended, attention = self_attend(tokens, *weights, mask)
    turned, turned_attention = self_attend(tokens[:, order], *weights, mask[:, order])
    torch.testing.assert_close(turned, attended[:, :, order])
    torch.testing.assert_close(turned_attention, attention[:, :, order][..., order])
    mean = mean_over_tokens(attended, mask)
    torch.testing.assert_close(mean_over_tokens(turned, mask[:, order]), mean)


def test_mean_leaves_padding_out(generator):
    mask = make_data(generator).mask
    values = torch.randn(NUM_SENTENCES, NUM_HEADS, NUM_TOKENS, WIDTH, generator=generator)
    mean = mean_over_tokens(values * mask[:, None, :, None], mask)
    for sentence in range(1, NUM_SENTENCES):
        by_hand = values[sentence][:, mask[sentence]].mean(1)
        torch.testing.assert_close(mean[sentence], by_hand)
    assert (mean[0] == 0).all()
    torch.testing.assert_close(mean_over_tokens(values), values.mean(2))


def test_likelihood_does_not_see_a_change_of_basis_between_queries_and_keys(generator):
    model, data = make_model("self_attention"), make_data(generator)
    values = draw_values(model, data, generator)
    # Not orthogonal, so that the prior does see it.
    basis = torch.eye(WIDTH) + 0.3 * torch.randn(WIDTH, WIDTH, generator=generator)
    changed = values | {
        "query_weight": values["query_weight"] @ basis,
        "key_weight": values["key_weight"] @ torch.linalg.inv(basis).mT,
    }
    (before, log_joint), (after, log_joint_after) = (
        run(model, data, given) for given in (values, changed)
    )
    torch.testing.assert_close(after["expected_target"], before["expected_target"])
    assert (log_joint_after - log_joint).abs() > 1e-3
