"""The flow is one-way: a stage imports earlier stages only, patterns import the language only, imports are cheap."""

from __future__ import annotations

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "flexsparse"

# Earlier first. A module may import from its own level and from those before it.
LEVELS = (
    ("errors", "failures", "verdict", "files", "_torch"),
    ("kernels",),
    ("ir",),
    ("expression",),
    ("catalogue",),
    ("language",),
    ("patterns",),
    ("parser", "numbered"),
    ("_dynamo", "_fake_gpu", "_inductor", "hardware"),
    ("row_lengths",),
    ("dense", "dense_evaluator", "dense_selections"),
    ("ops",),
    ("trace",),
    ("analysis",),
    ("codegen",),
    ("settings", "runtime", "backends", "prediction", "plan"),
    ("cost", "roofline"),
    ("explanation",),
    ("pipeline",),
    (
        *("compiler", "inspection", "stages", "execution", "short_calls", "traced", "explorer", "example_inputs"),
        *("block_masks", "tolerance", "measurement", "tuning", "doctor", "timing", "peers", "locating", "checks"),
    ),
    ("nn", "pictures"),
)
LEVEL_OF = {name: n for n, names in enumerate(LEVELS) for name in names}


# Methods on early classes that load a late stage when they are called: conveniences for users, not part of the flow.
CONVENIENCES = {("expression", "trace"), ("expression", "numbered"), ("trace", "block_masks")}


def imports_of(path: pathlib.Path) -> list[str]:
    """The flexsparse modules that a file imports anywhere, annotations-only imports left out."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module, *(f"{node.module}.{a.name}" for a in node.names if node.module == "flexsparse")]
        elif isinstance(node, ast.Import):
            found += [a.name for a in node.names]
    return sorted({name for name in found if name.split(".")[0] == "flexsparse" and name != "flexsparse"})


def files_of(name: str) -> list[pathlib.Path]:
    """The files of a stage; the kernels are a stage of their own, which needs no other."""
    kernels = ROOT / "codegen" / "kernels"
    if name == "kernels":
        return sorted(kernels.glob("*.py"))
    top = ROOT / name if name in ("patterns", "codegen") else PACKAGE / name
    files = sorted(top.rglob("*.py")) if top.is_dir() else [PACKAGE / f"{name}.py"]
    return [path for path in files if kernels not in path.parents]


def stage_of(imported: str) -> str:
    return "kernels" if imported.startswith("flexsparse.codegen.kernels") else imported.split(".")[1]


MODULES = [(name, path) for name in LEVEL_OF for path in files_of(name)]


@pytest.mark.parametrize(("name", "path"), MODULES, ids=[str(p.relative_to(ROOT)) for _, p in MODULES])
def test_a_stage_imports_earlier_stages_only(name: str, path: pathlib.Path) -> None:
    for imported in imports_of(path):
        stage = stage_of(imported)
        assert stage in LEVEL_OF, f"{imported} is not a stage with a level; give it one here"
        if (name, stage) in CONVENIENCES:
            continue
        assert LEVEL_OF[stage] <= LEVEL_OF[name], f"{path.name} imports the later stage {imported}"


@pytest.mark.parametrize("path", sorted((ROOT / "patterns").glob("*.py")), ids=lambda p: p.name)
def test_patterns_import_the_language_and_nothing_else(path: pathlib.Path) -> None:
    allowed: tuple[str, ...] = ("flexsparse.language", "flexsparse.errors", "flexsparse.patterns")
    if path.name == "__init__.py":
        allowed += ("flexsparse.catalogue",)
    for imported in imports_of(path):
        assert imported.startswith(allowed), imported
    tree = ast.parse(path.read_text())
    outside = {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
    outside |= {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    standard = {"importlib", "pkgutil"} if path.name == "__init__.py" else set()
    assert outside <= {"flexsparse", "__future__", "math", "typing", *standard}


def test_private_torch_names_have_few_importers() -> None:
    importers = []
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "codegen").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "torch":
                names = [*node.module.split("."), *(a.name for a in node.names)]
            elif isinstance(node, ast.Import):
                names = [part for a in node.names if a.name.startswith("torch.") for part in a.name.split(".")]
            if any(part.startswith("_") for part in names):
                importers.append(path.name)
    assert set(importers) <= {"_torch.py", "_dynamo.py", "_inductor.py", "_fake_gpu.py"}


def loaded_by(statement: str) -> set[str]:
    """The heavy packages that a fresh interpreter has loaded after a statement."""
    names = ("torch", "torch._dynamo", "sympy", "numpy", "triton")
    probe = f"import sys; {statement}; print([m for m in {names} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(ast.literal_eval(done.stdout))


@pytest.mark.parametrize(
    "statement",
    [
        "import flexsparse",
        "import flexsparse.patterns",
        "import flexsparse.language",
        "import flexsparse; flexsparse.parse('causal & sparsek(8)')",
        "import flexsparse; dir(flexsparse)",
        "from flexsparse.patterns import causal; str(causal())",
    ],
)
def test_the_language_needs_no_torch(statement: str) -> None:
    assert loaded_by(statement) == set()


def test_a_block_mask_needs_no_compiler() -> None:
    statement = "import flexsparse; flexsparse.block_mask('causal & sliding_window(100)', 1000)"
    assert loaded_by(statement) <= {"torch", "numpy"}


def test_unknown_attributes_are_refused() -> None:
    import flexsparse

    with pytest.raises(AttributeError, match="module 'flexsparse' has no attribute 'attend'"):
        flexsparse.attend  # noqa: B018


def test_everything_that_is_exported_exists() -> None:
    import flexsparse

    for name in flexsparse.__all__:
        assert getattr(flexsparse, name) is not None
        assert name in dir(flexsparse)
