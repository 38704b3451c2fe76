# Sourced by the other scripts: makes .venv with effkit and what its tests need. Defines root and venv.
#
# The first run installs, later ones start at once: a stamp in .venv says what is installed. It is removed before anything
# changes and written when everything is there, so that an interrupted installation is taken up again.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv
stamp=$venv/effkit-installed

# Settings of the caller that would put other packages, or the repository root, before those of .venv.
unset PYTHONPATH PYTHONHOME
export PIP_USER=0

say() {
    echo "effkit: $*" >&2
}

# What .venv must hold, as one line: its place, its Python, and the two files that say which packages.
fingerprint() {
    "$venv/bin/python" -I - "$root" <<'END'
import hashlib, pathlib, sys

root = pathlib.Path(sys.argv[1])
digest = hashlib.sha256(b"".join((root / name).read_bytes() for name in ("pyproject.toml", "constraints.txt")))
print(root, sys.version.split()[0], digest.hexdigest())
END
}

# A Python that torch's pinned release has wheels for, and that can make environments.
find_python() {
    local name version without_venv=""
    for name in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python; do
        version=$("$name" -I -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
        case $version in 3.1[0-4]) ;; *) continue ;; esac
        if "$name" -I -c 'import ensurepip, venv' 2>/dev/null; then
            echo "$name"
            return
        fi
        without_venv=$version
    done
    if [ -n "$without_venv" ]; then
        say "Python $without_venv cannot make environments; on Debian and Ubuntu: apt install python$without_venv-venv"
    else
        say "no Python 3.10 to 3.14 found on the PATH (looked for python3, python3.14 to python3.10, python)"
    fi
    return 1
}

# Programs in .venv/bin name the place they were made for: a copied or moved .venv is made anew.
usable() {
    grep -qsF "$venv" "$venv/bin/activate" && "$venv/bin/python" -I -m pip --version >/dev/null 2>&1
}

install() {
    local python torch
    SECONDS=0
    rm -f "$stamp"
    if ! usable; then
        python=$(find_python)
        say "making .venv with $("$python" --version)"
        "$python" -m venv --clear "$venv"
    fi
    # First and by its exact version: nothing that follows can then pull another torch with gigabytes of CUDA packages.
    torch=$(grep '^torch==' "$root/constraints.txt")
    say "installing $torch into .venv; once, mostly the time of a large download"
    "$venv/bin/python" -I -m pip install -qq "$torch" >&2
    say "installing effkit and its other requirements"
    (cd "$root" && "$venv/bin/python" -I -m pip install -qq -c constraints.txt -e '.[test]' >&2)
    fingerprint >"$stamp"
    say "installed in $SECONDS s"
}

if [ ! -f "$stamp" ] || [ "$(fingerprint)" != "$(cat "$stamp")" ]; then
    install
fi
