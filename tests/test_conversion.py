"""Conversion of PyTorch's layers and ours: exact at full width, in place or copied, and back."""

import copy
import math

import pytest
import torch
from torch import nn

from bayesattn.conversion import convert
from bayesattn.conversion_report import ConversionReport
from bayesattn.encoder import TransformerEncoder, TransformerEncoderLayer
from bayesattn.logits import (
    DotProduct,
    GaussianLogits,
    RationalQuadratic,
    RBFMagnitude,
    SpectralLogits,
)
from bayesattn.multihead import MultiheadAttention
from bayesattn.networks import attention_calls, input_moments
from bayesattn.normalizations import DoublyNormalized
from bayesattn.projection_conversion import CollaborativeFit, Separate
from bayesattn.shared_projections import Collaborative

BATCH, TOKENS, WIDTH, HEADS = 2, 7, 12, 3


@pytest.fixture
def encoder(seeded_layers):
    """PyTorch's encoder in evaluation, all of whose parameters count."""

    def build(cls=nn.TransformerEncoder, layer=nn.TransformerEncoderLayer, **settings):
        made = layer(WIDTH, HEADS, 16, dropout=0.3, batch_first=True, **settings)
        options = {"enable_nested_tensor": False}
        model = cls(made, 2, **options).eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.4)
        return model

    return build


@pytest.fixture
def tokens(generator):
    return torch.randn(BATCH, TOKENS, WIDTH, generator=generator)


@pytest.fixture
def padding():
    mask = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
    mask[1, 4:] = True
    return mask


FULL = CollaborativeFit(WIDTH, start="heads", num_iterations=1)


def test_full_width_is_exact_with_padding(encoder, tokens, padding):
    model = encoder()
    expected = model(tokens, src_key_padding_mask=padding)[~padding]
    converted, report = convert(model, projections=FULL, copy=True)
    found = converted(tokens, src_key_padding_mask=padding)[~padding]
    torch.testing.assert_close(found, expected)
    assert [layer.relative_error < 1e-12 for layer in report.values()] == [True, True]
    assert list(report) == ["layers.0.self_attn", "layers.1.self_attn"]
    torch.testing.assert_close(model(tokens, src_key_padding_mask=padding)[~padding], expected)
    assert type(model.layers[0].self_attn) is nn.MultiheadAttention


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_no_nested_tensor_reaches_a_converted_layer(seeded_layers, tokens, padding):
    """PyTorch's encoder makes them by default where it is not trained."""
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS - 1, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    converted, _ = convert(model, projections=FULL, copy=True)
    with torch.no_grad():
        expected = model(tokens, src_key_padding_mask=padding)[~padding]
        found = converted(tokens, src_key_padding_mask=padding)
    torch.testing.assert_close(found[~padding], expected)
    assert model.use_nested_tensor


def test_in_place_changes_the_model_itself(encoder, tokens):
    model = encoder()
    expected = model(tokens)
    converted, _ = convert(model, projections=FULL)
    assert converted is model
    assert isinstance(model.layers[0].self_attn, MultiheadAttention)
    torch.testing.assert_close(model(tokens), expected)


