"""Linear operators that are known only by their products, and what can be estimated of them."""

from balanced_rep.linalg._operator import JacobianOperator
from balanced_rep.linalg._probes import Estimate

__all__ = ["Estimate", "JacobianOperator"]
