"""Tests of bayesattn.networks on Hugging Face's models, built small and at random: no downloads."""

import copy
import importlib
from contextlib import nullcontext
from typing import ClassVar

import pytest
import torch
from torch import nn

from bayesattn.attention_diagnostics import layer_statistics
from bayesattn.networks import (
    HeadLayout,
    HeadSlice,
    ProjectionSlices,
    attention_calls,
    attention_layers,
    head_partitions,
    recognition,
    register_attention_layer,
)
from tests.networks.perturbation import (
    assert_output_particles_are_heads,
    assert_particles_are_heads,
)

pytestmark = pytest.mark.slow  # Importing transformers takes some seconds.

BATCH, TOKENS, LAYERS, WORDS = 2, 7, 2, 31
_TEXT = {"vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BERT = {
    **_TEXT,
    "hidden_size": 15,
    "num_attention_heads": 3,
    "num_hidden_layers": LAYERS,
    "intermediate_size": 11,
    "max_position_embeddings": 13,
}
_GPT2 = {**_TEXT, "n_embd": 15, "n_head": 3, "n_layer": LAYERS, "n_positions": 13}
_DROPOUT = {"attn_pdrop": 0.4, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
# Class of the model, settings, and names of the layers.
MODELS = {
    "bert": ("BertModel", _BERT, "encoder.layer.{}.attention"),
    "roberta": ("RobertaModel", _BERT, "encoder.layer.{}.attention"),
    "vit": (
        "ViTModel",
        {
            "hidden_size": 15,
            "num_attention_heads": 3,
            "num_hidden_layers": LAYERS,
            "intermediate_size": 11,
            "image_size": 6,
            "patch_size": 3,
        },
        "layers.{}.attention",
    ),
    "distilbert": (
        "DistilBertModel",
        {
            **_TEXT,
            "dim": 15,
            "n_heads": 3,
            "n_layers": LAYERS,
            "hidden_dim": 11,
            "max_position_embeddings": 13,
        },
        "transformer.layer.{}.attention",
    ),
    # One layer in all places.
    "albert": (
        "AlbertModel",
        {**_BERT, "embedding_size": 5},
        "encoder.albert_layer_groups.0.albert_layers.0.attention",
    ),
    "gpt2": ("GPT2Model", _GPT2, "h.{}.attn"),
    "llama": (
        "LlamaModel",
        {
            **_TEXT,
            "hidden_size": 24,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 4,
            "num_hidden_layers": LAYERS,
            "intermediate_size": 11,
            "attention_bias": True,
        },
        "layers.{}.self_attn",
    ),
}
CAUSAL = ("gpt2", "llama")


def build(kind, implementation="eager", **more):
    """A model in evaluation all of whose parameters count, and the names of its layers."""
    cls, settings, layer_name = MODELS[kind]
    transformers = importlib.import_module("transformers")
    model_class = getattr(transformers, cls)
    config = model_class.config_class(
        **settings, **more, attn_implementation=implementation, use_cache=False
    )
    model = model_class(config).to(torch.float64).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model, list(dict.fromkeys(layer_name.format(place) for place in range(LAYERS)))


def inputs(kind, generator, *, padded=True):
    if kind == "vit":
        return {"pixel_values": torch.randn(BATCH, 3, 6, 6, generator=generator)}
    words = torch.randint(3, WORDS, (BATCH, TOKENS), generator=generator)
    if not padded:
        return {"input_ids": words}
    return {"input_ids": words, "attention_mask": (~padding(kind)).long()}


def padding(kind):
    lengths = torch.tensor([[TOKENS], [4]])
    return torch.arange(TOKENS) >= lengths


def runner(kind, generator, **more):
    given = inputs(kind, generator, **more)
    return lambda model: model(**given)


@pytest.mark.parametrize("kind", MODELS)
def test_particles_are_heads(kind, generator):
    """With fewer heads of keys and values a particle of theirs belongs to a run of query heads."""
    model, names = build(kind, "sdpa")
    assert list(attention_layers(model)) == names
    run = runner(kind, generator)
    assert_particles_are_heads(model, run, generator)
    assert_output_particles_are_heads(model, run, generator)
    for partition in head_partitions(model, ("query", "key", "value", "output"), biases=True):
        before = copy.deepcopy(model.state_dict())
        partition.write(partition.particles())
        assert all(torch.equal(before[name], part) for name, part in model.state_dict().items())


def test_sizes_of_grouped_heads():
    model, names = build("llama")
    query, key, value = attention_layers(model)[names[0]].partitions()
    (joint,) = attention_layers(model)[names[0]].partitions(joint=True)
    assert [p.num_heads for p in (query, key, value, joint)] == [6, 2, 2, 2]
    assert [p.dim for p in (query, key, value, joint)] == [96, 96, 96, 480]
    for partition in (query, key, value):
        assert partition.particles().data_ptr() == partition.parameters[0].data_ptr()


def test_columns_of_packed_projections():
    """GPT-2's are columns, so particles are copies; its output's are rows, and a view."""
    model, names = build("gpt2")
    layer = attention_layers(model)[names[1]]
    weight = layer.module.c_attn.weight.detach()
    key = layer.partitions(("key",))[0]
    assert torch.equal(key.particles()[1], weight[:, 20:25].mT.flatten())
    output = layer.partitions(("output",))[0]
    assert output.particles().data_ptr() == layer.module.c_proj.weight.data_ptr()


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", MODELS)
def test_calls_are_what_happened(kind, implementation, padded, generator):
    """Weights are those that the model returns, and the model's own outputs do not change."""
    model, names = build(kind, implementation)
    eager, _ = build(kind)
    eager.load_state_dict(model.state_dict())
    given = inputs(kind, generator, padded=padded)
    with torch.no_grad():
        expected = model(**given).last_hidden_state
        with attention_calls(model) as calls:
            found = model(**given).last_hidden_state
        weights = eager(**given, output_attentions=True).attentions
    assert torch.equal(found, expected)
    assert list(calls) == names
    in_order = [call for of_layer in calls.values() for call in of_layer]
    for call, of_eager in zip(in_order, weights, strict=True):
        torch.testing.assert_close(call.weights(), of_eager)
        repeats = call.query.shape[1] // call.value.shape[1]
        value = call.value.repeat_interleave(repeats, 1)
        torch.testing.assert_close(call.weights() @ value, call.head_outputs)


def test_queries_are_the_projected_ones(generator):
    model, names = build("bert", "sdpa")
    given = inputs("bert", generator)
    with attention_calls(model) as calls:
        states = model(**given, output_hidden_states=True).hidden_states
    for place, name in enumerate(names):
        projection = model.get_submodule(name).self
        (call,) = calls[name]
        for role in ("query", "key", "value"):
            features = getattr(projection, role)(states[place])
            expected = features.unflatten(-1, (3, 5)).transpose(1, 2)
            torch.testing.assert_close(getattr(call, role), expected)
    calls[names[1]][0].weights().square().sum().backward()
    assert model.get_submodule(names[0]).self.query.weight.grad.abs().min() > 0


def test_dropout_is_as_it_was(generator):
    model, names = build("gpt2", **_DROPOUT)
    model.train()
    given = inputs("gpt2", generator)
    torch.manual_seed(5)
    expected = model(**given).last_hidden_state
    torch.manual_seed(5)
    with attention_calls(model) as calls:
        found = model(**given).last_hidden_state
    assert torch.equal(found, expected)
    (call,) = calls[names[0]]
    assert not torch.allclose(call.weights() @ call.value, call.head_outputs)


def registries():
    """What the registries hold; the configurations are the models' own."""
    modeling = importlib.import_module("transformers.modeling_utils")
    masking = importlib.import_module("transformers.masking_utils")
    interfaces = (modeling.AttentionInterface, masking.AttentionMaskInterface)
    return [dict(interface()) for interface in interfaces]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_nothing_is_left_behind(implementation, generator):
    model, names = build("bert", implementation)
    before, config = registries(), copy.deepcopy(model.config)
    given = inputs("bert", generator)
    with attention_calls(model) as calls:
        assert registries() != before
        assert model.config._attn_implementation != implementation
        with attention_calls(model) as inner:
            model(**given)
    assert registries() == before
    assert model.config._attn_implementation == implementation
    assert model.config.to_dict() == config.to_dict()
    assert [len(calls[names[0]]), len(inner[names[0]])] == [1, 1]
    torch.testing.assert_close(inner[names[0]][0].weights(), calls[names[0]][0].weights())
    model(**given)
    assert len(calls[names[0]]) == 1
    with pytest.raises(RuntimeError, match="broken"), attention_calls(model):
        raise RuntimeError("broken")
    assert registries() == before
    assert model.config._attn_implementation == implementation


def test_contexts_within_contexts_know_what_is_causal(generator):
    """Without a mask it depends on the implementation, whose name the outer context hides."""
    model, names = build("llama", "sdpa")
    given = inputs("llama", generator, padded=False)
    with attention_calls(model), attention_calls(model) as calls:
        model(**given)
    weights = calls[names[0]][0].weights()
    assert not weights.triu(1).any()
    torch.testing.assert_close(weights.sum(-1), torch.ones(BATCH, 6, TOKENS))


def test_an_implementation_chosen_inside_stays(generator):
    model, names = build("bert", "sdpa")
    given = inputs("bert", generator)
    with attention_calls(model) as calls:
        model(**given)
        model.set_attn_implementation("eager")
        model(**given)
    assert model.config._attn_implementation == "eager"
    assert len(calls[names[0]]) == 1


def test_two_models_of_one_configuration(generator):
    """Of a model that is not watched nothing is recorded."""
    model, names = build("bert", "sdpa")
    other = type(model)(model.config).to(torch.float64)
    given = inputs("bert", generator)
    with attention_calls(model) as calls:
        other(**given)
        assert not any(calls.values())
        model(**given)
    assert [len(calls[name]) for name in names] == [1, 1]


def test_cached_keys(generator):
    """In generation a query meets the keys of earlier calls."""
    model, names = build("llama", "sdpa")
    model.config.use_cache = True
    words = inputs("llama", generator, padded=False)["input_ids"]
    with torch.no_grad(), attention_calls(model) as calls:
        first = model(words[:, :-1])
        cached = getattr(first, "cache", None) or first.past_key_values
        name = "cache" if hasattr(first, "cache") else "past_key_values"
        model(words[:, -1:], **{name: cached})
        model(words)
    first, second, whole = calls[names[1]]
    assert second.query.shape[-2] == 1
    assert second.key.shape[-2] == TOKENS
    torch.testing.assert_close(second.weights(), whole.weights()[..., -1:, :])
    torch.testing.assert_close(second.head_outputs, whole.head_outputs[..., -1:, :])


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_cross_attention(kind, generator):
    more = {"is_decoder": True, "add_cross_attention": True}
    model, _ = build(kind, "sdpa", **more)
    place, own = {"bert": ("encoder.layer", "attention"), "gpt2": ("h", "attn")}[kind]
    names = [f"{place}.{i}.{name}" for i in range(LAYERS) for name in (own, "crossattention")]
    assert list(attention_layers(model)) == names
    states = torch.randn(BATCH, 5, 15, generator=generator)
    given = inputs(kind, generator)
    with attention_calls(model) as calls:
        model(**given, encoder_hidden_states=states)
    (call,) = calls[names[1]]
    assert call.weights().shape == (BATCH, 3, TOKENS, 5)
    torch.testing.assert_close(call.weights() @ call.value, call.head_outputs)

    def run(model):
        return model(**given, encoder_hidden_states=states)

    assert_particles_are_heads(model, run, generator)


def test_second_way_of_gpt2(generator):
    """It goes by the name "eager", which the context hides, and counts in higher precision."""
    model, names = build("gpt2", reorder_and_upcast_attn=True)
    model = model.bfloat16()
    given = inputs("gpt2", generator)
    with torch.no_grad():
        expected = model(**given).last_hidden_state
        with attention_calls(model) as calls:
            found = model(**given).last_hidden_state
    assert torch.equal(found, expected)
    (call,) = calls[names[0]]
    outputs = call.weights() @ call.value
    torch.testing.assert_close(outputs, call.head_outputs, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_scale_of_the_logits(implementation, generator):
    """GPT-2 may divide by the layer's place too."""
    more = {"scale_attn_by_inverse_layer_idx": True}
    model, names = build("gpt2", implementation, **more)
    given = inputs("gpt2", generator)
    with torch.no_grad(), attention_calls(model) as calls:
        model(**given)
    for place, name in enumerate(names):
        (call,) = calls[name]
        assert call.settings["scale"] == pytest.approx(5**-0.5 / (place + 1))
        torch.testing.assert_close(call.weights() @ call.value, call.head_outputs)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_causal_layers_without_a_mask(implementation, nested, generator):
    """Then "eager" sees all keys, "sdpa" the earlier ones; also beneath another context."""
    model, names = build("llama", implementation)
    module = model.get_submodule(names[0])
    states = torch.randn(BATCH, TOKENS, 24, generator=generator)
    positions = model.rotary_emb(states, torch.arange(TOKENS)[None])
    with attention_calls(module) if nested else nullcontext(), attention_calls(module) as calls:
        module(states, position_embeddings=positions)
    (call,) = calls[""]
    assert bool(call.weights().triu(1).any()) == (implementation == "eager")
    value = call.value.repeat_interleave(3, 1)
    # Llama's eager softmax is in float32.
    outputs = call.weights() @ value
    torch.testing.assert_close(outputs, call.head_outputs, rtol=1e-5, atol=1e-6)


def test_configurations_within_a_configuration_stay():
    model, _ = build("bert", "sdpa")
    outer = type(model.config)

    class Composite(outer):
        sub_configs: ClassVar = {"inner": outer}

    inner = copy.deepcopy(model.config)
    inner._attn_implementation = "eager"
    model.config.__class__ = Composite
    model.config.inner = inner
    with attention_calls(model):
        assert inner._attn_implementation == "eager"
    assert (model.config._attn_implementation, inner._attn_implementation) == ("sdpa", "eager")


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_statistics(kind, implementation, generator):
    """Padding is left out by either implementation, though one says so in numbers."""
    model, names = build(kind, implementation)
    given = inputs(kind, generator)
    with torch.no_grad(), layer_statistics(model) as statistics:
        model(**given)
    assert list(statistics) == names
    entry = statistics[names[1]]
    assert torch.equal(entry.key_mask, ~padding(kind)[:, None].expand(entry.key_mask.shape))
    total = entry.column_mass.sum(-1)
    torch.testing.assert_close(total, torch.full_like(total, float(TOKENS)))


def test_single_attention_modules(generator):
    """Without the block around it BERT's has no output projection."""
    model, names = build("bert")
    module = model.get_submodule(names[0]).self
    layer = attention_layers(module)[""]
    assert set(layer.layout) == {"query", "key", "value"}
    states = torch.randn(BATCH, TOKENS, 15, generator=generator)
    with attention_calls(module) as calls:
        output, weights = module(states)
    torch.testing.assert_close(calls[""][0].weights(), weights)
    torch.testing.assert_close(calls[""][0].head_outputs.transpose(1, 2).flatten(2), output)


def test_subclasses_and_registered_layers(generator, monkeypatch):
    """A subclass is its parent's kind; a registered layer that calls the interface needs no tap."""
    monkeypatch.setattr(recognition, "_registered", {})
    model, names = build("bert", "sdpa")
    module = model.get_submodule(names[0])
    module.__class__ = type("Mine", (type(module),), {})
    given = inputs("bert", generator)
    assert list(attention_layers(model)) == names
    weight = HeadSlice("self.query.weight", 0, 0, 5, 3)
    layout = HeadLayout(query=ProjectionSlices(weight))
    register_attention_layer(type(module), lambda layer: layout)
    with attention_calls(model) as calls:
        model(**given)
    assert [len(calls[name]) for name in names] == [1, 1]
    assert set(attention_layers(model)[names[0]].layout) == {"query"}


def test_early_vit():
    """Before transformers 5.9 or so its projections had BERT's names, in a module of their own."""
    modeling = importlib.import_module("transformers.models.vit.modeling_vit")
    model, names = build("vit")
    current = model.get_submodule(names[0])
    early = nn.Module()
    early.attention, early.output = nn.Module(), nn.Module()
    for name, part in {"query": "q_proj", "key": "k_proj", "value": "v_proj"}.items():
        setattr(early.attention, name, getattr(current, part))
    early.attention.attention_head_size = 5
    early.output.dense = current.o_proj
    early.__class__ = type("Early", (modeling.ViTAttention,), {})
    for role in ("query", "output"):
        (expected,) = attention_layers(current)[""].partitions((role,), biases=True)
        (found,) = attention_layers(early)[""].partitions((role,), biases=True)
        assert torch.equal(found.particles(), expected.particles())
    early.__class__ = nn.Module
    early.attention.__class__ = type("Other", (modeling.ViTAttention,), {})
    del early.attention.key
    assert attention_layers(early) == {}


def test_what_cannot_be_recorded(generator, monkeypatch):
    modeling = importlib.import_module("transformers.modeling_utils")
    model, names = build("bert", "sdpa")
    before = registries()
    for implementation in ("flash_attention_2", "flex_attention", "no such thing"):
        model.config._attn_implementation = implementation
        wrong = pytest.raises(ValueError, match=f"eager, sdpa or one's own, got {implementation}")
        with wrong, attention_calls(model):
            pass
        assert model.config._attn_implementation == implementation
    assert registries() == before
    stock = modeling.AttentionInterface()["sdpa"]

    def own(*args, softcap=None, **kwargs):
        return stock(*args, **kwargs)

    given = inputs("bert", generator, padded=False)
    mapping = dict(modeling.AttentionInterface._global_mapping)
    monkeypatch.setattr(modeling.AttentionInterface, "_global_mapping", mapping)
    modeling.AttentionInterface.register("own", own)
    model.config._attn_implementation = "own"
    with attention_calls(model) as calls:
        model(**given)
        module = model.get_submodule(names[0]).self
        states = torch.randn(BATCH, TOKENS, 15, generator=generator)
        with pytest.raises(ValueError, match="softcap cannot be recorded"):
            module(states, torch.ones(BATCH, TOKENS, dtype=torch.bool)[:, None, None], softcap=1.0)
    assert [len(calls[name]) for name in names] == [1, 1]
