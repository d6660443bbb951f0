"""Plain loops, written from the mathematics and never from the library's code."""

import math

import numpy as np
import torch


def cooccurrence(sentences, vocabulary, window):
    """n_ij = number of ordered pairs of places in one sentence, at most ``window`` apart."""
    counts = np.zeros((len(vocabulary), len(vocabulary)))
    for words in sentences:
        for i in range(len(words)):
            for j in range(len(words)):
                near = i != j and abs(i - j) <= window
                if near and words[i] in vocabulary and words[j] in vocabulary:
                    counts[vocabulary.index(words[i]), vocabulary.index(words[j])] += 1
    return counts


def ppmi(counts, smoothing):
    """Levy, Goldberg and Dagan (2015), section 2 and eq. 3: max(0, log p(w,c) / (p(w) p_a(c)))."""
    total = sum(sum(row) for row in counts)
    contexts = [sum(row[j] for row in counts) ** smoothing for j in range(len(counts[0]))]
    result = np.zeros_like(counts)
    for i, row in enumerate(counts):
        for j, count in enumerate(row):
            if count > 0:
                joint, word, context = count / total, sum(row) / total, contexts[j] / sum(contexts)
                result[i, j] = max(0.0, math.log(joint / (word * context)))
    return result


def kernel_repulsion(kernel, particles):
    """R_i = sum_j grad_{x_j} k(x_j, x_i), each gradient by autograd of one pair."""
    result = np.zeros_like(particles)
    for i in range(len(particles)):
        for j in range(len(particles)):
            x_j = torch.tensor(particles[j], requires_grad=True)
            kernel(x_j, torch.tensor(particles[i])).backward()
            result[i] += x_j.grad.numpy()
    return result


def median_of_pairs(particles):
    """Lower median of ||x_i - x_j||^2 over i < j."""
    distances = sorted(
        sum((a - b) ** 2 for a, b in zip(particles[i], particles[j], strict=True))
        for i in range(len(particles))
        for j in range(i + 1, len(particles))
    )
    return distances[(len(distances) - 1) // 2]


def attention(query, key, value, scale, bias=None, mask=None):
    """o_i = sum_j a_ij v_j, a_i = softmax_j(scale q_i.k_j + b_ij) over the j that m_ij allows."""
    weights = np.zeros((len(query), len(key)))
    for i in range(len(query)):
        logits = {}
        for j in range(len(key)):
            if mask is None or mask[i][j]:
                logits[j] = scale * sum(query[i] * key[j]) + (0 if bias is None else bias[i][j])
        largest = max(logits.values(), default=0)
        total = sum(math.exp(logit - largest) for logit in logits.values())
        for j, logit in logits.items():
            weights[i, j] = math.exp(logit - largest) / total
    output = np.zeros((len(query), value.shape[1]))
    for i in range(len(query)):
        for j in range(len(key)):
            output[i] += weights[i, j] * value[j]
    return output, weights
