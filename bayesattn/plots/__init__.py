"""Pictures of posteriors, as matplotlib figures that leave no global state behind."""

from bayesattn.plots.alignment_pictures import alignment
from bayesattn.plots.attended_words import attention
from bayesattn.plots.attention_pictures import attention_maps, column_mass
from bayesattn.plots.head_pictures import head_forces, head_similarity
from bayesattn.plots.kernel_pictures import feature_error, kernel_bands
from bayesattn.plots.learning_curves import optimization
from bayesattn.plots.posterior_draws import forest, marginals
from bayesattn.plots.quality import pavpu, reliability, scores, selective_risk

__all__ = [
    "alignment",
    "attention",
    "attention_maps",
    "column_mass",
    "feature_error",
    "forest",
    "head_forces",
    "head_similarity",
    "kernel_bands",
    "marginals",
    "optimization",
    "pavpu",
    "reliability",
    "scores",
    "selective_risk",
]
