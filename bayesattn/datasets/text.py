r"""Plain text as tensors: words, fixed word vectors from what stands near what, padded sentences.

.. math::
    \mathrm{PPMI}_{ij} = \max\Bigl(0, \log\frac{n_{ij}}{n_{i\cdot}\, p_j}\Bigr), \qquad
    p_j \propto n_{\cdot j}^{\,3/4}, \qquad \mathrm{PPMI} \approx U S V^\top, \qquad
    x_i \propto \bigl(U S^{1/2}\bigr)_i - \text{mean over running text}

Source:
    Levy, Goldberg and Dagan (2015), Improving distributional similarity with lessons learned from
    word embeddings, TACL 3. Centering and the length of the vectors are ours.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.sparse import coo_array, csr_array
from scipy.sparse.linalg import svds
from torch import Tensor

__all__ = ["cooccurrence", "embed", "ppmi", "tokenize", "word_vectors"]

_CLITIC = r"(?:n't|'(?:s|d|m|ll|re|ve))\b"
_INSIDE_WORD_CLITIC = re.compile(rf"(?<=[^\W_])({_CLITIC})")
_WORD = re.compile(rf"(?<!\S){_CLITIC}|[^\W_]+(?:[-.:/&'][^\W_]+)*")


def tokenize(text: str) -> list[str]:
    """Split into lower-case words: "What's on, at 9:30?" into what, 's, on, at, 9:30.

    Punctuation is dropped but within a word; contracted endings are words of their own.
    """
    text = text.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    return _WORD.findall(_INSIDE_WORD_CLITIC.sub(r" \1", text))


def word_vectors(
    sentences: Sequence[Sequence[str]],
    dim: int,
    *,
    window: int = 5,
    min_count: int = 2,
    smoothing: float = 0.75,
) -> dict[str, Float[np.ndarray, " dim"]]:
    r"""Fixed vectors of the words of some sentences, each of length :math:`\sqrt{\text{dim}}`.

    So a query with standard normal entries gives every known word a logit
    :math:`q \cdot x / \sqrt{\text{dim}}` with standard normal prior. The vectors are centered
    over running text before they are scaled, and their signs are fixed (in each coordinate of the
    decomposition the entry of largest magnitude is positive), so that runs agree.

    Args:
        sentences: The words of each sentence.
        dim: Width of the vectors, below the number of words that are kept.
        window: How many words to each side count as near.
        min_count: Words that occur less often get no vector.
        smoothing: Power of the distribution of contexts (see :func:`ppmi`).

    Raises:
        ValueError: If there are too few words for this width.
    """
    counts = Counter(word for sentence in sentences for word in sentence)
    vocabulary = sorted(word for word, count in counts.items() if count >= min_count)
    if not 1 <= dim < len(vocabulary):
        raise ValueError(
            f"dim must be at least 1 and below the number of words that occur {min_count} times "
            f"or more ({len(vocabulary)}), got {dim}"
        )
    association = ppmi(cooccurrence(sentences, vocabulary, window), smoothing)
    rows = _left_factor(association, dim)
    frequency = np.array([counts[word] for word in vocabulary], dtype=float)
    rows = rows - frequency @ rows / frequency.sum()
    # a word that stands near no other has nothing but the mean's negative as its row
    rows[association.sum(axis=1) == 0] = 0
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = np.sqrt(dim) * np.divide(rows, length, out=np.zeros_like(rows), where=length > 0)
    return dict(zip(vocabulary, rows, strict=True))


def cooccurrence(
    sentences: Sequence[Sequence[str]], vocabulary: Sequence[str], window: int
) -> csr_array:
    """Count how often each word of the vocabulary (row) stands near each other (column).

    Near are the ``window`` words to each side within the sentence; a word that is not in the
    vocabulary takes its place but is not counted. The counts are symmetric.
    """
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    index = {word: row for row, word in enumerate(vocabulary)}
    rows, columns = [], []
    for sentence in sentences:
        ids = [index.get(word, -1) for word in sentence]
        for distance in range(1, window + 1):
            pairs = zip(ids, ids[distance:], strict=False)
            kept = [pair for pair in pairs if min(pair) >= 0]
            rows += [left for left, _ in kept] + [right for _, right in kept]
            columns += [right for _, right in kept] + [left for left, _ in kept]
    shape = (len(vocabulary), len(vocabulary))
    return csr_array((np.ones(len(rows)), (rows, columns)), shape=shape)


def ppmi(counts: csr_array, smoothing: float = 0.75) -> csr_array:
    """Positive pointwise mutual information of words (rows) and contexts (columns), in nats.

    Args:
        counts: How often each word stands near each context.
        smoothing: Power to which the distribution of contexts is raised, against the bias of
            mutual information toward rare contexts; 1 leaves it as it is.
    """
    row_sums = np.asarray(counts.sum(axis=1)).ravel()
    context = np.asarray(counts.sum(axis=0)).ravel() ** smoothing
    near = coo_array(counts)
    expected = row_sums[near.row] * context[near.col] / context.sum()
    values = np.log(near.data / expected).clip(min=0)
    return csr_array((values, (near.row, near.col)), shape=counts.shape)


def embed(
    sentences: Sequence[Sequence[str]],
    vectors: Mapping[str, Float[np.ndarray, " dim"]],
    dtype: torch.dtype | None = None,
) -> tuple[Float[Tensor, "sentence token dim"], Bool[Tensor, "sentence token"]]:
    """Look up the vectors of some sentences and pad them to the longest.

    A word without a vector is zero: the mean of running text, with logit zero for every query.

    Args:
        sentences: The words of each sentence; at least one sentence.
        vectors: Vector of each known word; at least one.
        dtype: Of the vectors; torch's default where None.

    Returns:
        The vectors, and the mask, True where there is a word.
    """
    dim = len(next(iter(vectors.values())))
    longest = max(len(words) for words in sentences)
    tokens = np.zeros((len(sentences), longest, dim))
    for row, words in enumerate(sentences):
        for column, word in enumerate(words):
            tokens[row, column] = vectors.get(word, 0)
    lengths = torch.tensor([len(words) for words in sentences])
    mask = torch.arange(longest) < lengths[:, None]
    return torch.as_tensor(tokens, dtype=dtype or torch.get_default_dtype()), mask


def _left_factor(matrix: csr_array, dim: int) -> Float[np.ndarray, "row dim"]:
    # the start is given so that ARPACK draws none
    start = np.ones_like(matrix.sum(axis=0))
    left, singular, _ = map(np.asarray, svds(matrix, k=dim, v0=start))
    order = np.argsort(-singular)
    left, singular = left[:, order], singular[order]
    largest = np.abs(left).argmax(axis=0)
    signs = np.sign(left[largest, np.arange(dim)])
    return left * signs * np.sqrt(singular)
