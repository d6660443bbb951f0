"""What holds of every choice of logits: start, routes, masks, edges, gradients, types, layers."""

import copy

import pytest
import torch
from torch import nn

from bayesattn.attention_diagnostics import attention_statistics
from bayesattn.conversion import convert
from bayesattn.edges import edge_weights
from bayesattn.encoder import TransformerEncoder, TransformerEncoderLayer
from bayesattn.functional import attention, attention_weights
from bayesattn.graph_layers import GraphAttention
from bayesattn.logits import ConditionalLogits, Logits
from bayesattn.multihead import MultiheadAttention
from bayesattn.normalizations import DoublyNormalized, HybridNormalized, Sinkhorn
from bayesattn.pairwise_logits import logits_of_edges
from bayesattn.shared_projections import Collaborative
from tests.compilation import in_one_graph
from tests.logits.cases import ALL, DIM, EXACT, HEADS, made

BATCH, QUERIES, KEYS = 2, 7, 11
close = torch.testing.assert_close
every_kernel = pytest.mark.parametrize("name", ALL)
# Whose parameters do not hang on the width of queries and keys.
WITHOUT_WIDTH = ("gaussian", "rbf_magnitude")
REDUCED = [name for name in ALL if type(made(name)).reduce is not Logits.reduce]


@pytest.fixture
def clouds(generator):
    return [torch.randn(BATCH, HEADS, n, DIM, generator=generator) for n in (QUERIES, KEYS, KEYS)]


@pytest.fixture
def masks(generator):
    keys = torch.rand(BATCH, KEYS, generator=generator) > 0.4
    queries = torch.rand(BATCH, QUERIES, generator=generator) > 0.4
    return {"key_mask": keys, "query_mask": queries}


@pytest.mark.parametrize("name", EXACT)
def test_the_start_is_the_softmax(name, clouds):
    """Mutants: any factor of a rate or a frequency's scale, a floor that stands alone."""
    query, key, value = (2 * part for part in clouds)
    expected = attention(query, key, value)
    for is_training in (True, False):
        logits = made(name).train(is_training)
        with torch.random.fork_rng(devices=[]):
            found = attention(query, key, value, logits=logits)
        close(found, expected, rtol=1e-11, atol=1e-13)


@every_kernel
def test_after_training_it_is_another(name, clouds):
    query, key, _ = clouds
    found = attention_weights(query, key, logits=made(name, moved=0.5).eval())
    assert (found - attention_weights(query, key)).abs().max() > 1e-3
    close(found.sum(-1), torch.ones(BATCH, HEADS, QUERIES))


