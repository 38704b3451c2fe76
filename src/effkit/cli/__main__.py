"""python -m effkit.cli, the same as the command effkit."""

import os
import sys

# -m puts the working directory on the path. In a checkout its folder kernels/ would stand in for the package of that
# name which transformers looks for, and refuse to be imported.
sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != os.getcwd()]

from effkit.cli import main  # noqa: E402  # only now may anything be imported

if __name__ == "__main__":
    main()
