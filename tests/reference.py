"""Plain loops, written from the mathematics and never from the library's code."""

import math

import numpy as np


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
