"""The architecture: who imports what, what a public name owes its reader, what src never does."""

import ast
import inspect
import json
import operator
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import anchorda
from anchorda import plots

PACKAGE = Path(anchorda.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
# Lower floors first; a module imports from floors below its own, never from beside or above.
FLOORS = [
    {"_checks", "_sampling", "_ops.majority", "_ops.kernels", "_ops.threads", "_pickles"},
    {"_ops.blocks", "_ops.registration"},
    {"_ops.reference"},
    {"_ops.cpu", "_ops.plain", "_ops.exportable"},
    {"_ops.choice"},
    {"_ops"},
    {"_state", "_similarity"},
    {"anchors", "statistics", "pseudo_labels", "losses", "taps"},
    {"evaluation", "calibration", "selection", "plots", "distributed", "stages", "released"},
    {""},
]
# Modules of the top floor may build on each other in this order.
ORDER = ["evaluation", "calibration", "selection", "plots", "distributed", "stages", "released"]
PUBLIC = [
    *sorted(anchorda.__all__),
    *("released.CagUdaLoss", "released.cag_uda_loss", "released.load_category_anchors"),
    *(f"plots.{name}" for name in vars(plots) if name.startswith(("plot_", "class_colors"))),
]
# Results; their fields are documented one by one.
RESULTS = {
    *(
        "AnchorHealth",
        "ClassMoments",
        "ClassSums",
        "LinearDiscriminant",
        "PrecisionCoverage",
        "PseudoLabels",
        "StageLabels",
    ),
    "released.CagUdaLoss",
}


def name_of(source: Path) -> str:
    parts = source.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def floor_of(module: str) -> tuple[int, int]:
    floor = next(i for i, floor in enumerate(FLOORS) if module in floor)
    return floor, ORDER.index(module) if module in ORDER else 0


def imports_within(source: Path) -> Iterator[str]:
    """Yield the modules of the package that a source imports, by any kind of import."""
    package = list(source.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                assert not alias.name.startswith("anchorda"), f"import relatively in {source}"
        elif isinstance(node, ast.ImportFrom) and node.level > 0:
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            stem = [part for part in base if part]
            for alias in node.names:
                module = ".".join([*stem, alias.name])
                known = module in {name_of(s) for s in SOURCES}
                yield module if known else ".".join(stem)


@pytest.mark.parametrize("source", SOURCES, ids=name_of)
def test_imports_go_down_only(source: Path) -> None:
    for module in imports_within(source):
        assert floor_of(module) < floor_of(name_of(source)), f"{name_of(source)} ← {module}"


def test_evaluation_needs_neither_anchors_nor_losses() -> None:
    assert set(imports_within(PACKAGE / "evaluation.py")) <= {"_checks", "_ops.reference", "_state"}


def loaded_by(statement: str) -> set[str]:
    """Return the top-level modules that a fresh interpreter has loaded after a statement."""
    program = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    command = [sys.executable, "-W", "error", "-c", program]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name.partition(".")[0] for name in json.loads(output)} - sys.stdlib_module_names


def test_import_loads_nothing_but_torch_numpy_and_typing_extensions() -> None:
    alone = loaded_by("import torch, numpy, typing_extensions")
    assert "torch" in alone
    assert loaded_by("import anchorda") - alone <= {"anchorda"}


CALLS = """
import sys, torch, anchorda
features = torch.randn(2, 8, 4, 4, requires_grad=True)
labels = torch.zeros(2, 4, 4, dtype=torch.int64)
anchors = torch.randn(3, 8)
anchorda.AnchorPseudoLabeler()(features, anchors)
anchorda.CategoryAnchors(3, 8).update(features, labels)
loss = anchorda.anchor_distance_loss(features, labels, anchors)
(loss + anchorda.anchor_contrastive_loss(features, labels, anchors)).backward()
assert "torch._dynamo" not in sys.modules
"""


def test_the_first_call_does_not_import_the_compiler() -> None:
    ran = subprocess.run([sys.executable, "-c", CALLS], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_all_is_sorted_complete_and_importable() -> None:
    assert sorted(anchorda.__all__) == anchorda.__all__
    public = {
        name
        for name, value in vars(anchorda).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert public == set(anchorda.__all__)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_is_documented(name: str) -> None:
    value = operator.attrgetter(name)(anchorda)
    doc = inspect.getdoc(value)
    assert doc is not None
    summary = doc.splitlines()[0]
    assert summary.endswith((".", "`."))
    if name in RESULTS:
        return
    assert ">>> " in doc
    assert "Raises:\n" in doc
    assert "Source: " in doc
    if inspect.isfunction(value):
        signature = inspect.signature(value)
        assert "Returns:\n" in doc or signature.return_annotation is None
        arguments = set(signature.parameters)
    else:
        arguments = set(inspect.signature(value.__init__).parameters) - {"self"}
        for method, function in inspect.getmembers(value, inspect.isfunction):
            if not method.startswith("_") and method in vars(value):
                assert inspect.getdoc(function), f"{name}.{method}"
        if "forward" in vars(value):
            assert "Shape:\n" in doc
            assert "- Output: " in doc
    assert "Args:\n" in doc or not arguments
    described = set(re.findall(r"^    (\w+): ", doc.partition("Args:\n")[2], re.MULTILINE))
    assert arguments == described & arguments


# Calls that make the host wait for the device; test_reference.py shows the same of the operators.
WAITING = {
    *("item", "tolist", "cpu", "numpy", "nonzero", "unique", "masked_select", "bincount"),
    *("argwhere", "equal", "allclose", "synchronize", "is_nonzero", "__bool__"),
}
CONSTRUCTION = {
    "__init__",
    "extra_repr",
    "_minimum",
    "_shown",
    "load_state_dict",
    "from_centroids",
    "sent_state",
}


def functions_of(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name not in CONSTRUCTION:
            yield node


WAITS = ("_ops.cpu", "calibration", "distributed", "plots", "stages", "released")
CORE = [source for source in SOURCES if name_of(source) not in WAITS]


@pytest.mark.parametrize("source", CORE, ids=name_of)
def test_no_function_waits_for_the_device(source: Path) -> None:
    for function in functions_of(ast.parse(source.read_text())):
        for node in ast.walk(function):
            if isinstance(node, ast.Call):
                called = node.func
                if isinstance(called, ast.Attribute):
                    assert called.attr not in WAITING, f"{source.name}:{node.lineno}"
                elif isinstance(called, ast.Name):
                    assert called.id not in ("bool", "print"), f"{source.name}:{node.lineno}"


def test_package_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()
