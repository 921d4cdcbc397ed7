"""Run the core tests with the oldest versions that are supported and with the newest there are.

    python tests/matrix.py            # both
    python tests/matrix.py oldest     # one of them

Each gets an environment of its own in build/matrix: the package as a user installs it, pytest and
hypothesis, and nothing else. What only the example or the pages need is left out. On Linux a torch
from PyPI brings the CUDA libraries along: several gigabytes each.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "matrix"
LEFT_OUT = [
    *("tests/examples", "tests/recipes", "tests/test_benchmarks.py"),
    *("tests/test_docs.py", "tests/test_downstream.py"),
]


class Versions(NamedTuple):
    """The versions of an environment."""

    python: str
    packages: list[str]


VERSIONS = {
    # The lower bounds of pyproject.toml, and the NumPy before 2, which it allows too.
    "oldest": Versions("3.10", ["torch==2.4.*", "numpy==1.26.*"]),
    "newest": Versions("3.13", ["torch", "numpy"]),
}


def interpreter(version: str) -> str | None:
    """Return the path of a Python of that version, if one runs; pyenv is asked too."""
    found = shutil.which(f"python{version}")
    if found is None:
        return None
    command = [found, "-c", "import sys; print(sys.executable)"]
    environment = {**os.environ, "PYENV_VERSION": version}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    return None if result.returncode else result.stdout.strip()


def passes(name: str) -> bool:
    """Make an environment and run the tests in it; whether they pass."""
    versions, folder = VERSIONS[name], FOLDER / name
    base = interpreter(versions.python)
    if base is None:
        print(f"{name}: there is no python{versions.python}")
        return False
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([base, "-m", "venv", folder], check=True)
    python = str(folder / "bin" / "python")
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, *versions.packages, "pytest", "hypothesis", str(ROOT)], check=True)
    frozen = [python, "-m", "pip", "list", "--format=freeze", "--disable-pip-version-check"]
    lines = subprocess.run(frozen, check=True, capture_output=True, text=True).stdout.split()
    chosen = [line for line in lines if line.startswith(("torch==", "numpy==", "anchorda=="))]
    print(f"{name}: Python {versions.python}, {', '.join(chosen)}", flush=True)
    # The package from where it is installed, doctests included; the tests from here.
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--pyargs", "anchorda"]
    command += ["tests", *(f"--ignore={path}" for path in LEFT_OUT)]
    # The compiler's word on one release of Python, about speed alone.
    command += ["-W", "ignore:Guards may run slower on Python 3.13.0:RuntimeWarning"]
    # Under CI the compiler of torch 2.4 stops at a slow path of its own.
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "CI": ""}).returncode == 0


if __name__ == "__main__":
    names = sys.argv[1:] or list(VERSIONS)
    results = {name: passes(name) for name in names}
    print({name: "passed" if passed else "failed" for name, passed in results.items()})
    sys.exit(not all(results.values()))
