"""The pages: every block runs, shown output is what comes out, and every link leads somewhere."""

import doctest
import operator
import re
import runpy
from pathlib import Path

import pytest

import anchorda
from anchorda import plots

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# Pages whose blocks run here. Those of the recipes run with their stand-ins, in tests/recipes.
PAGES = sorted(set(DOCS.glob("*.md")) - {DOCS / "README.md"})
FOLDERS = [ROOT / name for name in ("", "benchmarks", "examples", "tests")]
READMES = [*(folder / "README.md" for folder in FOLDERS), ROOT / "CONTRIBUTING.md"]
LINKING = [*READMES, *sorted(DOCS.rglob("*.md"))]
WITHOUT_BLOCKS = {
    *("api", "architecture", "citing", "comparison", "glossary", "index", "methods", "operators"),
    *("reproduce", "results", "your_own_data"),
}
MAX_LINE = 76  # of code in a page
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).with_suffix("").as_posix()


def blocks_of(page: Path) -> list[tuple[str, str]]:
    """Return kind and text of the blocks to run, padded so that tracebacks point into the page."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```(python|pycon)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(m.group(1), "\n" * text[: m.start(2)].count("\n") + m.group(2)) for m in found]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_run_and_show_what_they_print(page: Path) -> None:
    """In their order and in one namespace; what ``pycon`` shows has to be what is printed."""
    blocks = blocks_of(page)
    assert bool(blocks) == (page.stem not in WITHOUT_BLOCKS)
    names: dict[str, object] = {}
    failures: list[str] = []
    for kind, block in blocks:
        if kind == "python":
            exec(compile(block, str(page), "exec"), names)
        else:
            test = doctest.DocTestParser().get_doctest(block, {}, page.name, str(page), 0)
            test.globs = names
            doctest.DocTestRunner().run(test, out=failures.append, clear_globs=False)
    assert not failures, "".join(failures)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_lines_of_blocks_are_short(page: Path) -> None:
    """On a phone longer ones scroll; output is as long as it is."""
    for block in FENCED.findall(page.read_text(encoding="utf-8")):
        fence, *lines = block.splitlines()
        for line in lines if fence[3:] in ("python", "pycon", "") else ():
            is_output = fence[3:] == "pycon" and not line.startswith((">>>", "..."))
            assert is_output or len(line) <= MAX_LINE, line


@pytest.mark.parametrize("page", [p for p in PAGES if p.stem not in WITHOUT_BLOCKS], ids=name_of)
def test_a_page_begins_with_what_it_imports(page: Path) -> None:
    """A reader who copies the blocks of one page, from its first, has all that they need."""
    text = page.read_text(encoding="utf-8")
    first = re.search(r"^```(?:python|pycon)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert first is not None
    assert "import torch" in first.group(1)
    assert re.search(r"import .*\banchorda\b", first.group(1))


def anchors_of(page: Path) -> set[str]:
    """Return the headings of a page as links name them."""
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def links_of(page: Path) -> list[tuple[str, str]]:
    """Return file and heading of every link and picture within the repository."""
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    found = re.findall(r"\]\((?!https?://)([^)#\s]*)#?([^)\s]*)\)", text)
    return [(str(file), str(heading)) for file, heading in found]


@pytest.mark.parametrize("page", LINKING, ids=name_of)
def test_links_resolve(page: Path) -> None:
    for file, heading in links_of(page):
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{name_of(page)} → {file}"
        assert target.is_relative_to(ROOT)
        assert not heading or heading in anchors_of(target), f"{name_of(page)} → {file}#{heading}"


def test_links_are_found() -> None:
    assert ("docs/results.md", "") in links_of(ROOT / "README.md")
    assert ("images/adaptation.png", "") in links_of(DOCS / "results.md")
    assert ("operators.md", "calibration") in links_of(DOCS / "calibration.md")


@pytest.mark.parametrize(
    ("word", "page"),
    [
        ("custom datasets", "your_own_data"),
        ("thresholds", "choosing_a_margin"),
        ("prototypes", "anchors"),
        ("centroids", "anchors"),
        ("confidence", "pseudo_labels"),
        ("source-free", "choosing_blocks"),
        ("NaN loss", "faq"),
        ("DDP", "distributed"),
        ("BibTeX", "citing"),
    ],
)
def test_other_words_lead_to_their_page(word: str, page: str) -> None:
    """The search ranks first a page that the glossary gives a word for."""
    synonyms = runpy.run_path(str(DOCS / "synonyms.py"))["synonyms"]()
    assert word in dict(synonyms[page])


def test_the_citation_is_that_of_the_citation_file() -> None:
    pages = [p.read_text(encoding="utf-8") for p in (DOCS / "citing.md", ROOT / "README.md")]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    version = re.search(r"^version: (.+)$", citation, re.MULTILINE)
    year = re.search(r"^date-released: (\d{4})", citation, re.MULTILINE)
    assert version is not None
    assert year is not None
    for page in pages:
        assert f"  version = {{{version[1]}}}," in page
        assert f"  year    = {{{year[1]}}}," in page


def test_every_page_is_in_a_toctree() -> None:
    listed = set()
    for page in DOCS.rglob("*.md"):
        text = page.read_text(encoding="utf-8")
        for tree in re.findall(r"^```\{toctree\}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            entries = [line for line in tree.splitlines() if line and not line.startswith(":")]
            listed |= {(page.parent / entry).with_suffix(".md") for entry in entries}
    assert listed == set(DOCS.rglob("*.md")) - {DOCS / "index.md", DOCS / "README.md"}


def test_every_picture_is_used_and_names_its_command() -> None:
    pages = {page: page.read_text(encoding="utf-8") for page in LINKING}
    for picture in sorted((DOCS / "images").iterdir()):
        using = [text for text in pages.values() if f"images/{picture.name}" in text]
        assert using, picture.name
    concepts = pages[DOCS / "concepts.md"]
    for match in re.finditer(
        r"^!\[.*?\]\(images/(\w+)\.png\)\n\n\*(.*?)\*$", concepts, re.M | re.S
    ):
        assert re.search(rf"`python \S+\.py .*{match.group(1)}", match.group(2)), match.group(1)
        assert (DOCS / "images" / f"{match.group(1)}.png").stat().st_size < 200_000
    assert concepts.count("](images/") == 4


def test_reference_has_every_public_name() -> None:
    directives = re.findall(
        r"^\.\. auto(?:class|function):: ([\w.]+)", (DOCS / "api.md").read_text(), re.MULTILINE
    )
    own = {
        name
        for module in (anchorda.released, plots)
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
    }
    assert sorted(directives) == sorted({*anchorda.__all__, *own})


def test_a_block_page_has_its_parts() -> None:
    blocks = re.search(
        r":caption: Blocks\n\n(.*?)^```$", (DOCS / "index.md").read_text(), re.M | re.S
    )
    assert blocks is not None
    for name in blocks.group(1).split():
        page = DOCS / f"{name}.md"
        titles = re.findall(r"^## (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert {"Shapes", "Pitfalls", "Cost"} <= set(titles), name
        assert any(title.startswith(("What it ", "What they ")) for title in titles), name
        assert "\n$$\n" in page.read_text(encoding="utf-8"), name
        named = re.findall(
            r"`([\w.]+)`", page.read_text(encoding="utf-8").partition("Reference: ")[2]
        )
        assert named, name
        for public in named:
            operator.attrgetter(public)(anchorda)
