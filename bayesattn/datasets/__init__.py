"""Small real data sets, shipped with the package, as tensors that a model can be run on."""

from bayesattn.datasets.snips_intents import snips
from bayesattn.datasets.text_dataset import Inputs, TextDataset

__all__ = ["Inputs", "TextDataset", "snips"]
