"""What gets built, shipped and imported is the tree, under the right names, and nothing else."""

import ast
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import HeaderParser
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
HOMES = {"hyperlens": "hyperlens", "probes": "hyperlens/probes", "training": "hyperlens/training"}
LOCATE = (
    "import json, hyperlens, hyperlens.probes, hyperlens.training;"
    "print(json.dumps([m.__file__ for m in (hyperlens, hyperlens.probes, hyperlens.training)]))"
)


class Built(NamedTuple):
    tree: Path
    wheel: Path
    sdist: Path
    wheel_from_sdist: Path


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def copy_tree(target: Path) -> None:
    """Copy what git tracks or would track, links as links: no environments, no old builds."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    for name in filter(None, listed.split("\0")):
        if os.path.lexists(ROOT / name):  # a file may be deleted but not yet from the index
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name, follow_symlinks=False)


def build(source: Path, out: Path, *kinds: str) -> None:
    # Without isolation nothing is downloaded: the backend is part of the dev environment.
    run(sys.executable, "-m", "build", "--no-isolation", *kinds, "--outdir", out, source)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout to know which files belong to the tree")
    folder = tmp_path_factory.mktemp("packaging")
    tree = folder / "tree"
    copy_tree(tree)
    build(tree, folder / "dist", "--sdist", "--wheel")
    (wheel,) = (folder / "dist").glob("*.whl")
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    build(unpacked, folder / "second", "--wheel")
    (wheel_from_sdist,) = (folder / "second").glob("*.whl")
    return Built(tree, wheel, sdist, wheel_from_sdist)


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel alone in a folder; its dependencies come from the running environment."""
    target = tmp_path_factory.mktemp("installed")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input")
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", "--target", target, built.wheel)
    return target


def sources(tree: Path) -> dict[str, Path]:
    """Every source file, by its place in the tree; what the links show is not seen twice."""
    return {
        file.relative_to(tree).as_posix(): file
        for folder in HOMES
        for file in (tree / folder).rglob("*.py")
        if not behind_a_link(tree, file)
    }


def behind_a_link(tree: Path, file: Path) -> bool:
    links = [tree / "hyperlens" / name for name in ("probes", "training")]
    return any(link in file.parents for link in links)


def shipped_by(tree: Path) -> dict[str, bytes]:
    """The files a wheel must hold, by their place in it."""
    files = {
        f"{HOMES[name.split('/')[0]]}/{name.split('/', 1)[1]}": file.read_bytes()
        for name, file in sources(tree).items()
    }
    embedded = tree / "hyperlens/embedded"
    data = [tree / "hyperlens/py.typed", *embedded.glob("*.jsonl"), *embedded.glob("*.md")]
    data += [file for file in (embedded / "base").iterdir() if file.is_file()]
    data += [tree / "hyperlens/render" / name for name in ("notebook.css", "page.css", "page.js")]
    data += [tree / "hyperlens/reproduction/paper_numbers.csv"]
    data += [tree / "hyperlens/judging/paper_prompt.txt"]
    data += [file for file in (tree / "hyperlens").rglob("*.pyi") if not behind_a_link(tree, file)]
    files |= {file.relative_to(tree).as_posix(): file.read_bytes() for file in data}
    stubs = [file for name in ("probes", "training") for file in (tree / name).glob("*.pyi")]
    return files | {f"hyperlens/{f.relative_to(tree).as_posix()}": f.read_bytes() for f in stubs}


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        return {name: archive.read(name) for name in names}


