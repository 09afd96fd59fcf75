"""The commands of `balanced-rep`: arguments, progress bars and error messages around functions of the package."""
