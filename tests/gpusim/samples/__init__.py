"""Small kernels that the tools are tested on: they stay whatever the package's own kernels become."""