def metadata(wheel: Path, name: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        (path,) = (path for path in archive.namelist() if path.endswith(f".dist-info/{name}"))
        return archive.read(path).decode()


def test_the_wheel_is_the_tree(built: Built) -> None:
    expected, actual = shipped_by(built.tree), contents(built.wheel)
    assert sorted(actual) == sorted(expected)
    assert actual == expected
    assert {"hyperlens/probes/__init__.py", "hyperlens/training/__init__.py"} <= actual.keys()


def test_a_wheel_from_the_sdist_is_the_same(built: Built) -> None:
    assert contents(built.wheel_from_sdist) == contents(built.wheel)


def test_the_sdist_holds_each_source_once(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        names = {member.name.split("/", 1)[-1] for member in archive if not member.isdir()}
    assert {name for name in names if name.endswith(".py")} == set(sources(built.tree))
    assert {"pyproject.toml", "LICENSE", "README.md", "hyperlens/py.typed"} <= names


def test_the_metadata_is_right(built: Built) -> None:
    import hyperlens

    header = HeaderParser().parsestr(metadata(built.wheel, "METADATA"))
    assert header["Name"] == "hyperlens"
    assert header["Version"] == hyperlens.__version__
    assert header["License-Expression"] == "MIT"
    assert "hyperlens = hyperlens.cli:main" in metadata(built.wheel, "entry_points.txt")
    assert metadata(built.wheel, "licenses/LICENSE")


def test_a_users_own_folders_do_not_shadow_ours(installed: Path, tmp_path: Path) -> None:
    for name in ("probes", "training"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('the wrong one')\n")
    found = run(sys.executable, "-c", LOCATE, cwd=tmp_path, PYTHONPATH=str(installed))
    for file, home in zip(json.loads(found), HOMES.values(), strict=True):
        assert Path(file) == installed / home / "__init__.py"


def test_the_editable_install_reads_the_tree(tmp_path: Path) -> None:
    try:
        distribution("hyperlens")
    except PackageNotFoundError:
        pytest.skip("hyperlens is not installed here; `make test` installs it")
    found = run(sys.executable, "-c", LOCATE, cwd=tmp_path)
    for file, folder in zip(json.loads(found), HOMES, strict=True):
        assert Path(file).resolve() == ROOT / folder / "__init__.py"


@pytest.mark.parametrize("folder", ["probes", "training"])
def test_a_stray_import_from_the_root_fails_at_once(folder: str) -> None:
    # Otherwise every class would exist twice, once under each name.
    code = f"try: import {folder}\nexcept ImportError as error: print(error)"
    assert "beyond top-level package" in run(sys.executable, "-c", code)


@pytest.mark.parametrize("name", ["hyperlens.errors", "hyperlens.probes", "hyperlens.training"])
def test_shapes_are_checked_behind_the_links_too(name: str) -> None:
    spec = import_module(name).__spec__
    assert spec is not None
    assert type(spec.loader).__module__.startswith("jaxtyping")


STUBS = sorted(
    file
    for folder in HOMES
    for file in (ROOT / folder).rglob("__init__.pyi")
    if not behind_a_link(ROOT, file)
)


@pytest.mark.parametrize("stub", STUBS, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_what_a_stub_names_can_be_imported(stub: Path) -> None:
    folder, *below = stub.parent.relative_to(ROOT).parts
    package = import_module(".".join([HOMES[folder].replace("/", "."), *below]))
    tree = ast.parse(stub.read_text(encoding="utf-8"))
    imported = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    names = [alias.asname or alias.name for node in imported for alias in node.names]
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names += [target.id for target in targets if isinstance(target, ast.Name)]
    assert names
    assert set(package.__all__) == set(names)
    assert {*names} - {"__version__"} <= set(dir(package))
    for name in names:
        assert getattr(package, name) is not None, name


def test_names_of_the_last_version_say_what_they_are_called_now() -> None:
    import hyperlens

    for old, (module, now) in hyperlens._OLD_NAMES.items():
        assert old not in hyperlens.__all__
        with pytest.warns(DeprecationWarning, match=rf"hyperlens\.{module}\.{now} now"):
            found = getattr(hyperlens, old)
        assert found is getattr(import_module(f"hyperlens.{module}"), now)
    with pytest.raises(AttributeError, match="no_such_name"):
        import_module("hyperlens").__getattr__("no_such_name")


def test_the_line_that_uses_an_old_name_is_warned_about() -> None:
    code = "import hyperlens\ntry: hyperlens.read_texts\nexcept Warning as error: print(error)"
    said = run(sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", code)
    assert said.startswith("hyperlens.read_texts is hyperlens.data.texts.read_texts now")
