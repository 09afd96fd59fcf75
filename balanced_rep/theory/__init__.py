"""Two-layer denoising autoencoders: what training converges to, in closed form, and how learned weights compare."""

from balanced_rep.theory._closed_form import (
    ClosedForm,
    closed_form,
    closed_form_weights,
    column_scale,
    memorization_threshold,
    minimal_loss,
    optimal_allocation,
    population_loss,
)
from balanced_rep.theory._compare import (
    ColumnMatch,
    gram_error,
    match_columns,
    merge_parallel_columns,
    principal_angles,
)
from balanced_rep.theory._data import Separability, separability, separable_subset
from balanced_rep.theory._family import DAEFamily, geometric_levels, train_family
from balanced_rep.theory._ideal import EmpiricalDenoiser, GaussianDenoiser
from balanced_rep.theory._train import TrainedDAE, lam_from_weight_decay, mask_loss, sampled_loss, train_dae

__all__ = [
    "ClosedForm",
    "ColumnMatch",
    "DAEFamily",
    "EmpiricalDenoiser",
    "GaussianDenoiser",
    "Separability",
    "TrainedDAE",
    "closed_form",
    "closed_form_weights",
    "column_scale",
    "geometric_levels",
    "gram_error",
    "lam_from_weight_decay",
    "mask_loss",
    "match_columns",
    "memorization_threshold",
    "merge_parallel_columns",
    "minimal_loss",
    "optimal_allocation",
    "population_loss",
    "principal_angles",
    "sampled_loss",
    "separability",
    "separable_subset",
    "train_dae",
    "train_family",
]
