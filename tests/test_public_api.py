"""The public names and their signatures, so that a change to them is deliberate.

`tests/public_api.txt` has all of them as text. After a change that is meant:

    python tests/test_public_api.py > tests/public_api.txt

and the difference belongs into the commit; what it takes from users, into CHANGELOG.md too.
"""

import ast
import inspect
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import anchorda
from anchorda import plots

SNAPSHOT = Path(__file__).with_name("public_api.txt")


def public_names() -> dict[str, object]:
    """Return the names that users may import."""
    own = {
        f"{module.__name__.partition('.')[2]}.{name}": value
        for module in (plots, anchorda.released)
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
    }
    return {name: getattr(anchorda, name) for name in sorted(anchorda.__all__)} | own


class Spelled(ast.NodeTransformer):
    """Writes a type that a module has a name for as what the name stands for."""

    def __init__(self, module: ModuleType) -> None:
        self.types: dict[str, ast.expr] = {}
        for node in ast.parse(inspect.getsource(module)).body:
            match node:
                case ast.Assign([ast.Name(name)], value) | ast.AnnAssign(ast.Name(name), _, value):
                    if value is not None and not name.startswith("_"):
                        self.types[name] = value

    def visit_Name(self, node: ast.Name) -> ast.AST:
        """Return the name of a type, or any other."""
        return self.types.get(node.id, node)


def described(name: str, value: object) -> Iterator[str]:
    """Yield a name with its signature, and the members of a class, as the source has them."""
    assert inspect.isclass(value) or inspect.isfunction(value), f"{name} is neither"
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(value))).body
    node = Spelled(sys.modules[value.__module__]).visit(node)
    if isinstance(node, ast.FunctionDef):
        yield name + signature(node)
        return
    assert isinstance(node, ast.ClassDef)
    decorators = "".join(f"@{ast.unparse(decorator)} " for decorator in node.decorator_list)
    yield f"{decorators}{name}({', '.join(map(ast.unparse, node.bases))})"
    # Fields in their order, which is part of a tuple; methods in any.
    for field in node.body:
        if isinstance(field, ast.AnnAssign) and not ast.unparse(field.target).startswith("_"):
            yield "    " + ast.unparse(field)
    methods = [method for method in node.body if isinstance(method, ast.FunctionDef)]
    methods += [assigned(name, vars(value)[name]) for name in assigned_names(node)]
    for method in sorted(methods, key=lambda method: method.name):
        if method.name == "__init__" or not method.name.startswith("_"):
            kinds = [f"@{ast.unparse(decorator)} " for decorator in method.decorator_list]
            yield "    " + "".join(kinds) + method.name + signature(method)


def assigned_names(node: ast.ClassDef) -> Iterator[str]:
    """Yield the names of methods that a class assigns, as ``reset = reset_state``."""
    for statement in node.body:
        match statement:
            case ast.Assign([ast.Name(name)], ast.Name() | ast.Call()):
                yield name


def assigned(name: str, function: object) -> ast.FunctionDef:
    """Return a function as the method of that name that it is in a class."""
    assert inspect.isfunction(function), name
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    assert isinstance(node, ast.FunctionDef)
    node.name, node.args.args[0].annotation = name, None
    return node


def signature(node: ast.FunctionDef) -> str:
    """Return the arguments, their types and defaults, and the type of the result."""
    result = "" if node.returns is None else f" -> {ast.unparse(node.returns)}"
    return f"({ast.unparse(node.args)}){result}"


def snapshot() -> list[str]:
    """Return all public names, line by line."""
    return [line for name, value in public_names().items() for line in described(name, value)]


def test_public_names_are_those_of_the_snapshot() -> None:
    before = SNAPSHOT.read_text(encoding="utf-8").splitlines()
    assert snapshot() == before, (
        "The public names changed. If that is meant: python tests/test_public_api.py > "
        "tests/public_api.txt, and a line in CHANGELOG.md."
    )


Score = int | float


def _shared(self: object, a: int) -> str:
    return str(a)


@dataclass(frozen=True)
class _Example:
    scores: Score
    labels: str = "x"
    _hidden: int = 0

    @property
    def seen(self) -> bool:
        return True

    @classmethod
    def made(cls, value: int | None = None) -> "_Example":
        return cls(value or 1)

    def also(self, a: int, /, b: float = 0.5, *, c: bool = True) -> None: ...

    shared = _shared

    def _private(self) -> None: ...


def test_a_name_is_described_by_all_that_its_users_rely_on() -> None:
    assert list(described("Example", _Example)) == [
        "@dataclass(frozen=True) Example()",
        "    scores: int | float",
        "    labels: str = 'x'",
        "    also(self, a: int, /, b: float=0.5, *, c: bool=True) -> None",
        "    @classmethod made(cls, value: int | None=None) -> '_Example'",
        "    @property seen(self) -> bool",
        "    shared(self, a: int) -> str",
    ]


if __name__ == "__main__":
    sys.stdout.write("\n".join(snapshot()) + "\n")
