"""Tests of Alignment: what its term is, whose gradients it moves, and what it leaves behind."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from bayesattn import MultiheadAttention, StructuredSelfAttention, TransformerEncoderLayer
from bayesattn.divergences import (
    MMD,
    Adversarial,
    ConditionalTransport,
    Energy,
    SinkhornDivergence,
    SlicedWasserstein,
    energy_distance,
    squared_mmd,
)
from bayesattn.inference import Alignment
from bayesattn.kernels import RBF
from bayesattn.networks import attention_calls
from tests.compilation import undone_compilation
from tests.heads import Classifier

pytestmark = pytest.mark.usefixtures("seeded_layers")

EMBED, HEADS, TOKENS, BATCH = 12, 3, 7, 5
DIVERGENCES = {
    "MMD": MMD(RBF(1.0)),
    "energy": energy_distance,
    "transport": ConditionalTransport(),
    "learned transport": ConditionalTransport.learned,
    "adversarial": Adversarial,
}


@pytest.fixture
def model():
    return Classifier(EMBED, HEADS)


@pytest.fixture
def tokens(generator):
    return torch.randn(BATCH, TOKENS, EMBED, generator=generator)


class Padded(nn.Module):
    """A layer that is told of padding, and one that attends from two queries to all tokens."""

    def __init__(self, make):
        super().__init__()
        self.within = make(EMBED, HEADS, batch_first=True)
        self.across = make(EMBED, HEADS, batch_first=True)

    def forward(self, tokens, padding, **masks):
        hidden = self.within(tokens, tokens, tokens, padding, need_weights=False, **masks)[0]
        return self.across(tokens[:, :2] + 1, hidden, hidden, padding, need_weights=False)[0]


def aligned(model, divergence, *inputs, weight=1.0, masks=None, **settings):
    """An alignment after one pass, and its term."""
    alignment = Alignment(model, divergence, weight, **settings)
    with alignment.observe():
        model(*inputs, **(masks or {}))
    return alignment, alignment.loss()


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_term_is_the_sum_over_heads_of_means_over_sentences(reduction, model, tokens):
    """Mutants: a mean over heads (the published code), over pooled sentences, no weight."""
    factors = {"layers.1": [1.0, 0.0, 2.5], "layers.0": 0.5}
    alignment, found = aligned(
        model, energy_distance, tokens, weight=0.3, reduction=reduction, layer_weights=factors
    )
    with attention_calls(model) as calls:
        model(tokens)
    total = 0.0
    for name, row in (("layers.0", [0.5] * HEADS), ("layers.1", [1.0, 0.0, 2.5])):
        (call,) = calls[name]
        for head in range(HEADS):
            values = [energy_distance(call.query[i, head], call.key[i, head]) for i in range(BATCH)]
            total = total + row[head] * torch.stack(values).mean()
            torch.testing.assert_close(
                alignment.head_divergences[name][head], torch.stack(values).mean().detach()
            )
    total = total / (1.5 + 3.5) if reduction == "mean" else total
    torch.testing.assert_close(found, 0.3 * total)


@pytest.mark.parametrize("make", [nn.MultiheadAttention, MultiheadAttention])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_padding_takes_no_part(make, kind, tokens):
    """In self-attention neither as key nor as query; across, as key. Mutant: queries unmasked."""
    model = Padded(make)
    lengths = torch.tensor([7, 4, 5, 1, 6])
    padding = torch.arange(TOKENS) >= lengths[:, None]
    given = (
        padding if kind == "bool" else torch.zeros(padding.shape).masked_fill(padding, -torch.inf)
    )
    alignment, _ = aligned(model, energy_distance, tokens, given)
    with attention_calls(model) as calls:
        model(tokens, given)
    (within,), (across,) = calls["within"], calls["across"]
    for call, name in ((within, "within"), (across, "across")):
        values = []
        for i, length in enumerate(lengths):
            query = call.query[i, :, :length] if name == "within" else call.query[i]
            values.append(energy_distance(query, call.key[i, :, :length]))
        expected = torch.stack(values).mean(0).detach()
        torch.testing.assert_close(alignment.head_divergences[name], expected)


def test_content_of_padding_never_matters(tokens, generator):
    model = Padded(nn.MultiheadAttention)
    padding = torch.arange(TOKENS) >= torch.tensor([7, 4, 5, 1, 6])[:, None]
    gradients = []
    for filling in (torch.zeros(()), 50 * torch.randn(tokens.shape, generator=generator)):
        inputs = torch.where(padding[..., None], filling, tokens)
        model.zero_grad()
        _, loss = aligned(model.within, squared_mmd, inputs, inputs, inputs, padding)
        loss.backward()
        gradients.append([loss.detach(), model.within.in_proj_weight.grad.clone()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("hint", [True, False])
def test_causal_attention_keeps_all_tokens(hint, tokens):
    """Each query sees some key and each key is seen, so clouds are whole."""
    model = nn.MultiheadAttention(EMBED, HEADS, batch_first=True)
    mask = nn.Transformer.generate_square_subsequent_mask(TOKENS)
    inputs = (tokens, tokens, tokens)
    masks = {"attn_mask": mask, "is_causal": hint, "need_weights": not hint}
    alignment, _ = aligned(model, energy_distance, *inputs, masks=masks)
    plain, _ = aligned(model, energy_distance, *inputs)
    torch.testing.assert_close(alignment.head_divergences, plain.head_divergences)


def test_sentences_without_tokens_do_not_count(tokens):
    """Nor does anything in them. Mutants: a mean over all sentences, NaN."""
    model = MultiheadAttention(EMBED, HEADS, batch_first=True)
    padding = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
    padding[1] = True
    padding[3, 2:] = True
    kept = torch.tensor([0, 2, 3, 4])
    few, expected = aligned(model, energy_distance, *[tokens[kept]] * 3, padding[kept])
    tokens[1] = 1e3
    alignment, loss = aligned(model, energy_distance, *[tokens] * 3, padding)
    torch.testing.assert_close(alignment.head_divergences, few.head_divergences)
    loss.backward()
    found = model.in_proj_weight.grad.clone()
    model.zero_grad()
    expected.backward()
    torch.testing.assert_close(found, model.in_proj_weight.grad)
    _, loss = aligned(model, energy_distance, *[tokens] * 3, torch.ones_like(padding))
    assert loss == 0


@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
def test_queries_and_keys_move_and_nothing_else(divergence, model, tokens):
    """The published GAN cuts off the queries. Mutant: a detached query, or key."""
    _, loss = aligned(model, divergence, tokens, layers=["layers.0"])
    loss.backward()
    gradient = model.layers[0].in_proj_weight.grad
    queries, keys, values = gradient.split(EMBED)
    assert queries.abs().max() > 0
    assert keys.abs().max() > 0
    assert not values.any()
    assert model.readout.weight.grad is None


@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
def test_descending_brings_queries_and_keys_together(divergence, model, tokens):
    """By a yardstick of its own, also where critics ascend. Mutant: the sign of the term."""
    with torch.no_grad():
        for layer in model.layers:
            layer.in_proj_bias[:EMBED] += 1.0
    alignment = Alignment(model, divergence, 1.0)
    groups = [{"params": model.parameters()}, *alignment.parameter_groups(lr=0.05)]
    optimizer = torch.optim.Adam(groups, lr=0.003)

    def apart():
        with torch.no_grad():
            _, loss = aligned(model, energy_distance, tokens)
        return loss

    before = apart()
    for _ in range(100):
        optimizer.zero_grad()
        with alignment.observe():
            model(tokens)
        alignment.loss().backward()
        optimizer.step()
    assert apart() < 0.6 * before


def test_each_layer_and_head_has_its_own_adversary(model):
    alignment = Alignment(model, Adversarial)
    assert len(alignment.adversaries) == 2
    first, second = (part.discriminator[0].gate.weight for part in alignment.adversaries)
    assert first.shape == (HEADS, EMBED // HEADS, EMBED // HEADS)
    assert not torch.equal(first, second)
    again = Alignment(model, Adversarial)
    other = Alignment(model, Adversarial, seed=1)
    assert torch.equal(again.adversaries[0].discriminator[0].gate.weight, first)
    assert not torch.equal(other.adversaries[0].discriminator[0].gate.weight, first)


def test_adversaries_have_an_optimizer_s_settings_of_their_own(model):
    alignment = Alignment(model, Adversarial)
    (group,) = alignment.parameter_groups(lr=0.5, weight_decay=0.0)
    assert group["lr"] == 0.5
    assert group["params"] == list(alignment.parameters())
    assert Alignment(model, MMD()).parameter_groups(lr=0.5) == []
    own = {id(value) for value in alignment.parameters()}
    assert not own & {id(value) for value in model.parameters()}


class Tied(nn.Module):
    """One layer in three places, as in ALBERT."""

    def __init__(self):
        super().__init__()
        self.layer = TransformerEncoderLayer(EMBED, HEADS, 16, dropout=0.0, batch_first=True)

    def forward(self, tokens):
        for _ in range(3):
            tokens = self.layer(tokens)
        return tokens


def test_a_layer_in_several_places_counts_in_each(tokens):
    """With an adversary for each place. Mutants: one for all, places counted on over passes."""
    model = Tied()
    alignment, loss = aligned(model, energy_distance, tokens)
    names = ["layer.self_attn", "layer.self_attn[1]", "layer.self_attn[2]"]
    assert list(alignment.head_divergences) == names
    torch.testing.assert_close(
        loss.detach(), sum(part.sum() for part in alignment.head_divergences.values())
    )
    learned = Alignment(model, Adversarial, places=3)
    assert len(learned.adversaries) == 3
    with learned.observe():
        model(tokens[:2])
        model(tokens[2:])
    learned.loss().backward()
    assert all(value.grad.abs().max() > 0 for value in learned.parameters())
    few = Alignment(model, Adversarial, places={"layer.self_attn": 2})
    with few.observe():
        model(tokens)
    with pytest.raises(RuntimeError, match=r"called 3 times .* learns for 2"):
        few.loss()


def test_several_passes_are_one_batch(model, tokens):
    _, expected = aligned(model, energy_distance, tokens)
    alignment = Alignment(model, energy_distance, 1.0)
    with alignment.observe():
        model(tokens[:1])
        model(tokens[1:])
    torch.testing.assert_close(alignment.loss(), expected)
    with alignment.observe():
        model(tokens[:1])
    assert not torch.isclose(alignment.loss(), expected)


def test_weights_change_with_steps_and_are_kept(model, tokens):
    """Mutant: the step is not counted, or not saved."""
    alignment = Alignment(model, energy_distance, lambda step: 0.1 * step)
    losses = []
    for _ in range(3):
        with alignment.observe():
            model(tokens)
        losses.append(alignment.loss())
        alignment.step()
    torch.testing.assert_close(losses[2], 2 * losses[1])
    assert losses[0] == 0
    other = Alignment(model, energy_distance, lambda step: 0.1 * step)
    other.load_state_dict(alignment.state_dict())
    assert other.weight == alignment.weight == pytest.approx(0.3)


def test_what_learns_is_saved_and_copied(model, tokens):
    alignment = Alignment(model, ConditionalTransport.learned, 1.0)
    with torch.no_grad():
        for parameter in alignment.parameters():
            parameter += 0.1
    other = Alignment(model, ConditionalTransport.learned, 1.0)
    other.load_state_dict(alignment.state_dict())
    for one in (other, copy.deepcopy(other)):
        pairs = zip(one.parameters(), alignment.parameters(), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)
    with alignment.observe(), other.observe():
        model(tokens)
    assert torch.equal(alignment.loss(), other.loss())


def test_nothing_is_left_on_the_model(model, tokens):
    """The base model goes on as if there had been none: it is stripped by being forgotten."""

    def traces():
        return [
            (name, sorted(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks))
            for name, module in model.named_modules()
        ]

    before, expected = traces(), model(tokens)
    names = list(model.state_dict())
    alignment = Alignment(model, Adversarial)
    with alignment.observe():
        assert torch.equal(model(tokens), expected)
    assert traces() == before
    with pytest.raises(ZeroDivisionError), alignment.observe():
        raise ZeroDivisionError
    assert traces() == before
    assert list(model.state_dict()) == names
    assert torch.equal(model(tokens), expected)
    assert not any(name.startswith("layers") for name in alignment.state_dict())


def test_random_state_is_left_as_it_is(model, tokens):
    before = torch.random.get_rng_state()
    aligned(model, ConditionalTransport.learned, tokens)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("make", [nn.MultiheadAttention, MultiheadAttention])
def test_activation_checkpointing_changes_nothing(make, tokens):
    model = Padded(make)
    padding = torch.arange(TOKENS) >= torch.tensor([7, 4, 5, 1, 6])[:, None]
    alignment = Alignment(model, MMD(RBF(1.0)), 1.0)

    def gradients(run):
        model.zero_grad()
        with alignment.observe():
            output = run(model, tokens, padding)
        (output.square().sum() + alignment.loss()).backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    plain = gradients(lambda model, *inputs: model(*inputs))
    again = gradients(lambda model, *inputs: checkpoint(model, *inputs, use_reentrant=False))
    torch.testing.assert_close(again, plain, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="take use_reentrant=False"), alignment.observe():
        checkpoint(model, tokens.clone().requires_grad_(), padding, use_reentrant=True)


def test_without_gradients_it_measures(model, tokens):
    alignment = Alignment(model, energy_distance, 1.0)
    with torch.no_grad(), alignment.observe():
        model(tokens)
    loss = alignment.loss()
    assert not loss.requires_grad
    torch.testing.assert_close(loss, aligned(model, energy_distance, tokens)[1].detach())


def test_autocast_and_scaled_losses(tokens):
    """Clouds of a narrow type are compared in float32, in or out of autocast."""
    model = Classifier(EMBED, HEADS).float()
    alignment = Alignment(model, Adversarial, 1.0)
    inputs = tokens.float()
    with torch.autocast("cpu", torch.bfloat16):
        with alignment.observe():
            output = model(inputs)
        inside = alignment.loss()
    outside = alignment.loss()
    assert inside.dtype == torch.float32
    assert torch.equal(inside, outside)
    (1024 * (output.float().sum() + outside)).backward()
    assert all(value.grad.isfinite().all() for value in alignment.parameters())
    assert model.layers[0].in_proj_weight.grad.isfinite().all()


def test_pooling_has_one_query_a_head(generator):
    model = StructuredSelfAttention(EMBED, 4, HEADS)
    tokens = torch.randn(BATCH, TOKENS, EMBED, generator=generator)
    for divergence in (energy_distance, Adversarial):
        alignment, loss = aligned(model, divergence, tokens)
        loss.backward()
        assert alignment.head_divergences[""].shape == (HEADS,)
    assert model.query_weight.grad.abs().max() > 0


@pytest.mark.compile
def test_compiled_models_run_as_written_while_observed(model, tokens):
    _, expected = aligned(model, energy_distance, tokens)
    with undone_compilation():
        compiled = torch.compile(model, backend="aot_eager")
        output = compiled(tokens)
        _, loss = aligned(compiled, energy_distance, tokens)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(compiled(tokens), output)


def test_training_with_and_without_differs_by_the_term_alone(model, tokens):
    """Weight zero is the base model's training, step for step."""
    other = copy.deepcopy(model)
    alignment = Alignment(model, MMD(RBF(1.0)), 0.0)
    for network, term in ((model, alignment), (other, None)):
        optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            if term is None:
                loss = network(tokens).square().mean()
            else:
                with term.observe():
                    loss = network(tokens).square().mean()
                loss = loss + term.loss()
            loss.backward()
            optimizer.step()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"divergence": 3}, "divergence: expected one of bayesattn.divergences, or what makes"),
        ({"divergence": lambda: None}, "divergence: expected one of bayesattn.divergences"),
        ({"divergence": MMD}, "divergence: expected an object, such as MMD"),
        ({"weight": -0.1}, "weight: expected a finite number, not negative, got -0.1"),
        ({"weight": lambda step: float("nan")}, "weight: expected a finite number"),
        ({"reduction": "max"}, "reduction: expected 'sum' or 'mean', got 'max'"),
        ({"layers": ["layers.7"]}, "layers: expected some of layers.0, layers.1, got 'layers.7'"),
        ({"layers": "layers.0"}, "layers: expected a sequence of names"),
        ({"layers": []}, "layers: expected a sequence of names"),
        ({"layer_weights": {"x": 1}}, "layer_weights: expected some of layers.0, layers.1"),
        (
            {"layer_weights": {"layers.0": [1, 2]}},
            "expected one number, or 3, for 'layers.0', got 2",
        ),
        ({"layer_weights": {"layers.0": -1}}, "'layers.0': expected a finite number, not negative"),
        (
            {"layer_weights": {"layers.0": 0, "layers.1": 0}},
            "expected a positive number, got zeros",
        ),
        (
            {"places": 0},
            "places: expected at least one, got 0",
        ),
        ({"places": {"x": 1}}, "places: expected some of"),
    ],
)
def test_refuses(settings, message, model):
    settings = {"divergence": Adversarial, **settings}
    with pytest.raises(ValueError, match=message):
        Alignment(model, **settings)


