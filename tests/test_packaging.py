"""The three import names resolve however flexsparse is installed, and nothing else lands in site-packages."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import tarfile
import zipfile

import pytest

if sys.version_info >= (3, 11):
    import tomllib

ROOT = pathlib.Path(__file__).resolve().parent.parent
SUBPACKAGES = ("codegen", "patterns")


def run(*command: str, cwd: pathlib.Path, **environment: str) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_every_package_is_listed() -> None:
    """A new folder with an __init__.py must be added to pyproject.toml, or wheels would lack it."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {"flexsparse"}
    for folder, prefix in ((ROOT / "flexsparse", "flexsparse"), *((ROOT / n, f"flexsparse.{n}") for n in SUBPACKAGES)):
        for init in folder.rglob("__init__.py"):
            parts = init.parent.relative_to(folder).parts
            found.add(".".join((prefix, *parts)))
    assert set(settings["packages"]) == found


def test_links_lead_to_the_top_level_folders() -> None:
    for name in SUBPACKAGES:
        assert (ROOT / "flexsparse" / name).resolve() == (ROOT / name).resolve()


def test_checkout_without_links_still_imports(tmp_path: pathlib.Path) -> None:
    """Windows and some archives drop symbolic links; the search path then leads to the folders."""
    copy = tmp_path / "checkout"
    copy.mkdir()
    run("cp", "-rP", *(str(ROOT / n) for n in ("flexsparse", *SUBPACKAGES)), str(copy), cwd=tmp_path)
    for name in SUBPACKAGES:
        (copy / "flexsparse" / name).unlink()
    code = "import flexsparse.patterns, flexsparse.codegen as c; print(flexsparse.patterns.causal(), c.__file__)"
    shown = run(sys.executable, "-c", code, cwd=copy, PYTHONPATH=str(copy))
    assert shown.startswith("causal()")
    assert str(copy) in shown


def test_plain_names_are_not_importable_from_elsewhere(tmp_path: pathlib.Path) -> None:
    code = "import importlib.util as u, flexsparse; print(u.find_spec('patterns'), u.find_spec('codegen'))"
    assert run(sys.executable, "-c", code, cwd=tmp_path).strip() == "None None"


@pytest.mark.slow
def test_wheel_and_sdist(tmp_path: pathlib.Path) -> None:
    """Both are built from a clean copy; the wheel, unpacked, imports all three names and nothing plain."""
    tree = tmp_path / "tree"
    run("git", "clone", "-q", str(ROOT), str(tree), cwd=tmp_path)
    # Files not committed yet belong to the tree under test.
    run("bash", "-c", f"git ls-files -co --exclude-standard -z | xargs -0 -I F cp -P --parents F {tree}", cwd=ROOT)
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(tree), cwd=tmp_path)
    (wheel,) = tmp_path.glob("flexsparse-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "flexsparse/patterns/causal.py" in names
    assert "flexsparse/codegen/flex.py" in names
    assert "flexsparse/py.typed" in names
    assert not [n for n in names if n.startswith(("patterns/", "codegen/", "tests/"))]
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = "import flexsparse.patterns, flexsparse.codegen.flex, flexsparse; print(flexsparse.__file__)"
    shown = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(site))
    assert str(site) in shown

    run(sys.executable, "-c", _SDIST, str(tmp_path), cwd=tree)
    (sdist,) = tmp_path.glob("flexsparse-*.tar.gz")
    with tarfile.open(sdist) as archive:
        members = {m.name.split("/", 1)[1] for m in archive.getmembers() if "/" in m.name}
    assert {"patterns/causal.py", "codegen/flex.py", "flexsparse/compiler.py", "pyproject.toml"} <= members


_SDIST = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
