"""The README's own probe is run as it stands there."""

import re

import pandas as pd
from conftest import ROOT, make_tiny, perturbed, token_texts

README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(containing: str) -> str:
    (found,) = [b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if containing in b]
    return found


def test_the_probe_in_the_readme_works_and_takes_a_dozen_lines(capsys):
    code = block("class NormGrowth")
    body = code[code.index("class NormGrowth") : code.index("comparison =")]
    assert len([line for line in body.splitlines() if line.strip()]) <= 12
    base = make_tiny("llama")
    names = {"base": base, "tuned": perturbed(base), "texts": token_texts()}
    exec(compile(code, "README.md", "exec"), names)
    frame: pd.DataFrame = names["comparison"].to_frame()
    rows = frame[frame.probe == "norm_growth"]
    assert list(rows.layer) == [0, 1, 2, 3]
    assert (rows.low < rows.value).all()
    assert (rows.value < rows.high).all()
    assert "norm_growth" in capsys.readouterr().out


def test_the_logit_probe_in_the_readme_works():
    base = make_tiny("llama")
    names = {"base": base, "tuned": perturbed(base), "texts": token_texts()}
    exec("from hyperlens import compare_models", names)
    exec(compile(block("class Margin"), "README.md", "exec"), names)
    frame: pd.DataFrame = names["comparison"].to_frame()
    assert set(frame.probe) == {"margin", "logit_lens"}
    assert (frame[frame.probe == "margin"].value > 0).all()


def test_the_files_the_readme_names_exist():
    tree = README[README.index("## What is where") : README.index("## Development")]
    for name in set(re.findall(r"(\w+\.py)", tree)):
        assert (ROOT / "hyperlens" / name).exists(), name
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("http") or (ROOT / link).exists(), link
