"""Linear operators that are known only by their products, randomized SVD, and what can be estimated of both."""

from balanced_rep.linalg._operator import JacobianOperator
from balanced_rep.linalg._probes import Estimate
from balanced_rep.linalg._randomized import randomized_svd
from balanced_rep.linalg._result import ConvergenceWarning, SVDInfo, SVDResult
from balanced_rep.linalg._streaming import PCAResult, StreamingPCA
from balanced_rep.linalg._twins import pca_lowrank, randomized_svd_sklearn, svd_lowrank

__all__ = [
    "ConvergenceWarning",
    "Estimate",
    "JacobianOperator",
    "PCAResult",
    "SVDInfo",
    "SVDResult",
    "StreamingPCA",
    "pca_lowrank",
    "randomized_svd",
    "randomized_svd_sklearn",
    "svd_lowrank",
]