def test_the_report_names_other_choices(encoder):
    """Mutants: the type's name alone, the layers that were left, an empty table below."""
    model, start = encoder(), RationalQuadratic(HEADS, WIDTH // HEADS, tail=0.5)
    chosen = {"logits": start, "layers": ["layers.1.self_attn"]}
    converted, report = convert(model, **chosen)
    expected = "logits = RationalQuadratic(num_heads=3, dim=4) in layers.1.self_attn"
    assert str(report) == expected
    assert (report.layers, dict(report)) == (("layers.1.self_attn",), {})
    back, report = convert(converted, logits=DotProduct(), projections=FULL)
    first, *table = str(report).splitlines()
    assert first == "logits = DotProduct() in layers.0.self_attn, layers.1.self_attn"
    assert table[0].startswith("layer ")
    assert table[-1].startswith("all ")
    assert not isinstance(back.layers[1].self_attn.logits, RationalQuadratic)


def test_the_report_names_functions_and_the_model_itself(seeded_layers):
    def halved(query, key):
        return query @ key.mT / 2

    _, report = convert(MultiheadAttention(WIDTH, HEADS), logits=halved)
    assert str(report) == "logits = halved in (model)"
    assert str(ConversionReport()) == "nothing was exchanged"


def unbiased_shared_layer():
    """Heads that share projections wider than a head, under their own scale."""
    layer = nn.MultiheadAttention(WIDTH, HEADS, bias=False, batch_first=True).eval()
    return convert(layer, projections=FULL, copy=True).model


@pytest.mark.parametrize(
    "start",
    [
        RBFMagnitude(num_heads=HEADS),
        RationalQuadratic(HEADS, WIDTH),
        SpectralLogits(HEADS, WIDTH, 5),
        DotProduct(),
    ],
    ids=lambda start: type(start).__name__,
)
def test_shared_heads_keep_their_scale_under_other_logits(start, tokens, seeded_layers):
    """And give it back. Mutants: the scale of the shared width, or on one side only."""
    shared = unbiased_shared_layer()
    expected, _ = shared(tokens, tokens, tokens)
    other = convert(shared, logits=start, copy=True).model
    torch.testing.assert_close(other(tokens, tokens, tokens)[0], expected)
    back = convert(other, logits=DotProduct(), copy=True).model
    torch.testing.assert_close(back(tokens, tokens, tokens)[0], expected)
    apart = convert(back, projections=Separate(), copy=True).model
    torch.testing.assert_close(apart(tokens, tokens, tokens)[0], expected)


def test_shared_heads_take_the_scale_that_is_given(tokens, seeded_layers):
    shared = unbiased_shared_layer()
    other, _ = convert(shared, logits=DotProduct(scale=0.01))
    assert other.projections.query_weight is shared.projections.query_weight
    assert (other.projections.scale, shared.projections.scale) == (0.01, (WIDTH / HEADS) ** -0.5)
    apart = convert(other, projections=Separate(), copy=True).model
    weights = other(tokens, tokens, tokens, average_attn_weights=False)[1]
    query, key = apart.in_proj_weight.chunk(3)[:2]
    query, key = ((tokens @ w.mT).unflatten(-1, (HEADS, -1)).transpose(1, 2) for w in (query, key))
    torch.testing.assert_close(weights, (0.01 * query @ key.mT).softmax(-1))
    torch.testing.assert_close(apart(tokens, tokens, tokens)[0], other(tokens, tokens, tokens)[0])


def test_content_belongs_to_the_dot_product(encoder, tokens):
    """Which may be asked for."""
    shared = convert(encoder(), projections=FULL).model
    expected = shared(tokens)
    torch.testing.assert_close(convert(shared, logits=DotProduct()).model(tokens), expected)


def test_a_narrow_width_is_as_far_off_as_the_report_says(seeded_layers, generator):
    layer = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    (converted, report) = convert(layer, projections=Collaborative(5), copy=True)
    query, key, _ = layer.in_proj_weight.chunk(3)
    exact = torch.einsum("hdq,hdk->hqk", *(w.unflatten(0, (HEADS, -1)) for w in (query, key)))
    shared = converted.projections
    found = torch.einsum("hr,rq,rk->hqk", shared.mixing, shared.query_weight, shared.key_weight)
    error = (found - exact).norm() / exact.norm()
    assert 0.1 < error < 1
    assert report[""].relative_error == pytest.approx(error.item(), rel=1e-6)
    of_heads = (found - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    torch.testing.assert_close(report[""].head_errors, of_heads.detach())
    assert report[""].lower_bound <= error
    assert report[""].width == (WIDTH, 5)


def test_the_report_counts(seeded_layers):
    layer = nn.MultiheadAttention(WIDTH, HEADS, kdim=10, batch_first=True)
    converted, report = convert(layer, projections=Collaborative(5), copy=True)
    before, after = report[""].before, report[""].after
    assert before.parameters == WIDTH * (WIDTH + 10) + 2 * WIDTH
    assert after.parameters == sum(p.numel() for p in converted.projections.parameters())
    assert after.parameters == 5 * (WIDTH + 10) + HEADS * (5 + 10)
    assert (before.logit_flops, after.logit_flops) == (2 * WIDTH, 2 * HEADS * (5 + HEADS))
    assert (before.cached_floats, after.cached_floats) == (WIDTH, 5 + HEADS)
    assert before.projection_flops == 2 * WIDTH * (WIDTH + 10)
    assert after.projection_flops == 2 * (5 * (WIDTH + 10) + HEADS * (10 + 5))
    assert f"({after.parameters / before.parameters:.2f})" in str(report)
    text = str(report)
    assert "12 -> 5" in text
    assert text.splitlines()[0].split()[:3] == ["layer", "width", "error"]


def test_there_and_back_again(encoder, tokens, padding):
    model = encoder()
    expected = model(tokens, src_key_padding_mask=padding)[~padding]
    shared, _ = convert(model, projections=FULL, copy=True)
    back, report = convert(shared, projections=Separate(), copy=True)
    assert all(layer.relative_error < 1e-12 for layer in report.values())
    assert back.layers[0].self_attn.projections is None
    assert back.layers[0].self_attn.in_proj_weight.shape == (3 * WIDTH, WIDTH)
    torch.testing.assert_close(back(tokens, src_key_padding_mask=padding)[~padding], expected)


@pytest.mark.parametrize("settings", [{"kdim": 10, "vdim": 9}, {"bias": False}])
def test_there_and_back_with_other_widths_or_no_bias(seeded_layers, generator, settings):
    layer = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **settings)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    widths = (WIDTH, settings.get("kdim", WIDTH), settings.get("vdim", WIDTH))
    inputs = [torch.randn(BATCH, TOKENS, width, generator=generator) for width in widths]
    shared, _ = convert(layer, projections=FULL, copy=True)
    back, _ = convert(shared, projections=Separate(), copy=True)
    for made in (shared, back):
        torch.testing.assert_close(made(*inputs)[0], layer(*inputs)[0])


def test_normalizations_over_queries_keep_the_bias_of_keys(encoder, tokens, padding):
    model = encoder(TransformerEncoder, TransformerEncoderLayer, normalization=DoublyNormalized())
    expected = model(tokens, src_key_padding_mask=padding)[~padding]
    shared, _ = convert(model, projections=FULL, copy=True)
    torch.testing.assert_close(shared(tokens, src_key_padding_mask=padding)[~padding], expected)
    assert shared.layers[0].self_attn.projections.query_content is not None
    back, _ = convert(shared, projections=Separate(), copy=True)
    torch.testing.assert_close(back(tokens, src_key_padding_mask=padding)[~padding], expected)


def test_a_scale_of_ones_own_is_kept(seeded_layers, tokens):
    layer = MultiheadAttention(WIDTH, HEADS, batch_first=True, logits=DotProduct(0.9))
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    shared, _ = convert(layer, projections=FULL, copy=True)
    back, _ = convert(shared, projections=Separate(), copy=True)
    for made in (shared, back):
        torch.testing.assert_close(made(tokens, tokens, tokens), layer(tokens, tokens, tokens))


def test_mode_dropout_type_hooks_and_frozen_parameters_are_kept(encoder, tokens):
    model = encoder().float()
    attention = model.layers[0].self_attn
    attention.train().requires_grad_(False)
    seen = []
    handle = attention.register_forward_hook(lambda *_: seen.append(1))
    convert(model, projections=FULL)
    made = model.layers[0].self_attn
    assert made.training
    assert not model.layers[1].self_attn.training
    assert made.dropout == 0.3
    assert {p.dtype for p in made.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in made.parameters())
    assert all(p.requires_grad for p in model.layers[1].self_attn.parameters())
    model(tokens.float())
    handle.remove()
    model(tokens.float())
    assert seen == [1]


def test_a_layer_in_several_places_stays_one(seeded_layers, tokens):
    one = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    model = nn.ModuleDict({"first": one, "second": one})
    convert(model, projections=FULL)
    assert model["first"] is model["second"]
    assert isinstance(model["first"], MultiheadAttention)


def test_some_layers_only(encoder):
    model = encoder()
    convert(model, projections=FULL, layers=["layers.1.self_attn"])
    assert type(model.layers[0].self_attn) is nn.MultiheadAttention
    assert model.layers[1].self_attn.projections.width == WIDTH
    with pytest.raises(
        ValueError, match=r"layers: expected some of 'layers.0.self_attn', .* got 'x'"
    ):
        convert(model, projections=FULL, layers=["x"])
    with pytest.raises(ValueError, match="layers: expected a sequence of names, got 'x'"):
        convert(model, projections=FULL, layers="x")


def test_widths_by_name_and_nested_widths(encoder, tokens):
    model = encoder()
    widths = {"layers.0.self_attn": 5, "layers.1.self_attn": 7}
    convert(model, projections=CollaborativeFit(widths))
    assert [layer.self_attn.projections.width for layer in model.layers] == [5, 7]
    _, report = convert(model, projections=Collaborative(4))
    assert [layer.width for layer in report.values()] == [(5, 4), (7, 4)]
    with pytest.raises(ValueError, match="width: expected one for each layer"):
        convert(model, projections=CollaborativeFit({"layers.0.self_attn": 3}))


def test_an_error_budget_gives_each_layer_its_width(encoder):
    model = encoder()
    _, report = convert(model, projections=CollaborativeFit(error=0.3))
    for layer in report.values():
        assert layer.relative_error <= 0.3
        assert 1 <= layer.width[1] < WIDTH


def test_fresh_parameters_are_loaded_into(encoder, tokens):
    model = encoder()
    trained, _ = convert(model, projections=Collaborative(5), copy=True)
    fresh, report = convert(model, projections=CollaborativeFit(5, start="fresh"), copy=True)
    assert all(math.isnan(layer.relative_error) for layer in report.values())
    assert " new " in str(report)
    assert (fresh(tokens) - trained(tokens)).abs().max() > 1e-3
    fresh.load_state_dict(trained.state_dict())
    torch.testing.assert_close(fresh(tokens), trained(tokens))


def test_moments_are_those_of_tokens_that_are_no_padding(seeded_layers, generator, padding):
    layer = nn.MultiheadAttention(WIDTH, HEADS, kdim=10, vdim=9, batch_first=False)
    query = torch.randn(5, BATCH, WIDTH, generator=generator)
    key = torch.randn(TOKENS, BATCH, 10, generator=generator)
    value = torch.randn(TOKENS, BATCH, 9, generator=generator)
    with input_moments(layer) as moments:
        for scale in (1, 2):
            layer(scale * query, key=scale * key, value=value, key_padding_mask=padding)
    real = key.transpose(0, 1)[~padding]
    torch.testing.assert_close(moments[""].key, 2.5 * real.mT @ real / len(real))
    asked = query.flatten(0, 1)
    torch.testing.assert_close(moments[""].query, 2.5 * asked.mT @ asked / len(asked))
    assert (moments[""].query_count, moments[""].key_count) == (20, 22)


def test_weighing_by_moments_lowers_the_error_of_logits(seeded_layers, generator):
    """Tokens that live on few directions, which plain weights do not know of."""
    layer = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    spread = torch.linspace(0, -3, WIDTH).exp()
    tokens = torch.randn(8, 40, WIDTH, generator=generator) * spread
    with input_moments(layer) as moments:
        layer(tokens, tokens, tokens)

    def error(fit):
        converted, report = convert(layer, projections=fit, copy=True)
        given = converted.attention_inputs(tokens, tokens, tokens)
        before = MultiheadAttention.from_torch(layer).attention_inputs(tokens, tokens, tokens)
        exact = before.query @ before.key.mT * (WIDTH / HEADS) ** -0.5
        found = given.query @ given.key.mT
        return ((found - exact).norm() / exact.norm()).item(), report[""].relative_error

    plain, _ = error(CollaborativeFit(4))
    weighed, reported = error(CollaborativeFit(4, moments=moments))
    assert weighed < 0.8 * plain
    assert reported == pytest.approx(weighed, rel=0.2)
    with pytest.raises(ValueError, match="moments: expected those of layer ''"):
        convert(layer, projections=CollaborativeFit(4, moments={}), copy=True)


def test_other_axes(encoder, tokens, padding):
    model = encoder()
    seen = []
    model.layers[0].self_attn.register_forward_hook(lambda *_: seen.append(1))
    converted, report = convert(model, normalization=DoublyNormalized(), projections=FULL)
    assert isinstance(converted.layers[0].self_attn.normalization, DoublyNormalized)
    assert len(report) == 2
    converted(tokens)
    assert seen == [1]
    ours = encoder()
    expected = encoder(
        TransformerEncoder, TransformerEncoderLayer, normalization=DoublyNormalized()
    )
    expected.load_state_dict(ours.state_dict())
    convert(ours, normalization=DoublyNormalized())
    torch.testing.assert_close(
        ours(tokens, src_key_padding_mask=padding)[~padding],
        expected(tokens, src_key_padding_mask=padding)[~padding],
    )


def test_refusals_name_the_layer_and_the_reason_and_change_nothing(encoder):
    with pytest.raises(ValueError, match="convert: expected one of projections, normalization"):
        convert(encoder())
    with pytest.raises(ValueError, match=r"model: expected attention layers .*, found none"):
        convert(nn.Linear(2, 2), projections=FULL)
    with pytest.raises(ValueError, match=r"expected a width or an error, got width=3, error=0\.1"):
        CollaborativeFit(3, error=0.1)
    with pytest.raises(ValueError, match="start: 'fresh' needs a width"):
        CollaborativeFit(error=0.1, start="fresh")
    model = nn.ModuleList(
        [nn.MultiheadAttention(4, 2), nn.MultiheadAttention(4, 2, add_bias_kv=True)]
    )
    with pytest.raises(ValueError, match=r"layer '1' \(MultiheadAttention\) .* learned key"):
        convert(model, projections=Collaborative(2))
    assert type(model[0]) is nn.MultiheadAttention
    with pytest.raises(ValueError, match="key of zeros"):
        convert(nn.MultiheadAttention(4, 2, add_zero_attn=True), projections=Collaborative(2))
    with pytest.raises(ValueError, match="no inner products of queries and keys, but Gaussian"):
        convert(MultiheadAttention(4, 2, logits=GaussianLogits(2, 2)), projections=Collaborative(2))
    with pytest.raises(ValueError, match="layer '0': expected shared projections, found none"):
        convert(model, projections=Separate(), layers=["0"])
    bound = nn.utils.parametrizations.weight_norm(nn.MultiheadAttention(4, 2), "in_proj_weight")
    with pytest.raises(ValueError, match="parametrized"):
        convert(bound, projections=Collaborative(2))


@pytest.mark.usefixtures("unchecked_types", "seeded_layers")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CollaborativeFit(0), "width must be a whole number, at least 1, got 0"),
        (lambda: CollaborativeFit({"a": 2.5}), "width of layer 'a' must be a whole number"),
        (lambda: CollaborativeFit(error=-1.0), "error must be a number, not negative, got -1"),
        (lambda: CollaborativeFit(4, start="svd"), "start must be one of .*, got 'svd'"),
        (lambda: CollaborativeFit(4, num_iterations=2.5), "num_iterations must be a whole number"),
        (lambda: CollaborativeFit(4, seed="x"), "seed must be a whole number"),
        (lambda: CollaborativeFit(4, moments=3), "moments must be of type Mapping, got 3"),
        (lambda: Collaborative(2.5), "width must be a whole number, at least 1, got 2.5"),
        (lambda: convert(3, projections=FULL), "model must be of type Module, got 3"),
        (lambda: convert(nn.MultiheadAttention(4, 2), projections=8), "projections must be of ty"),
        (
            lambda: convert(nn.MultiheadAttention(4, 2), projections=Separate),
            "projections must be of type .*, got the class Separate",
        ),
        (
            lambda: MultiheadAttention(4, 2, projections=CollaborativeFit(3)),
            "projections must be of type Collaborative, got CollaborativeFit",
        ),
        (
            lambda: convert(
                nn.ModuleDict({"a": nn.MultiheadAttention(4, 2)}),
                projections=CollaborativeFit({"a": 3, "b": 3}),
            ),
            r"width: expected names among 'a', got \['b'\]",
        ),
    ],
)
def test_slips_are_told_plainly(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_what_is_not_finite_is_named_by_its_layer(encoder):
    model = encoder()
    with torch.no_grad():
        model.layers[1].self_attn.in_proj_weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layer 'layers.1.self_attn': expected finite weights"):
        convert(model, projections=FULL)


@pytest.mark.parametrize("width", [2, 3, 5])
def test_separate_heads_keep_content_and_say_what_they_lose(width, seeded_layers, generator):
    """Mutants: content left out of what is decomposed, or of the error."""
    model = nn.MultiheadAttention(12, 3, batch_first=True)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    shared = convert(model, projections=Collaborative(width), copy=True).model
    back, report = convert(shared, projections=Separate(), copy=True)
    tokens = torch.randn(2, 7, 12, generator=generator)
    error = report[""].relative_error
    # Four features of a head hold three components and content, and no more.
    assert (error < 1e-12) == (width <= 3)
    logits = []
    for layer in (shared, back):
        with attention_calls(layer) as calls:
            layer(tokens, tokens, tokens, need_weights=False)
        logits.append(calls[""][0].query @ calls[""][0].key_of_each_head().mT)
    # Softmax sees no constant of a query.
    first, second = (part - part.mean(-1, keepdim=True) for part in logits)
    moved = (first / first.std() - second / second.std()).abs().max()
    assert (moved < 1e-9) == (width <= 3)


def test_errors_are_those_of_weights_as_they_are_stored(seeded_layers):
    """Of a narrow type, at the full width, where nothing else is lost."""
    model = nn.MultiheadAttention(12, 3, dtype=torch.bfloat16)
    _, report = convert(model, projections=FULL, copy=True)
    assert 1e-4 < report[""].relative_error < 1e-2
    _, report = convert(model.double(), projections=FULL, copy=True)
    assert report[""].relative_error < 1e-12


def test_a_round_trip_in_a_narrow_type_leaves_plain_logits(seeded_layers):
    """Whose scale, a root of one sixth, is rounded where it is stored."""
    model = MultiheadAttention(12, 2, dtype=torch.bfloat16)
    shared = convert(model, projections=FULL, copy=True).model
    assert convert(shared, projections=Separate(), copy=True).model.logits is None


def test_fresh_logits_are_as_large_as_those_of_a_fresh_layer(seeded_layers, generator):
    model = nn.MultiheadAttention(64, 4, batch_first=True, bias=False)
    fresh = convert(model, projections=CollaborativeFit(16, start="fresh"), copy=True).model
    tokens = torch.randn(8, 20, 64, generator=generator)
    sizes = []
    for layer in (model, fresh):
        with attention_calls(layer) as calls:
            layer(tokens, tokens, tokens, need_weights=False)
        (call,) = calls[""]
        scale = call.settings.get("scale") or call.query.shape[-1] ** -0.5
        sizes.append(scale * (call.query @ call.key_of_each_head().mT).std())
    assert 0.7 < sizes[1] / sizes[0] < 1.4


def test_a_normalization_over_queries_comes_with_the_keys_bias_or_not_at_all(seeded_layers):
    shared = convert(nn.MultiheadAttention(12, 3), projections=Collaborative(5)).model
    with pytest.raises(ValueError, match="normalization: expected one over keys alone for heads"):
        convert(shared, normalization=DoublyNormalized())
    both = convert(
        nn.MultiheadAttention(12, 3),
        projections=Collaborative(5),
        normalization=DoublyNormalized(),
    ).model
    assert both.projections.query_content is not None


def test_shared_again_at_another_width_and_back(encoder, tokens):
    """The width of a head is the original one's."""
    model = encoder()
    expected = model(tokens)
    for width in (WIDTH + 3, WIDTH):
        model = convert(model, projections=CollaborativeFit(width, start="heads")).model
    torch.testing.assert_close(model(tokens), expected)
    model, report = convert(model, projections=Separate())
    torch.testing.assert_close(model(tokens), expected)
    assert [layer.width for layer in report.values()] == [(WIDTH, WIDTH)] * 2


def test_only_what_is_shared_is_separated(encoder, tokens):
    model, _ = convert(encoder(), projections=Collaborative(5), layers=["layers.0.self_attn"])
    _, report = convert(model, projections=Separate())
    assert list(report) == ["layers.0.self_attn"]


def test_an_error_budget_is_one_of_weighed_errors_and_hangs_on_the_seed(encoder, generator):
    model = encoder()
    tokens = torch.randn(50, TOKENS, WIDTH, generator=generator)
    tokens = tokens * torch.linspace(3, 0, WIDTH).exp()
    with input_moments(model) as moments, torch.no_grad():
        model(tokens)
    widths = []
    for given in (None, moments):
        fit = CollaborativeFit(error=0.3, moments=given, num_iterations=20)
        report = convert(model, projections=fit, copy=True).report
        assert all(layer.relative_error <= 0.3 for layer in report.values())
        widths.append([layer.width[1] for layer in report.values()])
    # Most of what the first layer sees lies in few directions.
    assert widths[1][0] < widths[0][0]
    errors = {
        convert(
            model,
            projections=CollaborativeFit(5, start="random", num_iterations=2, seed=seed),
            copy=True,
        )
        .report["layers.0.self_attn"]
        .relative_error
        for seed in (0, 1)
    }
    assert len(errors) == 2


def test_converted_models_train_and_copy(encoder, tokens):
    model, _ = convert(encoder(), projections=Collaborative(5))
    model.train()
    model(tokens).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
    again = copy.deepcopy(model.eval())
    torch.testing.assert_close(again(tokens), model(tokens))
