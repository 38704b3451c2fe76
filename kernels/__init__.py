"""Triton kernels of effkit: one hot path a file, imported on first use."""

if __name__ != "effkit.kernels":
    # The folder is called `kernels`, like another package: with the repository root on sys.path it would hide that one.
    raise ImportError(
        f"these files are the package effkit.kernels, not {__name__!r}: take the repository root off sys.path"
    )
