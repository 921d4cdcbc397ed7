"""Check the words of docstrings, comments and pages: `python tests/words.py [FILE ...]`.

Plain technical English reads faster than a riddle. A docstring's first line says what the function
returns or does, so it does not open with a question word; and a few words that stand for a more
exact one are not used. Code, in blocks or between backticks, is not prose and not checked.
"""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("src", "examples", "benchmarks", "tests", "docs")
OPENING = re.compile(r"(?:What|Whether|How|Where|Which|When|Who|Whose|Why)\b")
# Each with more exact ones to choose from.
WORDS = {
    r"kept": "stored, unchanged, preserved",
    r"held(?!-out| out|$)": "stored, fixed, in use",
    r"mend(?:s|ed|ing)?": "fix",
    r"placed": "positioned, written",
    r"put(?:s|ting)?": "write, store, set, insert",
    r"rooms?": "memory, space, module",
}
WORD = re.compile(rf"\b(?:{'|'.join(WORDS)})\b", re.IGNORECASE)
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
CODE = re.compile(r"(`+).*?\1|^ *(?:>>>|\.\.\.) .*$", re.MULTILINE | re.DOTALL)
FENCED = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)


def without_code(text: str) -> str:
    """Return prose with blanks in place of code, line by line."""
    for pattern in (FENCED, CODE):
        text = pattern.sub(lambda code: "\n" * code.group().count("\n"), text)
    return text


def prose_of(source: str) -> Iterator[tuple[int, str]]:
    """Yield line number and text of the strings that stand alone, and of the comments."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Expr(ast.Constant(str(text))):
                yield node.lineno, text
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def findings(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line number and message of all that is to be said otherwise."""
    text = path.read_text(encoding="utf-8")
    is_python = path.suffix == ".py"
    for first, prose in prose_of(text) if is_python else [(1, text)]:
        for number, line in enumerate(without_code(prose).splitlines(), first):
            for word in WORD.findall(line):
                better = next(b for w, b in WORDS.items() if re.fullmatch(w, word, re.IGNORECASE))
                yield number, f"{word!r}: say {better}"
    for node in ast.walk(ast.parse(text)) if is_python else ():
        if isinstance(node, DOCUMENTED):
            opening = OPENING.match(ast.get_docstring(node) or "")
            if opening:
                message = f"opens with {opening.group()!r}: say what is returned or done"
                yield node.body[0].lineno, message


def all_files() -> Iterator[Path]:
    """Yield the sources of all folders, and the pages but for the notes on other people's code."""
    for folder in FOLDERS:
        yield from sorted((ROOT / folder).rglob("*.py"))
    pages = [*ROOT.glob("*.md"), *(p for f in FOLDERS for p in (ROOT / f).rglob("*.md"))]
    yield from sorted(page for page in pages if "golden" not in page.parts)


def main() -> int:
    """Print all findings; return 1 if there are any."""
    paths = [Path(name) for name in sys.argv[1:]] or list(all_files())
    lines = [f"{p}:{number}: {text}" for p in paths for number, text in sorted(findings(p))]
    print("\n".join(lines), end="\n" if lines else "")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
