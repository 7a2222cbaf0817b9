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

# The rooms from the ground up: a file imports from its own room and from those above it in this
# list, never from one below. Modules directly in hyperlens/ are rooms of one file.
ROOMS = (
    ("errors",),
    ("checks", "files", "offloading", "processes", "randomness"),
    ("statistics",),
    ("render",),
    ("results",),
    ("models",),
    ("data",),
    ("hooks",),
    ("passes",),
    ("probes",),
    ("pair", "costs"),
    ("decoding",),
    ("training",),
    ("compare", "experiments", "patching", "judging", "embedded"),
    ("reproduction",),
    ("questions",),
    ("demo", "validation"),
    ("cli",),
)
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}

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


def package_files() -> list[Path]:
    return sorted(file for folder in FOLDERS for file in (ROOT / folder).glob("*.py"))


def relative(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def module_of(file: Path) -> str:
    """The dotted name that a file is imported by."""
    package = FOLDERS[relative(file.parent)]
    return package if file.stem == "__init__" else f"{package}.{file.stem}"


def room_of(module: str) -> str:
    """The room that a module of hyperlens is in; "" for hyperlens itself."""
    return ([*module.split("."), ""])[1]


class Import(NamedTuple):
    line: int
    target: str  # the module it reaches
    is_relative: bool


def our_imports(file: Path) -> Iterator[Import]:
    """Every import of ours, late ones and those for type checkers included."""
    modules = set(map(module_of, package_files()))
    own = module_of(file).split(".")
    package = own if file.stem == "__init__" else own[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [(alias.name.split("."), False) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = base + (node.module.split(".") if node.module else [])
            found = [([*module, alias.name], node.level > 0) for alias in node.names]
        else:
            continue
        for parts, is_relative in found:
            if parts[0] in ("probes", "training"):
                parts = ["hyperlens", *parts]
            if parts[0] != "hyperlens" or parts[1:] == ["__version__"]:
                continue
            # `from x import y`: y is a module, or something in x.
            while ".".join(parts) not in modules:
                parts = parts[:-1]
            yield Import(node.lineno, ".".join(parts), is_relative)


def broken_rules(file: Path) -> Iterator[str]:
    module = module_of(file)
    room = room_of(module)
    for line, target, is_relative in our_imports(file):
        place = f"{relative(file)}:{line}"
        if not is_relative and room in ("probes", "training"):
            yield f"{place} imports {target} absolutely; write a relative import"
        other = room_of(target)
        if room and other not in ("", room) and LEVEL[other] >= LEVEL[room]:
            yield f"{place} imports {target}; {room} may import only from the rooms above it"
        if room and not other:
            yield f"{place} imports from hyperlens itself; name the module"


def test_every_module_is_in_a_room() -> None:
    rooms = {room_of(module_of(file)) for file in package_files()} - {"", "__main__"}
    assert rooms <= LEVEL.keys(), (
        f"new rooms {sorted(rooms - LEVEL.keys())}: say in ROOMS, in {Path(__file__).name}, what "
        "each may import"
    )
    assert LEVEL["training"] > LEVEL["probes"]
    assert not any(
        room_of(target) == "probes"
        for file in (ROOT / "training").glob("*.py")
        for _, target, _ in our_imports(file)
    ), "training never sees a probe"


@pytest.mark.parametrize("file", package_files(), ids=relative)
def test_imports_go_up_the_list_only(file: Path) -> None:
    if room_of(module_of(file)) not in ("", "__main__"):
        assert not list(broken_rules(file))


def test_no_file_imports_in_a_circle() -> None:
    """Late imports and those for type checkers included."""
    graph = {
        module_of(file): {target for _, target, _ in our_imports(file)} - {module_of(file)}
        for file in package_files()
        if module_of(file) != "hyperlens"  # names the public API without loading it
    }
    list(TopologicalSorter(graph).static_order())


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
