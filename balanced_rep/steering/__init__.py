"""Representation-guided editing: directions, their application, and how steerable samples are."""

from balanced_rep.steering._apply import steer, window
from balanced_rep.steering._direction import Direction, direction
from balanced_rep.steering._edit import interpolated_samples, sdedit_samples, steered_samples
from balanced_rep.steering._linear import Linearity, local_linearity
from balanced_rep.steering._response import Response, project, response, response_derivative

__all__ = [
    "Direction",
    "Linearity",
    "Response",
    "direction",
    "interpolated_samples",
    "local_linearity",
    "project",
    "response",
    "response_derivative",
    "sdedit_samples",
    "steer",
    "steered_samples",
    "window",
]