class Crossing(nn.Module):
    """Queries and keys are one tensor with positions added, values are without, as in DETR."""

    def __init__(self, make):
        super().__init__()
        self.layer = make(EMBED, HEADS, batch_first=True)

    def forward(self, query, key, value, padding):
        return self.layer(query, key, value, padding, need_weights=False)[0]


@pytest.mark.parametrize("make", [nn.MultiheadAttention, MultiheadAttention])
@pytest.mark.parametrize("way", ["one tensor", "two views"])
def test_self_attention_with_other_values_leaves_padded_queries_out(make, way, tokens):
    """Mutant: self-attention only where values are the same tensor too."""
    model = Crossing(make)
    padding = torch.arange(TOKENS) >= torch.tensor([[7], [4], [2], [7], [5]])
    found = []
    for filling in (0.0, 100.0):
        query = torch.where(padding[..., None], filling, tokens)
        key = query if way == "one tensor" else query[:]
        found.append(aligned(model, energy_distance, query, key, query + 1, padding)[1])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("make", [nn.MultiheadAttention, MultiheadAttention])
def test_a_mask_of_queries_tells_of_padding_in_attention_to_other_tokens(make, tokens):
    model = Crossing(make)
    padding = torch.zeros(BATCH, TOKENS - 1, dtype=torch.bool)
    real = torch.arange(TOKENS) < torch.tensor([[7], [4], [2], [7], [5]])
    found = []
    for filling in (0.0, 100.0):
        query = torch.where(real[..., None], tokens, filling)
        alignment = Alignment(model, energy_distance)
        with alignment.observe(query_mask=real):
            model(query, tokens[:, 1:], tokens[:, 1:], padding)
        found.append(alignment.loss())
    torch.testing.assert_close(*found)
    _, without = aligned(model, energy_distance, query, tokens[:, 1:], tokens[:, 1:], padding)
    assert (without - found[0]).abs() > 1e-3


