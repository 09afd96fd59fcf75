"""Denoisers: the protocol that every analysis of this package takes, and a small embedded model to try them on."""

from balanced_rep.models._convert import ConversionError, Converted, convert
from balanced_rep.models._diffusers import DiffusersDenoiser, from_diffusers
from balanced_rep.models._digits import CheckpointError, DigitsData, DigitsDenoiser, DigitsSplit, digits, digits_data
from balanced_rep.models._edm import EDMDenoiser
from balanced_rep.models._edm_network import EDMNetworkDenoiser, from_edm
from balanced_rep.models._load import UnsafeModelError, encode_prompts, load
from balanced_rep.models._mlp import ResidualMLP
from balanced_rep.models._noise import start_noise
from balanced_rep.models._protocol import Denoiser, Tap
from balanced_rep.models._relu_dae import ReLUDAE
from balanced_rep.models._sample import PathStep, denoising_path, sample, sigma_schedule

__all__ = [
    "CheckpointError",
    "ConversionError",
    "Converted",
    "Denoiser",
    "DiffusersDenoiser",
    "DigitsData",
    "DigitsDenoiser",
    "DigitsSplit",
    "EDMDenoiser",
    "EDMNetworkDenoiser",
    "PathStep",
    "ReLUDAE",
    "ResidualMLP",
    "Tap",
    "UnsafeModelError",
    "convert",
    "denoising_path",
    "digits",
    "digits_data",
    "encode_prompts",
    "from_diffusers",
    "from_edm",
    "load",
    "sample",
    "sigma_schedule",
    "start_noise",
]
