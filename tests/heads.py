"""Small networks with attention, batches of their heads, and forces written as loops."""

import math

import torch
from torch import nn

from bayesattn.networks import head_batches, head_partitions


class Classifier(nn.Module):
    """Two attention layers, a residual stream and a readout."""

    def __init__(self, embed_dim=6, num_heads=2, num_layers=2, **factory):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.MultiheadAttention(embed_dim, num_heads, batch_first=True, **factory)
            for _ in range(num_layers)
        )
        self.readout = nn.Linear(embed_dim, 3, **factory)

    def forward(self, tokens):
        for layer in self.layers:
            tokens = tokens + layer(tokens, tokens, tokens, need_weights=False)[0]
        return self.readout(tokens.mean(1))


def loss_of(model, generator=None, size=7):
    """Mean cross-entropy on a batch that a generator draws."""
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    like = next(model.parameters())
    tokens = torch.randn(size, 5, like.shape[-1], generator=generator).to(like)
    targets = torch.randint(3, (size,), generator=generator)
    return nn.functional.cross_entropy(model(tokens).float(), targets)


def one_batch(module, roles=("query", "key", "value"), **settings):
    (heads,) = head_batches(head_partitions(module, roles, **settings))
    return heads


def rbf(x, y, bandwidth):
    return math.exp(-sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) / (2 * bandwidth**2))


def paper_bandwidth(rows):
    """Root of the median of squared distances between different heads, over 2 log(M + 1)."""
    count = len(rows)
    distances = sorted(
        sum((a - b) ** 2 for a, b in zip(rows[i], rows[j], strict=True))
        for i in range(count)
        for j in range(i)
    )
    return math.sqrt(distances[(len(distances) - 1) // 2] / (2 * math.log(count + 1)))


def paper_gradient(rows, gradients, alpha):
    """What the paper puts in the place of each head's gradient, entry by entry, with ε = 1."""
    count, bandwidth = len(rows), paper_bandwidth(rows)
    changed = []
    for i in range(count):
        total = [0.0] * len(rows[i])
        for j in range(count):
            weight = rbf(rows[i], rows[j], bandwidth)
            for d in range(len(total)):
                push = weight * (rows[i][d] - rows[j][d]) / bandwidth**2
                total[d] += weight * gradients[j][d] - alpha * push
        changed.append([entry / count for entry in total])
    return changed
