"""Check what the built distributions hold: python tests/distribution.py dist."""

import re
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src"
EXPECTED_IN_SDIST = {
    *("CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "README.md", "SECURITY.md"),
    *("Makefile", "constraints.txt", "pyproject.toml", "tests/conftest.py"),
}


def check(folder: Path) -> str:
    """Raise an error where a distribution lacks something or holds too much; name the version."""
    (wheel,) = folder.glob("*.whl")
    (sdist,) = folder.glob("*.tar.gz")
    text = (PACKAGE / "anchorda" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    assert found is not None
    version = found[1]

    assert wheel.name == f"anchorda-{version}-py3-none-any.whl", wheel.name
    info = f"anchorda-{version}.dist-info"
    sources = {p for p in PACKAGE.rglob("*") if p.suffix in (".py", ".md") or p.name == "py.typed"}
    expected = {p.relative_to(PACKAGE).as_posix() for p in sources}
    assert "anchorda/py.typed" in expected
    expected |= {f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "licenses/LICENSE")}
    with zipfile.ZipFile(wheel) as archive:
        assert set(archive.namelist()) == expected, set(archive.namelist()) ^ expected

    root = f"anchorda-{version}/"
    assert sdist.name == f"anchorda-{version}.tar.gz", sdist.name
    with tarfile.open(sdist) as archive:
        names = {name.removeprefix(root) for name in archive.getnames()}
    assert names >= EXPECTED_IN_SDIST, EXPECTED_IN_SDIST - names
    assert names >= {f"src/{name}" for name in expected if not name.startswith(info)}

    if ".dev" not in version:  # a release is in the changelog and is cited by its number
        changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
        citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
        released = re.search(rf"^## \[{re.escape(version)}\] - (\S+)$", changes, re.MULTILINE)
        assert released is not None, f"CHANGELOG.md has no section of {version} with its date"
        assert f"\nversion: {version}\ndate-released: {released[1]}\n" in citation, "CITATION.cff"
    return version


if __name__ == "__main__":
    print(f"anchorda {check(Path(sys.argv[1]))}: wheel and sdist hold what they should")
