"""Layers and functions on an accelerator: values, gradients, narrow types, and no waiting."""

import copy

import pytest
import torch

from bayesattn.decoding_cache import KeyValueCache
from bayesattn.encoder import TransformerEncoder, TransformerEncoderLayer
from bayesattn.functional import attention
from bayesattn.logits import (
    GaussianLogits,
    ImplicitSpectralLogits,
    Matern,
    PositiveFeatures,
    RationalQuadratic,
    RBFMagnitude,
    SchoenbergMixture,
    SpectralLogits,
    SpectralMixture,
)
from bayesattn.multihead import MultiheadAttention
from bayesattn.normalizations import (
    CausalDoublyNormalized,
    DoublyNormalized,
    HybridNormalized,
    InterpolatedNormalized,
    Sinkhorn,
)
from bayesattn.shared_projections import Collaborative
from tests.compilation import undone_compilation

HEADS, WIDTH, BATCH, TOKENS = 3, 12, 5, 7


def _made(kind, *sizes, **settings):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(HEADS, WIDTH // HEADS, *sizes, **settings).double()


CHOICES = {
    "softmax": {},
    "doubly": {"normalization": DoublyNormalized()},
    "causal": {"normalization": CausalDoublyNormalized()},
    "interpolated": {"normalization": InterpolatedNormalized(HEADS)},
    "hybrid": {"normalization": HybridNormalized(HEADS)},
    "sinkhorn": {"normalization": Sinkhorn(3)},
    "gaussian": {"logits": GaussianLogits(HEADS, WIDTH // HEADS)},
    "magnitude": {"logits": RBFMagnitude(3.0, num_heads=HEADS)},
    "quadratic": {"logits": RationalQuadratic(HEADS, WIDTH // HEADS, tail=0.5)},
    "matern": {"logits": Matern(HEADS, WIDTH // HEADS, share=0.5)},
    "schoenberg": {"logits": SchoenbergMixture(HEADS, WIDTH // HEADS, 3, spread=1.0)},
    "oscillating": {"logits": _made(SpectralMixture)},
    "spectral": {"logits": _made(SpectralLogits, 8)},
    "squared": {"logits": _made(SpectralLogits, 8, square="plain", is_stationary=False)},
    "implicit": {"logits": _made(ImplicitSpectralLogits, 8)},
    "features": {"logits": _made(PositiveFeatures, 8)},
    "features, doubly": {
        "logits": _made(PositiveFeatures, 8),
        "normalization": DoublyNormalized(),
    },
    "shared": {"projections": Collaborative(5)},
    "shared, doubly": {"projections": Collaborative(5), "normalization": DoublyNormalized()},
}
every_choice = pytest.mark.parametrize("choice", CHOICES)


@pytest.fixture
def encoder(seeded_layers, device):
    """An encoder of some choices, and its copy on the device."""

    def build(choice):
        layer = TransformerEncoderLayer(
            WIDTH, HEADS, 17, dropout=0.0, batch_first=True, **CHOICES[choice]
        )
        # In evaluation, where nothing is drawn.
        model = TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
        return model, copy.deepcopy(model).to(device)

    return build


@pytest.fixture
def sentences(generator):
    """Tokens and which are padding."""
    tokens = torch.randn(BATCH, TOKENS, WIDTH, generator=generator)
    padding = torch.arange(TOKENS) >= torch.randint(1, TOKENS + 1, (BATCH, 1), generator=generator)
    return tokens, padding


def outcome(model, tokens, padding):
    """Outputs at what is no padding, and gradients of all parameters."""
    output = model(tokens, src_key_padding_mask=padding)[~padding]
    output.sin().sum().backward()
    return [output, *(p.grad for p in model.parameters() if p.grad is not None)]


@every_choice
def test_outputs_and_gradients_are_those_of_the_cpu(choice, encoder, sentences, device):
    here, there = encoder(choice)
    expected = outcome(here, *sentences)
    found = outcome(there, *(part.to(device) for part in sentences))
    for one, other in zip(found, expected, strict=True):
        assert one.device.type == torch.device(device).type
        torch.testing.assert_close(one.cpu(), other, rtol=1e-8, atol=1e-9)


@every_choice
def test_no_layer_waits_for_the_device(choice, encoder, sentences, device, no_waiting):
    model = encoder(choice)[1].float()
    tokens, padding = sentences[0].float().to(device), sentences[1].to(device)
    with no_waiting():
        model(tokens, src_key_padding_mask=padding).square().mean().backward()


@every_choice
def test_autocast_stays_near(choice, encoder, sentences, device):
    here, there = encoder(choice)
    tokens, padding = sentences
    expected = here(tokens, src_key_padding_mask=padding)[~padding]
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        output = there.float()(tokens.float().to(device), src_key_padding_mask=padding.to(device))
        output.square().mean().backward()
    found = output[~padding.to(device)].cpu().double()
    assert (found - expected).norm() < 0.03 * expected.norm()
    assert all(p.grad.isfinite().all() for p in there.parameters() if p.grad is not None)


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore")  # What the compiler warns of is its own.
@every_choice
def test_compiled_layers_are_the_same(choice, encoder, sentences, device):
    model = encoder(choice)[1].float()
    tokens, padding = sentences[0].float().to(device), sentences[1].to(device)
    expected = outcome(model, tokens, padding)
    model.zero_grad()
    with undone_compilation():
        found = outcome(torch.compile(model), tokens, padding)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "normalization",
    [
        DoublyNormalized(),
        InterpolatedNormalized(HEADS),
        HybridNormalized(HEADS),
        Sinkhorn(3),
    ],
    ids=repr,
)
def test_blocks_of_long_inputs(normalization, dtype, generator, device):
    """Against dense weights in float64, with gradients; of more keys than one block holds."""
    shape = (2, HEADS, 1500, 16)
    *parts, upstream = (torch.randn(shape, generator=generator).to(device) for _ in range(4))
    normalization = copy.deepcopy(normalization).to(device)
    slopes = []
    for kind, route in ((torch.float64, "dense"), (dtype, "fused")):
        inputs = [part.to(kind).requires_grad_() for part in parts]
        output = attention(*inputs, normalization=normalization.to(kind), route=route)
        gradients = torch.autograd.grad(output, inputs, upstream.to(kind))
        slopes.append([output, *gradients])
    # Rounding of the inputs, which rows of hundreds of keys bear.
    tolerance = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}[dtype]
    for expected, found in zip(*slopes, strict=True):
        assert found.dtype == dtype
        assert (found.double() - expected).norm() < tolerance * expected.norm()


def test_decoding_with_a_cache(seeded_layers, generator, device):
    layer = MultiheadAttention(WIDTH, HEADS, batch_first=True, projections=Collaborative(5))
    layer = layer.to(device)
    tokens = torch.randn(BATCH, TOKENS, WIDTH, generator=generator).to(device)
    whole = layer(tokens, tokens, tokens, is_causal=True, need_weights=False)[0]
    settings = {"cache": KeyValueCache(), "need_weights": False, "is_causal": True}
    steps = [layer(token, token, token, **settings)[0] for token in tokens.split(1, 1)]
    torch.testing.assert_close(torch.cat(steps, 1), whole)


def test_a_captured_graph_replays(encoder, sentences, device):
    """A forward pass as one CUDA graph: which is refused where anything waits."""
    if not device.startswith("cuda"):
        pytest.skip("there are no CUDA graphs")
    model = encoder("doubly")[1].float().eval()
    tokens, padding = sentences[0].float().to(device), sentences[1].to(device)
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            model(tokens, src_key_padding_mask=padding)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = model(tokens, src_key_padding_mask=padding)
        tokens.add_(torch.randn(TOKENS, WIDTH, device=device))
        graph.replay()
        torch.testing.assert_close(output, model(tokens, src_key_padding_mask=padding))
