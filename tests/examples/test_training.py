"""Training under a budget: batches, schedule, and choices by the validation part alone."""

import pytest
import torch
from torch import nn

from bayesattn import calibration
from bayesattn.encoder import TransformerEncoderLayer
from examples.reproduce.text_classifier import TextClassifier
from examples.reproduce.text_tasks import Sentences
from examples.reproduce.training import Budget, predict, shuffled_batches, train


def labeled(generator, number):
    """Sentences of words 1 to 6 of any length up to 7; the first word tells the class."""
    tokens = torch.randint(1, 7, (number, 7), generator=generator)
    lengths = torch.randint(1, 8, (number,), generator=generator)
    mask = torch.arange(7) < lengths[:, None]
    tokens = tokens * mask
    return Sentences(tokens, mask, (tokens[:, 0] + 1) % 3)


def classifier(layers=1):
    def layer():
        return TransformerEncoderLayer(8, 2, 11, dropout=0.0, batch_first=True)

    return TextClassifier(7, 3, layer, num_layers=layers, dim=8, max_tokens=7)


def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return classifier()


class Bag(nn.Module):
    """A classifier that counts words; its steps can be followed by hand."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(7, 3))
        self.bias = nn.Parameter(torch.zeros(3))

    def forward(self, tokens, mask):
        return (self.weight[tokens] * mask[..., None]).sum(1) + self.bias


def test_batches_hold_each_sentence_once_with_others_of_its_length(generator):
    """Mutants: a pool that is not sorted; batches that are not shuffled."""
    lengths = torch.randint(1, 40, (1009,), generator=generator)
    batches = shuffled_batches(lengths, 16, generator)
    assert torch.cat(batches).sort().values.equal(torch.arange(1009))
    assert sorted(map(len, batches)) == [1] + [16] * 63
    spread = torch.stack([lengths[b].double().std() for b in batches if len(b) > 1]).mean()
    assert spread < lengths.double().std() / 4
    means = torch.tensor([lengths[b].double().mean() for b in batches])
    assert torch.corrcoef(torch.stack([means, torch.arange(64.0)]))[0, 1].abs() < 0.5
    assert not torch.cat(shuffled_batches(lengths, 16, generator)).equal(torch.cat(batches))


def test_training_learns_and_chooses_by_validation(generator):
    """Mutants: the last epoch, or the worst, in place of the best; its score but another state."""
    training, validation = labeled(generator, 211), labeled(generator, 101)
    budget = Budget(4, learning_rates=(1e-4, 3e-2), batch_size=16)
    trained = train(seeded, training, validation, budget, 0)
    scores = [
        (score, float(rate), epoch)
        for rate, curve in trained.curves.items()
        for epoch, score in enumerate(curve, 1)
    ]
    assert len(scores) == 8
    score, rate, epoch = max(scores)
    assert trained.choices == {
        "learning_rate": rate,
        "epoch": epoch,
        "validation_log_score": score,
    }
    probabilities = predict(trained.model, validation)
    assert calibration.log_score(probabilities, validation.label).item() == pytest.approx(score)
    # Guessing the most frequent class is right in two of five.
    assert calibration.accuracy(probabilities, validation.label) > 0.6
    assert max(trained.curves["0.0001"]) < -0.5


def test_every_rate_and_rival_meets_the_same_batches(generator):
    """Mutant: an order that goes on from one learning rate to the next."""
    training, met = labeled(generator, 53), []

    def loss(model, batch):
        met.append(batch.tokens)
        return nn.functional.cross_entropy(model(batch.tokens, batch.mask), batch.label)

    budget = Budget(2, learning_rates=(0.1, 0.2), batch_size=16)
    train(Bag, training, training, budget, 3, loss=loss)
    train(seeded, training, training, budget, 3, loss=loss)
    assert len(met) == 2 * 2 * 2 * 4
    first = met[:8]
    for start in (8, 16, 24):
        assert all(map(torch.equal, first, met[start : start + 8]))
    assert not all(
        a.shape == b.shape and a.equal(b) for a, b in zip(first[:4], first[4:], strict=True)
    )


def test_learning_rate_rises_and_falls(generator):
    """Adam's steps under a constant gradient are the learning rate: a schedule read off weights."""
    training = labeled(generator, 40)
    biases = []

    def loss(model, batch):
        biases.append(model.bias.detach().clone())
        return model.bias.sum() + 0.0 * model.weight.sum()

    budget = Budget(10, learning_rates=(0.1,), batch_size=20, warmup=0.2)
    train(Bag, training, training, budget, 0, loss=loss)
    steps = -torch.stack(biases).diff(dim=0)[:, 0]
    expected = [0.1 * min((step + 1) / 4, (20 - step) / 16) for step in range(19)]
    torch.testing.assert_close(steps, torch.tensor(expected), rtol=1e-5, atol=0)


