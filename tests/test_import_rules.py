"""Data flows one way. This file is the map of who may import whom, and holds the code to it."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Folders of code, and the names they are imported by. Links are the same files again.
FOLDERS = {
    "hyperlens": "hyperlens",
    "probes": "hyperlens.probes",
    "training": "hyperlens.training",
    **{
        init.parent.relative_to(ROOT).as_posix(): ".".join(init.parent.relative_to(ROOT).parts)
        for init in sorted((ROOT / "hyperlens").rglob("__init__.py"))
        if init.parent != ROOT / "hyperlens"
        and not any(parent.is_symlink() for parent in init.parents)
    },
}

# Pure mathematics over tensors; knows neither models nor probes.
MATHS = {"stats", "float32", "rank_correlation", "moments", "intervals", "significance"}

# What whoever opens a pair and returns a finding needs.
EXPERIMENTS_MAY_USE = {
    "errors",
    "guarding",
    "hooked",
    "residual",
    "discovery",
    "attaching",
    "shells",
    "loading",
    "pairing",
    "texts",
    "corpus",
    "token_ids",
    "findings",
    "fingerprint",
    "plots",
    "probes",
    "results",
    "rounds",
    "runner",
    "sources",
    "streams",
    *MATHS,
}

# Each module of hyperlens/ and what it may import of ours. The names of folders stand
# for every module in them; modules of one folder may import each other.
ALLOWED: dict[str, set[str]] = {
    # the ground: nothing above them
    "errors": set(),
    "stats": {"errors"},
    "rank_correlation": {"errors", "stats"},
    "float32": set(),
    "moments": {"errors", "stats", "float32"},
    "intervals": {"errors", "stats", "moments"},
    "significance": set(),
    "hooked": {"errors"},
    "files": {"errors"},
    "hub": set(),
    "heap": set(),
    "guarding": {"errors"},
    "randomness": set(),
    "streams": {"errors", "hooked", *MATHS},
    "reading": {"guarding", "stats", "streams"},
    "results": {"errors", "files"},
    # opening models
    "shells": {"errors", "hub"},
    "tokenizers": {"errors", "hub"},
    "adapters": {"errors", "hub", "shells"},
    "checkpoints": {"errors", "hub", "adapters"},
    "sources": {"errors", "hooked", "hub", "shells", "tokenizers", "adapters", "checkpoints"},
    "discovery": {"errors", "hooked"},
    "attaching": {"errors", "hooked", "discovery"},
    "unembedding": set(),
    "residual": {"errors", "hooked", "discovery", "attaching", "unembedding"},
    "parity": {"errors", "hooked"},
    "loading": {"errors", "hooked", "residual", "discovery", "parity", "shells", "sources", "hub"},
    # text, and the one pass over it
    "pairing": {
        "errors",
        "hooked",
        "loading",
        "adapters",
        "shells",
        "sources",
        "fingerprint",
    },
    "fingerprint": set(),
    "texts": {"errors", "hub"},
    "token_ids": {"errors"},
    "corpus": {"errors", "texts", "token_ids"},
    "memory": {"guarding", "streams"},
    "rounds": {"corpus", "guarding", "hooked", "memory", "results", "runner", "streams"},
    "runner": {
        "errors",
        "guarding",
        "heap",
        "hooked",
        "memory",
        "streams",
        "reading",
        "corpus",
        "results",
        "stats",
    },
    "probes": {"errors", "streams", "reading", "results", *MATHS},
    # making fine-tuned models; never sees a probe
    "training": {
        "errors",
        "files",
        "hub",
        "texts",
        "corpus",
        "token_ids",
        "loading",
        "sources",
        "hooked",
        "shells",
        "adapters",
        "discovery",
        "attaching",
        "fingerprint",
        "randomness",
        # ranks of the record, and the colours of its figures
        "stats",
        "plots",
    },
    # the model and the tales that ship with the package
    "embedded": {"errors", "texts"},
    # text from models, and what experiments do with a pair
    "decoding": {"errors", "stats", "shells", "corpus", "guarding", "randomness"},
    "experiments": {*EXPERIMENTS_MAY_USE, "decoding", "files"},
    "patching": {*EXPERIMENTS_MAY_USE, "decoding", "experiments"},
    "judging": {*EXPERIMENTS_MAY_USE, "adapters", "decoding", "experiments", "files"},
    # reading results
    "findings": {"errors", "files"},
    "audit": {"errors", "results"},
    "plots": {"errors", "results", "audit"},
    "report": {"errors", "files", "results", "findings", "audit", "plots", "stats"},
    # the command line
    "recipe_options": {"training"},
    "options": {"files", "texts"},
    "__main__": {"cli"},
}

# Upward imports allowed inside a function only: a result can draw itself and write its own
# report, yet reading one loads neither.
LATE: dict[str, set[str]] = {"results": {"plots", "report"}, "findings": {"report"}}

# The only places where everything meets. `__init__` names the public API without loading it.
SEE_EVERYTHING = {"__init__", "compare", "demo", "cli", "commands"}

TABLE = ALLOWED.keys() | SEE_EVERYTHING

# Whatever reads results must not be able to reach a model.
READERS = {"audit", "plots", "report"}

# The one file that may spell out hook names, and what counts as spelling one.
HOOK_FILE = "hyperlens/hooks/surface.py"
HOOK_NAME = re.compile(r"(^|\.)blocks\.|hook_(resid|embed|pos_embed|attn|mlp|normalized|scale)")

# What `import hyperlens` must not load.
HEAVY = (
    "torch",
    "transformers",
    "transformer_lens",
    "peft",
    "datasets",
    "matplotlib",
    "pandas",
    "scipy",
)

MAX_LINES = 300
KNOWN_LONG_FILES: set[str] = set()


def package_files() -> list[Path]:
    return sorted(file for folder in FOLDERS for file in (ROOT / folder).glob("*.py"))


def relative(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def layer_of(file: Path) -> str:
    """The row of the table that a file belongs to."""
    folders = file.parent.relative_to(ROOT).parts
    if folders == ("hyperlens",):
        return file.stem
    return folders[0] if folders[0] in ("probes", "training") else folders[1]


class Import(NamedTuple):
    line: int
    target: str  # the row of the table it reaches
    is_relative: bool
    is_late: bool  # inside a function


def our_imports(file: Path) -> Iterator[Import]:
    """Every import of ours, wherever in the file it stands; for type checkers only, too."""
    package = FOLDERS[relative(file.parent)].split(".")
    tree = ast.parse(file.read_text(encoding="utf-8"))
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    late = {
        id(inner)
        for outer in ast.walk(tree)
        if isinstance(outer, functions)
        for inner in ast.walk(outer)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [(alias.name.split("."), False) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = base + (node.module.split(".") if node.module else [])
            # `from . import x` may name a module or something in __init__: keep the name.
            found = [([*module, alias.name], node.level > 0) for alias in node.names]
        else:
            continue
        for parts, is_relative in found:
            if parts[0] in ("probes", "training"):
                parts = ["hyperlens", *parts]
            if parts[0] != "hyperlens":
                continue
            name = parts[1] if len(parts) > 1 else "__init__"
            if name == "__version__":
                continue  # a plain constant, free for all
            if name not in TABLE and not (ROOT / "hyperlens" / f"{name}.py").exists():
                name = "__init__"
            yield Import(node.lineno, name, is_relative, id(node) in late)


def broken_rules(file: Path) -> Iterator[str]:
    layer = layer_of(file)
    for line, target, is_relative, is_late in our_imports(file):
        place = f"{relative(file)}:{line}"
        if not is_relative and layer in ("probes", "training"):
            yield f"{place} imports {target} absolutely; write a relative import"
        if layer in SEE_EVERYTHING or target == layer or target in ALLOWED[layer]:
            continue
        if is_late and target in LATE.get(layer, ()):
            continue
        yield f"{place} imports {target}; {layer} may import only {sorted(ALLOWED[layer])}"


def test_every_module_is_in_the_table() -> None:
    unknown = {layer_of(file) for file in package_files()} - TABLE
    assert not unknown, (
        f"new modules {sorted(unknown)}: say in ALLOWED, in {Path(__file__).name}, "
        "what each may import"
    )


def test_the_table_has_no_cycles_and_keeps_its_promises() -> None:
    list(TopologicalSorter(ALLOWED).static_order())
    assert ALLOWED["errors"] == set()
    assert ALLOWED["probes"] <= {"errors", "streams", "reading", "results", *MATHS}
    assert "probes" not in ALLOWED["training"]
    for layer in READERS:
        assert ALLOWED[layer] <= {"errors", "files", "stats", "results", "findings"} | READERS


@pytest.mark.parametrize("file", package_files(), ids=relative)
def test_imports_follow_the_table(file: Path) -> None:
    if layer_of(file) not in TABLE:
        pytest.skip("not in the table; another test says so")
    assert not list(broken_rules(file))


def hook_names(file: Path) -> list[str]:
    """Strings and attributes that spell a hook name; docstrings and comments may mention them."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            text = node.value
        elif isinstance(node, ast.Attribute):
            text = node.attr
        else:
            continue
        if HOOK_NAME.search(text):
            found.append(f"{relative(file)}:{node.lineno} {text!r}")
    return found


def test_hook_names_are_spelled_in_one_file() -> None:
    elsewhere = [
        name for file in package_files() if relative(file) != HOOK_FILE for name in hook_names(file)
    ]
    assert not elsewhere, f"hook names belong in {HOOK_FILE}"
    if (ROOT / HOOK_FILE).exists():
        assert hook_names(ROOT / HOOK_FILE), "the search no longer finds the names it looks for"


def test_files_can_be_read_in_one_sitting() -> None:
    long = {
        relative(file)
        for file in package_files()
        if len(file.read_text(encoding="utf-8").splitlines()) > MAX_LINES
    }
    assert long == KNOWN_LONG_FILES, f"over {MAX_LINES} lines: look for the seam"


def test_probes_and_training_have_no_sub_packages() -> None:
    nested = [
        relative(file)
        for folder in ("probes", "training")
        for file in (ROOT / folder).glob("*/*.py")
    ]
    assert not nested, "the build ships only the files directly inside these folders"


def test_the_top_level_import_is_light() -> None:
    code = f"import sys, hyperlens; print(*[name for name in {HEAVY} if name in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == []
