"""Compiles the kernels of an order in a process of its own: ``python -m flexsparse.explorer.cross_worker FOLDER``.

Each result is written as it is done, so that one who finds it missing knows which kernel ended the process.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

from flexsparse.failures import cause_in_words


def main(folder: pathlib.Path) -> None:
    """Write ``0.json``, ``1.json``, ... for the kernels of ``order.json``."""
    order = json.loads((folder / "order.json").read_text())
    for number, kernel in enumerate(order["kernels"]):
        # What the compiler says below Python, or as it aborts, goes to a file of the kernel's.
        with open(folder / f"{number}.err", "w") as said:
            os.dup2(said.fileno(), sys.stderr.fileno())
        try:
            found = _compile(kernel, order["target"], folder)
        except Exception as error:  # noqa: BLE001  Whatever it is, it becomes the message of an error.
            found = {"error": cause_in_words(error)}
        path = folder / f"{number}.json"
        path.with_suffix(".part").write_text(json.dumps(found))
        os.replace(path.with_suffix(".part"), path)


def _compile(kernel: dict[str, Any], target: dict[str, Any], folder: pathlib.Path) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(_module(kernel["module"], folder), kernel["name"])
    position = {name: n for n, name in enumerate(function.arg_names)}
    source = ASTSource(
        fn=function,
        signature={name: kernel["signature"][name] for name in function.arg_names},
        constexprs={(position[name],): value for name, value in kernel["constants"].items()},
        attrs={(position[name],): [["tt.divisibility", 16]] for name in kernel["aligned"]},
    )
    where = GPUTarget(target["backend"], target["arch"], target["warp"])
    made = triton.compile(source, target=where, options=kernel["options"])
    texts = {"ttir": made.asm["ttir"], "ttgir": made.asm["ttgir"], "llvm": made.asm["llir"]}
    texts |= {name: made.asm[name] for name in ("ptx", "amdgcn") if name in made.asm}
    report = ""
    if "cubin" in made.asm:
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".cubin", delete=False) as file:
            file.write(made.asm["cubin"])
        texts["sass"] = _said_by("nvdisasm", "-c", file.name)
        report = _said_by("cuobjdump", "--dump-resource-usage", file.name)
    return {"texts": texts, "shared": made.metadata.shared, "report": report}


def _module(text: str, folder: pathlib.Path) -> Any:
    """The text as a module from a file, which Triton reads again; one for each text."""
    name = f"kernels_{abs(hash(text)):x}"
    if name not in sys.modules:
        path = folder / f"{name}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def _said_by(tool: str, *arguments: str) -> str:
    """What one of the tools in Triton's wheel writes. Raises OSError where the wheel lacks it."""
    import triton.backends.nvidia

    path = pathlib.Path(triton.backends.nvidia.__file__ or "").parent / "bin" / tool
    if not path.exists():
        raise OSError(f"this build of Triton has no {tool}")
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