def test_what_was_used_is_copied_without_its_calls(model, tokens):
    """Mutant: calls in copies, which are tensors within a graph."""
    both = nn.ModuleDict({"model": model, "alignment": Alignment(model, Adversarial)})
    with both["alignment"].observe():
        model(tokens)
    expected = both["alignment"].loss()
    copied = copy.deepcopy(both)
    with pytest.raises(RuntimeError, match="of the very model that it was made with"):
        copied["alignment"].loss()
    with copied["alignment"].observe():
        copied["model"](tokens)
    torch.testing.assert_close(copied["alignment"].loss(), expected)


def test_what_learned_for_one_layer_is_not_loaded_for_another(model):
    state = Alignment(model, Adversarial).state_dict()
    turned = Alignment(model, Adversarial, layers=["layers.1", "layers.0"])
    with pytest.raises(ValueError, match=r"expected what learns for \['layers\.1\[0\]'"):
        turned.load_state_dict(state)
    with pytest.raises(ValueError, match="state_dict: expected that of an Alignment"):
        turned.set_extra_state({"foo": 1})


@pytest.mark.usefixtures("unchecked_types")
def test_a_weight_that_would_be_learned_is_refused(model):
    with pytest.raises(ValueError, match="weight: expected a number, or a function of the steps"):
        Alignment(model, MMD(), nn.Parameter(torch.ones(())))