@pytest.mark.parametrize("normalization", [None, DoublyNormalized(), Sinkhorn(2)], ids=repr)
@pytest.mark.parametrize("name", REDUCED)
def test_routes_agree(name, normalization, clouds, masks):
    """Outputs and gradients, by formed weights and by fused attention, under padding."""
    parts = [part.requires_grad_() for part in clouds]
    logits = made(name, moved=0.5)
    wanted = [*parts, *logits.parameters()]
    slopes = []
    for route in ("dense", "fused"):
        output = attention(*parts, logits=logits, normalization=normalization, route=route, **masks)
        slopes.append((output, *_slopes(output, wanted)))
    for one, other in zip(*slopes, strict=True):
        close(one, other, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", REDUCED)
def test_routes_agree_where_no_key_takes_part(name, clouds):
    mask = torch.arange(KEYS) < torch.tensor([[0], [3]])
    for normalization in (None, HybridNormalized(HEADS)):
        settings = {"logits": made(name), "normalization": normalization, "key_mask": mask}
        fused, dense = (attention(*clouds, route=r, **settings) for r in ("fused", "dense"))
        close(fused, dense)
        assert fused[0].abs().max() == 0


@every_kernel
def test_padding_never_matters(name, clouds, masks):
    """Mutants: a mean over padding, one law for a whole batch."""
    query, key, value = clouds
    logits = made(name, moved=0.5).eval()
    expected = attention(query, key, value, logits=logits, **masks)
    other = [part.clone() for part in clouds]
    other[0][~masks["query_mask"][:, None].expand(-1, HEADS, -1)] = 7.0
    for part in other[1:]:
        part[~masks["key_mask"][:, None].expand(-1, HEADS, -1)] = -7.0
    close(attention(*other, logits=logits, **masks), expected)
    # Nor do the batch's other sequences.
    alone = {key: mask[:1] for key, mask in masks.items()}
    close(attention(*(part[:1] for part in clouds), logits=logits, **alone), expected[:1])


@pytest.mark.parametrize("name", REDUCED)
@pytest.mark.parametrize("normalization", [None, DoublyNormalized(), Sinkhorn(2)], ids=repr)
def test_gradients_where_a_sequence_has_no_query_or_no_key(name, normalization, clouds):
    """Mutant: a logsumexp of nothing but minus infinities."""
    parts = [part.requires_grad_() for part in clouds]
    logits = made(name, moved=0.5)
    settings = {"logits": logits, "normalization": normalization, "route": "fused"}
    nothing = torch.arange(BATCH)[:, None] > 0
    for mask, size in (("query_mask", QUERIES), ("key_mask", KEYS)):
        output = attention(*parts, **{mask: nothing.expand(-1, size)}, **settings)
        for slope in _slopes(output, [*parts, *logits.parameters()]):
            assert slope.isfinite().all()


@pytest.mark.parametrize("name", REDUCED)
def test_a_bias_of_keys_is_one_by_either_route(name, clouds, generator):
    bias = torch.randn(1, KEYS, generator=generator)
    for normalization in (None, HybridNormalized(HEADS)):
        settings = {"logits": made(name, moved=0.5), "normalization": normalization}
        fused, dense = (
            attention(*clouds, attn_mask=bias, route=route, **settings)
            for route in ("fused", "dense")
        )
        close(fused, dense)
        statistics = attention_statistics(*clouds[:2], attn_mask=bias, **settings)
        weights = attention_weights(*clouds[:2], attn_mask=bias, **settings)
        close(statistics.column_mass, weights.sum(-2))


@every_kernel
def test_far_padding_costs_no_digits(name, clouds, masks):
    """In single precision: mutant, distances about a mean of all, padding included."""
    parts = [part.float() for part in clouds]
    logits = made(name, moved=0.3).float().eval()
    expected = attention(*parts, logits=logits, **masks)
    for part, mask in zip(parts[:2], (masks["query_mask"], masks["key_mask"]), strict=True):
        part[~mask[:, None].expand(-1, HEADS, -1)] = 1e4
    close(attention(*parts, logits=logits, **masks), expected, rtol=1e-5, atol=1e-6)


@every_kernel
def test_edges_of_a_full_graph_are_all_pairs(name, clouds):
    query, key, _ = (part[0] for part in clouds)
    logits = made(name, moved=0.5).eval()
    edges = torch.cartesian_prod(torch.arange(QUERIES), torch.arange(KEYS)).flip(1).T
    found = edge_weights(query, key, edges, logits=logits).view(HEADS, QUERIES, KEYS)
    close(found, attention_weights(query, key, logits=logits))
    # Magnitudes of queries too, which weights do not show.
    pairs = logits_of_edges(logits, query, key, edges).view(HEADS, QUERIES, KEYS)
    close(pairs, logits(query, key))


@every_kernel
def test_gradients(name, generator):
    """Of queries, keys and all parameters, which all have one."""
    query, key = (
        torch.randn(HEADS, 2, DIM, generator=generator).requires_grad_() for _ in range(2)
    )
    logits = made(name, moved=0.3).eval()
    names = [name for name, _ in logits.named_parameters()]

    def weights(query, key, *values):
        parameters = dict(zip(names, values, strict=True))
        return torch.func.functional_call(logits, parameters, (query, key)).softmax(-1)

    inputs = (query, key, *logits.parameters())
    assert torch.autograd.gradcheck(weights, inputs, fast_mode=True)
    # A softmax does not see the magnitude of queries.
    unseen = {"query_exponent"}
    for slope, of in zip(_slopes(weights(*inputs), inputs)[2:], names, strict=True):
        assert (slope.abs().max() < 1e-12) == (of in unseen), of


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_types(name, dtype, clouds):
    """In bfloat16 within what rounding of queries and keys does to a softmax too."""
    query, key, value = (part.to(dtype) for part in clouds)
    logits = made(name, moved=0.3).eval()
    exact = attention(query.double(), key.double(), value.double(), logits=logits)
    found = attention(query, key, value, logits=copy.deepcopy(logits).to(dtype))
    assert found.dtype == dtype
    bound = {torch.float32: 2e-4, torch.bfloat16: 0.15}[dtype]
    assert (found.double() - exact).abs().max() < bound
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = attention(query.float(), key.float(), value.float(), logits=logits.float())
    assert (under.double() - exact).abs().max() < 0.15


@every_kernel
def test_in_a_layer(name, generator, seeded_layers):
    """Saved and loaded, cross-attention, padding told of keys, both batches at once."""
    layer = MultiheadAttention(HEADS * DIM, HEADS, batch_first=True, logits=made(name, moved=0.5))
    layer.eval()
    tokens = torch.randn(BATCH, QUERIES, HEADS * DIM, generator=generator)
    others = torch.randn(BATCH, KEYS, HEADS * DIM, generator=generator)
    padding = torch.arange(QUERIES) >= torch.tensor([[QUERIES], [4]])
    expected, weights = layer(tokens, tokens, tokens, key_padding_mask=padding)
    assert weights.shape == (BATCH, QUERIES, QUERIES)
    changed = torch.where(padding[..., None], 9.0, tokens)
    close(
        layer(changed, changed, changed, key_padding_mask=padding)[0][~padding], expected[~padding]
    )
    loaded = MultiheadAttention(HEADS * DIM, HEADS, batch_first=True, logits=made(name)).eval()
    loaded.load_state_dict(layer.state_dict())
    close(loaded(tokens, others, others)[0], layer(tokens, others, others)[0], rtol=0, atol=0)
    assert loaded(tokens, others, others, need_weights=False)[0].shape == tokens.shape


@every_kernel
def test_with_shared_projections(name, generator, seeded_layers):
    """Queries and keys are as wide as what heads share, and so is the kernel."""
    layer = MultiheadAttention(
        2 * HEADS, HEADS, batch_first=True, projections=Collaborative(DIM), logits=made(name)
    ).eval()
    tokens = torch.randn(BATCH, QUERIES, 2 * HEADS, generator=generator)
    query, key, _, settings = layer.attention_inputs(tokens, tokens, tokens)
    assert query.shape[-1] == DIM
    close(
        layer(tokens, tokens, tokens, average_attn_weights=False)[1],
        attention_weights(query, key, **settings),
    )


@every_kernel
def test_in_a_graph(name, generator, seeded_layers):
    layer = GraphAttention(4, DIM, HEADS, logits=made(name, moved=0.5)).eval()
    nodes = torch.randn(6, 4, generator=generator)
    edges = torch.tensor([[0, 1, 2, 3, 4, 0], [1, 1, 1, 0, 5, 5]])
    output, weights = layer(nodes, edges, need_weights=True)
    assert output.isfinite().all()
    close(weights[:, :3].sum(-1), torch.ones(HEADS))


@pytest.mark.parametrize("name", EXACT)
def test_a_trained_model_goes_on_from_its_softmax(name, generator, seeded_layers):
    """Mutants: one module for two layers, frequencies of another width than the heads'."""
    width = HEADS * DIM
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(width, HEADS, 16, dropout=0.0, batch_first=True),
        2,
        enable_nested_tensor=False,
    )
    tokens = torch.randn(BATCH, QUERIES, width, generator=generator)
    padding = torch.arange(QUERIES) >= torch.tensor([[QUERIES], [4]])
    expected = encoder(tokens, src_key_padding_mask=padding)[~padding]
    model, _ = convert(encoder, logits=made(name), copy=True)
    found = model(tokens, src_key_padding_mask=padding)[~padding]
    close(found, expected, rtol=1e-9, atol=1e-11)
    found.square().sum().backward()
    first, second = (dict(layer.self_attn.logits.named_parameters()) for layer in model.layers)
    for key, parameter in first.items():
        assert parameter is not second[key]
    assert any(parameter.grad.abs().max() > 0 for parameter in first.values())


