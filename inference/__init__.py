"""How posteriors of Pyro programs, and of the heads of networks in training, are found."""

if not __name__.startswith("bayesattn."):
    raise ImportError(
        f"import bayesattn.inference, not {__name__}: under two names Python would load two copies"
    )

from bayesattn.inference.checkpoints import Checkpoint
from bayesattn.inference.closed_forms import ClosedForms, MeanField
from bayesattn.inference.comparison import Comparison, compare
from bayesattn.inference.coordinate_ascent import CoordinateAscent
from bayesattn.inference.coordinates import Affine, laplace
from bayesattn.inference.em import EM
from bayesattn.inference.head_diffusion import SteinDiffusion
from bayesattn.inference.head_forces import CircuitForce, SteinForce, WassersteinForce
from bayesattn.inference.head_motion import RepulsionInfo
from bayesattn.inference.initialization import initial_values
from bayesattn.inference.layer_alignment import Alignment
from bayesattn.inference.log_density import DensitySettings, LogDensity
from bayesattn.inference.matching import match_heads
from bayesattn.inference.nuts import NUTS
from bayesattn.inference.posterior import Posterior
from bayesattn.inference.recording import GraphCache, RecordingError
from bayesattn.inference.repulsion import Repulsion
from bayesattn.inference.running import ConvergenceWarning, NonFiniteError
from bayesattn.inference.sgld import SGLD
from bayesattn.inference.spos import SPOS
from bayesattn.inference.stein_discrepancy import SteinDiscrepancy, ksd
from bayesattn.inference.svgd import SVGD
from bayesattn.inference.svi import SVI
from bayesattn.inference.weight_search import WeightSearch, WeightTrial, weight_for_target
from bayesattn.inference.wgd import WGD

__all__ = [
    "EM",
    "NUTS",
    "SGLD",
    "SPOS",
    "SVGD",
    "SVI",
    "WGD",
    "Affine",
    "Alignment",
    "Checkpoint",
    "CircuitForce",
    "ClosedForms",
    "Comparison",
    "ConvergenceWarning",
    "CoordinateAscent",
    "DensitySettings",
    "GraphCache",
    "LogDensity",
    "MeanField",
    "NonFiniteError",
    "Posterior",
    "RecordingError",
    "Repulsion",
    "RepulsionInfo",
    "SteinDiffusion",
    "SteinDiscrepancy",
    "SteinForce",
    "WassersteinForce",
    "WeightSearch",
    "WeightTrial",
    "compare",
    "initial_values",
    "ksd",
    "laplace",
    "match_heads",
    "weight_for_target",
]