@pytest.mark.usefixtures("unchecked_types")
def test_refuses_models_without_attention_and_passes_without_calls(model, tokens):
    with pytest.raises(ValueError, match="model: expected attention layers, found none"):
        Alignment(nn.Linear(2, 2), Energy())
    alignment = Alignment(model, Energy())
    with pytest.raises(RuntimeError, match="needs a call of the model within observe"):
        alignment.loss()
    with alignment.observe():
        model.layers[0](tokens, tokens, tokens)
    assert list(alignment.head_divergences) == []
    alignment.loss()
    assert list(alignment.head_divergences) == ["layers.0"]
    with alignment.observe():
        pass
    with pytest.raises(RuntimeError, match="needs a call"):
        alignment.loss()


@pytest.mark.parametrize(
    "divergence",
    [MMD(), Energy(), ConditionalTransport(), SlicedWasserstein(seed=0), SinkhornDivergence()],
    ids=lambda divergence: type(divergence).__name__,
)
def test_nothing_waits_for_the_device(divergence):
    """Tensors without data refuse to tell a number. Mutant: masks that are looked at."""
    with FakeTensorMode():
        model = Classifier(EMBED, HEADS)
        alignment = Alignment(model, divergence, 0.3)
        for _ in range(2):
            with alignment.observe():
                loss = model(torch.randn(BATCH, TOKENS, EMBED)).square().mean()
            (loss + alignment.loss()).backward()
