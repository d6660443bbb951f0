"""What a head's particle is: moved alone, it moves the outputs of its own head and of no other."""

from contextlib import contextmanager

import torch

from bayesattn.networks import attention_calls, attention_layers

INPUT_ROLES = ("query", "key", "value")


def assert_particles_are_heads(model, run, generator):
    """Move each particle of each layer by itself, in every partition.

    Args:
        model: With attention layers.
        run: Calls it.
        generator: Of the moves.
    """
    layers = attention_layers(model)
    assert layers
    before = calls_of(model, run)
    for name, layer in layers.items():
        roles = tuple(role for role in INPUT_ROLES if role in layer.layout)
        # Where a layer stands in several places, only its first call is given what it was.
        before_call = before[name][0]
        for biases in (False, True):
            partitions = layer.partitions(roles, biases=biases)
            for partition in [*partitions, *layer.partitions(roles, joint=True, biases=biases)]:
                for head in range(partition.num_heads):
                    with moved(partition, head, generator):
                        call = calls_of(model, run)[name][0]
                    changed = (call.head_outputs - before_call.head_outputs).abs() > 1e-9
                    heads = changed.any(-1).any(-1).any(0)
                    belongs = torch.arange(len(heads)) // (len(heads) // partition.num_heads)
                    assert torch.equal(heads, belongs == head), (partition.name, head)


def assert_output_particles_are_heads(model, run, generator):
    """Move each head's part of the output projection, and see what that adds: its outputs times it.

    Biases of the output belong to no head, so partitions with them are those without.
    """
    for name, layer in attention_layers(model).items():
        (partition,) = layer.partitions(("output",), biases=True)
        call, before = projected(model, run, layer)
        width = layer.layout["output"].weight.width
        for head in range(partition.num_heads):
            particle = partition.particles()[head].clone()
            with moved(partition, head, generator):
                change = (partition.particles()[head] - particle).view(width, -1)
                after_call, after = projected(model, run, layer)
            assert torch.equal(after_call.head_outputs, call.head_outputs), name
            # The heads of one layer are the last axis but one of what it is given.
            expected = call.head_outputs[:, head] @ change
            torch.testing.assert_close((after - before).view(expected.shape), expected)


@contextmanager
def moved(partition, head, generator):
    """Add draws to one particle while the context lasts."""
    before = partition.particles().clone()
    after = before.clone()
    after[head] += torch.randn(after.shape[1], generator=generator)
    partition.write(after)
    try:
        yield
    finally:
        partition.write(before)


def calls_of(model, run):
    with torch.no_grad(), attention_calls(model) as calls:
        run(model)
    return calls


def projected(model, run, layer):
    """Call of a layer, and what its output projection gave: the layer, where that is no module."""
    owner = layer.layout["output"].weight.parameter.rpartition(".")[0]
    seen = {}
    modules = {"owner": layer.module.get_submodule(owner), "layer": layer.module}

    def keeping(key):
        def keep(_, args, output):
            seen.setdefault(key, output)

        return keep

    hooks = [module.register_forward_hook(keeping(key)) for key, module in modules.items()]
    calls = calls_of(model, run)
    for hook in hooks:
        hook.remove()
    output = seen.get("owner", seen["layer"])
    return calls[layer.name][0], output[0] if isinstance(output, tuple) else output
