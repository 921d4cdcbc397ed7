"""The table of recipes: every page has its test, and its lines are counted right."""

import re

import pytest

from tests.readme_blocks import python_blocks
from tests.recipes.pages import RECIPES, code_lines

INDEX = (RECIPES / "index.md").read_text(encoding="utf-8")
PAGES = sorted(path.stem for path in RECIPES.glob("*.md") if path.stem != "index")
BEFORE_AND_NOW = re.findall(r"^\| \[.*?\]\((\w+)\.md\) \| (\d+) \| (\d+) \|$", INDEX, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES)
def test_every_page_is_listed_and_tested(page: str) -> None:
    assert f"]({page}.md)" in INDEX
    assert re.search(rf"^{page}$", INDEX, re.MULTILINE)  # In the table of contents.
    test = RECIPES.parents[1] / "tests" / "recipes" / f"test_recipe_{page}.py"
    text = test.read_text(encoding="utf-8")
    # Which blocks the test runs; one in a loop over their numbers counts for each.
    blocks = len(python_blocks(RECIPES / f"{page}.md"))
    loops = re.findall(r"for number in \(([\d, ]+)\)", text)
    run = {int(number) for number in re.findall(r"run_(?:block|body)\(PAGE, (\d+)", text)}
    run |= {int(number) for numbers in loops for number in numbers.split(",")}
    assert run == set(range(blocks))
    assert f"tests/recipes/{test.name}" in (RECIPES / f"{page}.md").read_text(encoding="utf-8")


def test_lines_of_code_are_neither_blank_nor_comments() -> None:
    assert code_lines("\n\na = 1  # one\n# no\n\nif a:\n    pass\n") == 3


@pytest.mark.parametrize(("page", "before", "now"), BEFORE_AND_NOW)
def test_lines_before_and_now(page: str, before: str, now: str) -> None:
    counted = sum(code_lines(block) for block in python_blocks(RECIPES / f"{page}.md"))
    assert int(now) == counted
    assert counted < int(before)


def test_three_codebases_are_counted_and_their_parts_add_up() -> None:
    names = {"CAG-UDA": "cag_uda", "ProDA": "proda", "SePiCo": "sepico"}
    before = {page: int(lines) for page, lines, _ in BEFORE_AND_NOW}
    assert set(before) == set(names.values())
    for name, page in names.items():
        (item,) = re.findall(rf"^- \*\*{name}.*?(?=^- \*\*|^The lines)", INDEX, re.M | re.S)
        parts = re.findall(r"(?<= )(\d+)(?=[,.;\n])", re.sub(r"`[^`]*`", "", item))
        assert sum(map(int, parts)) == before[page], parts
