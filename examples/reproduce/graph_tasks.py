"""Node classification on citation graphs: words of papers, who cites whom, and the public split.

Under the folder that the command line names with ``--data`` may lie ``planetoid/cora.npz`` and
``planetoid/citeseer.npz``: the graphs of Yang et al. (2016), arXiv:1603.08861, repository
kimiyoung/planetoid, as plain arrays.

===========================================  ======================================================
``x_data``, ``x_indices``, ``x_indptr``      Which words a paper has, rows of a sparse matrix (CSR)
``x_shape``                                  of this shape
``y``                                        Class of each paper; -1 where it is not known
``edges``                                    "edge 2": pairs of papers, the lower number first
``train``, ``val``, ``test``                 Numbers of papers: 20 of each class, 500 and 1000
===========================================  ======================================================

Papers without a class (15 of Citeseer's, which have no words either) stay in the graph, and are in
no part.
"""

from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from bayesattn.edges import with_self_loops

__all__ = ["GRAPHS", "CitationGraph", "read_graph"]

GRAPHS = ("cora", "citeseer")
_PARTS = {"train": "train", "validation": "val", "test": "test"}


class CitationGraph(NamedTuple):
    """A graph all of whose nodes are seen, and three parts of them whose classes are told apart.

    Attributes:
        features: Of each paper, a sparse tensor; rows sum to one, or to zero without any word.
        edges: Both directions of each citation, and an edge from each paper to itself.
        label: Class of each paper; -1 where it is not known.
        train: Numbers of the papers from which is learned.
        validation: Numbers of those that decide.
        test: Numbers of those on which models are measured.
        num_classes: Number of classes.
    """

    features: Float[Tensor, "node feature"]
    edges: Int[Tensor, "2 edge"]
    label: Int[Tensor, " node"]
    train: Int[Tensor, " chosen"]
    validation: Int[Tensor, " chosen"]
    test: Int[Tensor, " chosen"]
    num_classes: int

    def sizes(self) -> dict[str, int]:
        """How many papers each part and the graph have, and how many classes there are."""
        parts = {name: len(getattr(self, name)) for name in _PARTS}
        return parts | {"nodes": len(self.label), "classes": self.num_classes}


def read_graph(name: str, folder: Path | None, seed: int) -> CitationGraph | None:
    """Read a graph by its name in ``GRAPHS``; None where it is not there.

    The split is the published one, whatever the seed is.

    Raises:
        ValueError: If parts share papers, or have some without a class.
    """
    del seed
    path = None if folder is None else folder / "planetoid" / f"{name}.npz"
    return None if path is None or not path.exists() else _read(path)


@cache
def _read(path: Path) -> CitationGraph:
    with np.load(path) as file:
        arrays = dict(file)
    label = torch.from_numpy(arrays["y"]).long()
    parts = {part: torch.from_numpy(arrays[name]).long() for part, name in _PARTS.items()}
    chosen = torch.cat(list(parts.values()))
    if len(chosen.unique()) < len(chosen) or (label[chosen] < 0).any():
        raise ValueError(f"{path}: expected parts that share no paper, each with its class")
    pairs = torch.from_numpy(arrays["edges"]).long().T
    edges = with_self_loops(torch.cat([pairs, pairs.flip(0)], 1), len(label))
    return CitationGraph(_features(arrays), edges, label, **parts, num_classes=int(label.max()) + 1)


def _features(arrays: dict[str, np.ndarray]) -> Tensor:
    shape = tuple(arrays["x_shape"].tolist())
    counts = torch.from_numpy(np.diff(arrays["x_indptr"])).long()
    rows = torch.arange(shape[0]).repeat_interleave(counts)
    places = torch.stack([rows, torch.from_numpy(arrays["x_indices"]).long()])
    values = torch.from_numpy(arrays["x_data"]).to(torch.get_default_dtype())
    totals = values.new_zeros(shape[0]).index_add(0, rows, values)
    values = values / totals[rows]
    return torch.sparse_coo_tensor(places, values, shape, check_invariants=True).coalesce()
