"""Linear operators that are known only by their products, randomized SVD, and what can be estimated of both."""

from balanced_rep.linalg._jacobian_search import JacobianProgress
from balanced_rep.linalg._jacobian_spectrum import Count, JacobianSpectrum, jacobian_spectrum
from balanced_rep.linalg._jacobian_svd import jacobian_svd
from balanced_rep.linalg._operator import JacobianOperator
from balanced_rep.linalg._probes import Estimate
from balanced_rep.linalg._randomized import randomized_svd
from balanced_rep.linalg._result import ConvergenceWarning, SVDInfo, SVDResult
from balanced_rep.linalg._streaming import PCAResult, StreamingPCA
from balanced_rep.linalg._twins import pca_lowrank, randomized_svd_sklearn, svd_lowrank

__all__ = [
    "ConvergenceWarning",
    "Count",
    "Estimate",
    "JacobianOperator",
    "JacobianProgress",
    "JacobianSpectrum",
    "PCAResult",
    "SVDInfo",
    "SVDResult",
    "StreamingPCA",
    "jacobian_spectrum",
    "jacobian_svd",
    "pca_lowrank",
    "randomized_svd",
    "randomized_svd_sklearn",
    "svd_lowrank",
]
