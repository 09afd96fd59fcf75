"""What the paper states, measured on models trained here: `balanced-rep reproduce`."""

from balanced_rep.reproduce._part import Claim, Figure, Part, Settings, Table
from balanced_rep.reproduce._run import EXPERIMENTS, reproduce

__all__ = ["EXPERIMENTS", "Claim", "Figure", "Part", "Settings", "Table", "reproduce"]