@every_kernel
def test_causal_attention_sees_no_later_token(name, clouds):
    """Or is refused, where logits pool over all tokens."""
    query, key, value = (part[..., :QUERIES, :] for part in clouds)
    logits = made(name, moved=0.5).eval()
    settings = {"logits": logits, "is_causal": True}
    if isinstance(logits, ConditionalLogits) and logits.sees_all_tokens:
        with pytest.raises(ValueError, match="logits: ImplicitSpectralLogits pools over all"):
            attention(query, key, value, **settings)
        mask = torch.ones(QUERIES, QUERIES, dtype=torch.bool).tril()
        with pytest.raises(ValueError, match="logits: ImplicitSpectralLogits pools over all"):
            attention(query, key, value, logits=logits, attn_mask=mask)
        return
    whole = attention(query, key, value, **settings)
    part = attention(query[..., :4, :], key[..., :4, :], value[..., :4, :], **settings)
    close(whole[..., :4, :], part)


@pytest.mark.parametrize("name", [name for name in ALL if not name.startswith("implicit")])
def test_dropout_leaves_the_magnitude_of_queries_out(name, clouds):
    """It drops weights; the published code drops magnitudes, so that a query's no more cancels."""
    query, key, value = clouds
    logits = made(name, moved=0.3)

    def moved(query, key):
        return logits(query, key) + torch.linspace(-3, 3, QUERIES)[:, None]

    outputs = []
    for choice in (lambda q, k: logits(q, k), moved):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            outputs.append(
                attention(query, key, value, logits=choice, dropout_p=0.5, route="dense")
            )
    close(*outputs)


