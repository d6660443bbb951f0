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


def stein_kernel(kernel, x, y, score_x, score_y):
    """u(x, y) = k s_x.s_y + s_x.grad_y k + s_y.grad_x k + tr grad_x grad_y k, by autograd."""
    x, y = (torch.tensor(point, requires_grad=True) for point in (x, y))
    value = kernel(x, y)
    grad_x, grad_y = torch.autograd.grad(value, (x, y), create_graph=True)
    trace = sum(
        torch.autograd.grad(grad_y[d], x, retain_graph=True)[0][d].item() for d in range(len(x))
    )
    pairs = zip(score_x, score_y, grad_x.tolist(), grad_y.tolist(), strict=True)
    return trace + sum(value.item() * a * b + a * dy + b * dx for a, b, dx, dy in pairs)


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


def pooled_features(tokens, mask, query, hidden=None):
    """F_nh = sum_j a_nhj x_nj, a_nh = softmax_j(w_h.x_nj / sqrt d), or of w_h.tanh(W x_nj)."""
    features, weights = [], []
    for words, taking_part in zip(tokens, mask, strict=True):
        key = words if hidden is None else np.array([np.tanh(hidden @ word) for word in words])
        scale = len(words[0]) ** -0.5 if hidden is None else 1.0
        heads = [attention([w], key, words, scale, mask=[taking_part]) for w in query]
        features.append([output[0] for output, _ in heads])
        weights.append([weight[0] for _, weight in heads])
    return np.array(features), np.array(weights)


def self_attention_features(tokens, mask, query_weight, key_weight, value_weight):
    """F_nh = mean over the words i of sentence n of sum_j a_nhij V_h' x_nj; padding is no word."""
    features = np.zeros((len(tokens), len(query_weight), value_weight.shape[-1]))
    weights = np.zeros((len(tokens), len(query_weight), len(tokens[0]), len(tokens[0])))
    for n, words in enumerate(tokens):
        for h in range(len(query_weight)):
            query, key, value = (w[h] for w in (query_weight, key_weight, value_weight))
            outputs, all_weights = attention(
                [query.T @ word for word in words],
                [key.T @ word for word in words],
                np.array([value.T @ word for word in words]),
                query.shape[-1] ** -0.5,
                mask=[mask[n]] * len(words),
            )
            for i in range(len(words)):
                if mask[n][i]:
                    features[n, h] += outputs[i] / sum(mask[n])
                    weights[n, h, i] = all_weights[i]
    return features, weights


def read_out(features, weight, bias):
    """o_n = sum_h F_nh R_h + b."""
    outputs = []
    for heads in features:
        output = bias.copy()
        for feature, block in zip(heads, weight, strict=True):
            output += block.T @ feature
        outputs.append(output)
    return np.array(outputs)


def normal_log_density(values, scale):
    """Sum of log N(x; 0, scale^2) over all entries."""
    return sum(
        -(x**2) / (2 * scale**2) - math.log(scale) - math.log(2 * math.pi) / 2
        for x in np.ravel(values)
    )


def stein_direction(kernel, particles, scores, temperature=1.0):
    """phi_i = 1/M sum_j [k(x_j, x_i) s_j / T + grad_{x_j} k(x_j, x_i)]."""
    count = len(particles)
    result = kernel_repulsion(kernel, particles) / count
    for i in range(count):
        for j in range(count):
            weight = float(kernel(torch.tensor(particles[j]), torch.tensor(particles[i])))
            result[i] += weight * scores[j] / (temperature * count)
    return result


def pair_contrast(function, x, y, a, b, distinct=False):
    """E f(x, x') + E f(y, y') - 2 E f(x, y) under weights; with ``distinct``, x' is never x."""

    def mean(rows, columns, row_weights, column_weights, skip):
        total = weight = 0.0
        for i in range(len(rows)):
            for j in range(len(columns)):
                if not (skip and i == j):
                    pair = row_weights[i] * column_weights[j]
                    total += pair * function(rows[i], columns[j])
                    weight += pair
        return total / weight

    return mean(x, x, a, a, distinct) + mean(y, y, b, b, distinct) - 2 * mean(x, y, a, b, False)


def column_then_row(logits, mask, prior=None, strength=1.0):
    """Weights normalized over queries first (to a power, under a prior) and over keys last."""
    prior = np.zeros(len(logits)) if prior is None else prior
    weights = np.zeros_like(logits)
    logarithms = np.zeros_like(logits)
    for j in range(logits.shape[1]):
        asking = [i for i in range(len(logits)) if mask[i, j]]
        top = max((logits[i, j] + prior[i] for i in asking), default=0.0)
        total = sum(math.exp(logits[i, j] + prior[i] - top) for i in asking)
        for i in asking:
            logarithms[i, j] = logits[i, j] - strength * (top + math.log(total))
    for i in range(len(logits)):
        seen = [j for j in range(logits.shape[1]) if mask[i, j]]
        top = max((logarithms[i, j] for j in seen), default=0.0)
        total = sum(math.exp(logarithms[i, j] - top) for j in seen)
        for j in seen:
            weights[i, j] = math.exp(logarithms[i, j] - top) / total
    return weights


def sinkhorn(logits, mask, num_sweeps):
    """Plans scaled to unit columns, then unit rows, as often as asked; none may be empty."""
    plan = np.where(mask, np.exp(logits), 0.0)
    for _ in range(num_sweeps):
        plan = plan / plan.sum(0, keepdims=True)
        plan = plan / plan.sum(1, keepdims=True)
    return plan


def prefix_column_then_row(logits):
    """Row i: columns normalized over queries j to i, then the keys 0 to i."""
    size = len(logits)
    weights = np.zeros_like(logits)
    for i in range(size):
        row = [
            math.exp(logits[i, j]) / sum(math.exp(logits[k, j]) for k in range(j, i + 1))
            for j in range(i + 1)
        ]
        weights[i, : i + 1] = np.array(row) / sum(row)
    return weights


def conditional_transport(logit, cost, x, y, a, b):
    """Mean cost of moving x by softmax plans to y, and y to x, half and half."""

    def one_way(logit, cost, x, y, a, b):
        total = 0.0
        for i in range(len(x)):
            plan = [b[j] * np.exp(logit(x[i], y[j])) for j in range(len(y))]
            moved = sum(plan[j] * cost(x[i], y[j]) for j in range(len(y))) / sum(plan)
            total += a[i] / sum(a) * moved
        return total

    def turned(function):
        return lambda one, other: function(other, one)

    back = one_way(turned(logit), turned(cost), y, x, b, a)
    return 0.5 * one_way(logit, cost, x, y, a, b) + 0.5 * back
