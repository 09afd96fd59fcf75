"""The main job on real input: find the digits that a denoiser has memorized, by the representation it makes of them."""

from balanced_rep.demo._metrics import Detection, detect
from balanced_rep.demo._run import DemoResult, Row, run_demo

__all__ = ["DemoResult", "Detection", "Row", "detect", "run_demo"]