@pytest.mark.compile
@pytest.mark.parametrize("name", ["schoenberg", "spectral", "implicit", "positive_features"])
def test_compiled(name, clouds):
    logits = made(name, moved=0.3).eval()
    expected = attention(*clouds, logits=logits)
    close(in_one_graph(lambda *parts: attention(*parts, logits=logits), *clouds), expected)


@pytest.mark.parametrize("name", [name for name in ALL if name not in WITHOUT_WIDTH])
def test_other_heads_and_widths_are_refused(name, clouds):
    logits = made(name)
    for part in (clouds[0][..., :4], clouds[0][:, :2], clouds[0][0, 0]):
        with pytest.raises(ValueError, match=f"{type(logits).__name__}: expected queries and keys"):
            attention(part, part, part, logits=logits)


# The variance of the Gaussian logits is itself a parameter, and rounded.
@pytest.mark.parametrize("name", [name for name in EXACT if name != "gaussian"])
def test_a_start_rounded_to_bfloat16_is_the_softmax_still(name, clouds):
    query, key, value = clouds
    logits = made(name).bfloat16().double().eval()
    close(attention(query, key, value, logits=logits), attention(query, key, value))


@every_kernel
def test_under_vmap(name, clouds):
    logits = made(name, moved=0.3).eval()
    found = torch.func.vmap(lambda q, k, v: attention(q, k, v, logits=logits))(*clouds)
    close(found, attention(*clouds, logits=logits))


def test_an_encoder_has_one_of_each_layer(seeded_layers, generator):
    layer = TransformerEncoderLayer(
        HEADS * DIM, HEADS, 16, batch_first=True, logits=made("spectral")
    )
    model = TransformerEncoder(layer, 2)
    tokens = torch.randn(BATCH, QUERIES, HEADS * DIM, generator=generator)
    model(tokens).square().sum().backward()
    first, second = (part.self_attn.logits for part in model.layers)
    assert first.first is not second.first
    assert first.first.grad.abs().max() > 0


def _slopes(output, inputs):
    """Of a function of the output, zero where an input has none."""
    return torch.autograd.grad(
        output.sin().sum(), inputs, allow_unused=True, materialize_grads=True
    )
