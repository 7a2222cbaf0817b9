"""Every snippet of the README is run, in order, as it stands there."""

import contextlib
import importlib.util
import re

import pytest
from conftest import ROOT, lora, perturbed, unchecked
from transformers import AutoModelForCausalLM, AutoTokenizer

import hyperlens
from hyperlens.embedded import embedded_base, embedded_tales

README = (ROOT / "README.md").read_text(encoding="utf-8")
N_LAYERS = 6
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
STARTED = (ROOT / "docs/getting-started.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The names that all snippets leave behind, run where the folders they name exist."""
    folder = tmp_path_factory.mktemp("readme")
    base = AutoModelForCausalLM.from_pretrained(embedded_base())
    base.model.layers = base.model.layers[:N_LAYERS]  # as many as late-stage LoRA trains, and one
    base.config.num_hidden_layers = N_LAYERS
    tokenizer = AutoTokenizer.from_pretrained(embedded_base())
    for name, model in (("base", base), ("tuned", perturbed(base, 0.02))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    lora(base, "llama").save_pretrained(folder / "lora-adapter")
    tales = [" ".join(tale.split()) for tale in embedded_tales()[:5]]
    for name, length in (("texts.txt", 160), ("stories.txt", 400)):
        cut = "\n\n".join(tale[:length] for tale in tales)
        (folder / name).write_text(cut, encoding="utf-8")
    names: dict = {}
    # Whether shapes and types fit is tested function by function.
    with contextlib.chdir(folder), contextlib.redirect_stdout(None), unchecked():
        for snippet in SNIPPETS:
            exec(compile(snippet, "README.md", "exec"), names)
    names["folder"] = folder
    return names


@pytest.mark.slow
def test_the_snippets_do_what_they_say(ran: dict) -> None:
    frame = ran["comparison"].to_frame()
    assert {"norm_growth", "drift"} == set(frame.probe)
    rows = frame[frame.probe == "norm_growth"]
    assert list(rows.layer) == list(range(N_LAYERS + 1))
    assert ran["logits"].shape[-1] == ran["pair"].base.hooked.cfg.d_vocab
    assert ran["sweep"].extras["decisions"] > 0
    assert ran["null"].meta["options"]["n_controls"] == 2
    assert ran["model"].cfg.n_layers == N_LAYERS
    assert ran["lora"].n_layers == N_LAYERS
    for name in ("layers.svg", "report.html", "lora"):
        assert (ran["folder"] / name).exists()


def test_a_probe_takes_a_dozen_lines() -> None:
    (snippet,) = (one for one in SNIPPETS if "class NormGrowth" in one)
    body = re.search(r"class NormGrowth.*?(?=\n\n\n)", snippet, re.DOTALL)
    assert body is not None
    assert len([line for line in body[0].splitlines() if line.strip()]) <= 12


def test_the_readme_is_short_and_its_links_exist() -> None:
    assert len(README.splitlines()) <= 200
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("http") or (ROOT / link).exists(), link


def test_the_first_comparison_is_the_readmes(ran: dict) -> None:
    """Run there; what follows is printed, not written down."""
    (snippet,) = re.findall(r"```python\n(.*?)```", STARTED, re.DOTALL)
    for line in snippet.splitlines():
        name = line.partition(" import ")[0] if " import " in line else line
        assert name in README, line
    for name in re.findall(r"`(\w+)[(`]", STARTED):
        if name.islower() and "_" in name and name not in ("d_model",):
            assert name in ran or hasattr(hyperlens, name), name


def test_the_links_of_llms_txt_exist() -> None:
    text = (ROOT / "docs/llms.txt").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert len(links) > 10
    assert all((ROOT / "docs" / link).exists() for link in links)


def test_one_version_everywhere() -> None:
    spec = importlib.util.spec_from_file_location(
        "check_release", ROOT / "scripts/check_release.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.version() == hyperlens.__version__
    assert module.problems() == []


def test_the_folders_the_readme_names_exist() -> None:
    tree = README[README.index("## Where things are") :]
    tree = tree[tree.index("```") : tree.rindex("```")]
    for name in set(re.findall(r"(\w+)/", tree)):
        assert (ROOT / name).is_dir() or (ROOT / "hyperlens" / name).is_dir(), name
    rooms = {path.name for path in (ROOT / "hyperlens").iterdir() if path.is_dir()}
    listed = set(re.findall(r"(\w+)/", tree))
    assert {name for name in rooms if not name.startswith("__")} <= listed
