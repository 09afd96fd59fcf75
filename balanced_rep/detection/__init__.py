"""Which samples has a model memorized: the paper's score and its rivals under one interface, calibrated and judged."""

from balanced_rep.detection._calibrate import Calibration, Detector, Flags, calibrate
from balanced_rep.detection._conditional import ConditionJacobian, NeMo, NoiseDifference, Sharpness
from balanced_rep.detection._denoising import DenoisingError
from balanced_rep.detection._evaluate import Comparison, Evaluation, RateAt, compare, evaluate
from balanced_rep.detection._jacobian import FLIPD, JacobianNorm, JacobianRank
from balanced_rep.detection._nearest import GenerationDensity, NearestReference, tiled_distance
from balanced_rep.detection._representation import RepresentationStd
from balanced_rep.detection._score import Batch, Score, Scores, get, names, register
from balanced_rep.detection._table1 import PAPER_TABLE_1, Row, Table1, table1
from balanced_rep.detection._threshold import Threshold, least_calibration_size, threshold

__all__ = [
    "FLIPD",
    "PAPER_TABLE_1",
    "Batch",
    "Calibration",
    "Comparison",
    "ConditionJacobian",
    "DenoisingError",
    "Detector",
    "Evaluation",
    "Flags",
    "GenerationDensity",
    "JacobianNorm",
    "JacobianRank",
    "NeMo",
    "NearestReference",
    "NoiseDifference",
    "RateAt",
    "RepresentationStd",
    "Row",
    "Score",
    "Scores",
    "Sharpness",
    "Table1",
    "Threshold",
    "calibrate",
    "compare",
    "evaluate",
    "get",
    "least_calibration_size",
    "names",
    "register",
    "table1",
    "threshold",
    "tiled_distance",
]
