"""Denoisers: the protocol that every analysis of this package takes, and a small embedded model to try them on."""

from balanced_rep.models._digits import CheckpointError, DigitsData, DigitsDenoiser, DigitsSplit, digits, digits_data
from balanced_rep.models._edm import EDMDenoiser
from balanced_rep.models._mlp import ResidualMLP
from balanced_rep.models._protocol import Denoiser, Tap
from balanced_rep.models._relu_dae import ReLUDAE
from balanced_rep.models._sample import PathStep, denoising_path, sample, sigma_schedule

__all__ = [
    "CheckpointError",
    "Denoiser",
    "DigitsData",
    "DigitsDenoiser",
    "DigitsSplit",
    "EDMDenoiser",
    "PathStep",
    "ReLUDAE",
    "ResidualMLP",
    "Tap",
    "denoising_path",
    "digits",
    "digits_data",
    "sample",
    "sigma_schedule",
]
