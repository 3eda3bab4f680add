"""The C sources of the kernels, and how they are compiled and loaded."""
