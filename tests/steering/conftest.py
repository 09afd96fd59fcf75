"""The conditional denoiser of the detection tests."""

from tests.detection.conftest import toy as toy