def test_what_is_attached_meets_gradients_before_they_are_clipped(generator):
    """Mutants: called after the clipping, or once in all; counts of steps of an epoch."""
    training, seen = labeled(generator, 53), []

    def attach(model, optimizer, num_steps):
        seen.append((num_steps, []))
        return lambda: seen[-1][1].append(float(nn.utils.get_total_norm([model.bias.grad])))

    def loss(model, batch):
        return 100.0 * model.bias.sum() + 0.0 * model.weight.sum()

    budget = Budget(2, learning_rates=(0.1, 0.2), batch_size=16)
    train(Bag, training, training, budget, 0, loss=loss, attach=attach)
    assert [(number, len(norms)) for number, norms in seen] == [(8, 8)] * 2
    assert seen[1][1] == pytest.approx([100 * 3**0.5] * 8)


def test_early_epochs_may_be_left_out(generator):
    """Mutants: an epoch counted from zero; states of another learning rate."""
    training = labeled(generator, 53)
    budget = Budget(3, learning_rates=(0.5, 0.3), batch_size=16)
    free = train(Bag, training, training, budget, 0)
    late = train(Bag, training, training, budget, 0, first_epoch=3)
    assert late.curves == free.curves
    assert late.choices["epoch"] == 3
    assert late.choices["validation_log_score"] == max(curve[2] for curve in late.curves.values())
    for trained in (free, late):
        model, curve = Bag(), trained.curves[str(trained.choices["learning_rate"])]
        assert len(trained.states) == 3
        for state, score in zip(trained.states, curve, strict=True):
            model.load_state_dict(state)
            found = calibration.log_score(predict(model, training), training.label)
            assert found.item() == pytest.approx(score)
        chosen = trained.states[int(trained.choices["epoch"]) - 1]
        assert torch.equal(trained.model.bias, chosen["bias"])
    with pytest.raises(ValueError, match="expected 4 epochs at least"):
        train(Bag, training, training, budget, 0, first_epoch=4)


def test_only_matrices_decay(generator):
    """Mutant: decay of all parameters, which pulls a hybrid's share to one half."""
    training = labeled(generator, 40)

    def build():
        model = Bag()
        for value in model.parameters():
            value.data += 1.0
        return model

    def loss(model, batch):
        return 0.0 * sum(value.sum() for value in model.parameters())

    budget = Budget(2, learning_rates=(0.1,), batch_size=20, weight_decay=0.5)
    model = train(build, training, training, budget, 0, loss=loss).model
    assert torch.equal(model.bias, torch.ones(3))
    assert (model.weight < 0.99).all()


def test_predictions_are_in_order_and_padding_does_not_matter(generator):
    """Mutants: rows as sorted by length; a mean over the padding too."""
    sentences, model = labeled(generator, 31), seeded().eval()
    together = predict(model, sentences, batch_size=8)
    for row in range(31):
        alone = sentences.choose(torch.tensor([row]))
        torch.testing.assert_close(predict(model, alone)[0], together[row])


def test_dropout_is_off_in_predictions(generator):
    sentences, model = labeled(generator, 31), seeded().train()
    assert torch.equal(predict(model, sentences), predict(model.train(), sentences))
