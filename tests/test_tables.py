"""Tables for papers: the cells of the page, escaped so that LaTeX and Markdown show just them."""

import ast
import itertools
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from test_import_rules import package_files
from test_results import make_comparison

from hyperlens import Comparison, check_comparison
from hyperlens.errors import ResultsError
from hyperlens.render.blocks import Details, Table
from hyperlens.render.tables import LAST_LATIN, LATEX, latex, markdown, parts, to_latex

MADE = make_comparison(4)
EVIL = r"""a_b & 50% #1 {x} \y $z$ ^~ <s> | "q" `c` [l](u) * -- -5 Δ→ρ‖²"""


def named(name: str) -> Comparison:
    """A comparison whose tuned model has this name."""
    return replace(MADE, meta={**MADE.meta, "tuned": {**MADE.meta["tuned"], "name": name}})


def table_of(comparison: Comparison, name: str) -> Table:
    (found,) = (part.table for part in parts(comparison.blocks()) if part.name == name)
    return found


# LaTeX, read back by its own rules

# What may stand in the text, longest first, and what it shows.
SHOWN = sorted(
    [*((code, c) for c, code in LATEX.items()), *((f"{c}{{}}", c) for c in "-',")],
    key=lambda pair: -len(pair[0]),
)
SPECIAL = set("\\{}#$%&_~^")


def shown(text: str) -> str:
    """What LaTeX shows of a text; fails where a character of its own language is left bare."""
    found = ""
    while text:
        code, c = next((pair for pair in SHOWN if text.startswith(pair[0])), (text[0], text[0]))
        assert code not in SPECIAL, f"a bare {text[:10]!r}"
        assert text[:2] not in ("--", "''", ",,"), "a ligature"
        found, text = found + c, text[len(code) :]
    return found


def plain(cell: str) -> str:
    """A cell as LaTeX shows it: signs of numbers are minus signs, spaces are one."""
    return re.sub(r"(?<![\w.])-(?=\d)", "−", " ".join(cell.split()))


def read_latex(text: str) -> list[tuple[str, list[list[str]]]]:
    """Captions and cells of the tables in a text; every other line is one that we know."""
    found = []
    for block in re.split(r"\\begin\{table\}\n", text)[1:]:
        lines = block.rstrip().splitlines()
        caption = re.fullmatch(r"\\caption\{(.*)\}", lines[1])
        columns = re.fullmatch(r"\\begin\{tabular\}\{(l?r*)\}", lines[3])
        assert caption is not None
        assert columns is not None
        assert re.fullmatch(r"\\label\{tab:[a-z0-9-]+\}", lines[2])
        assert (lines[0], lines[4], lines[6]) == (r"\centering", r"\toprule", r"\midrule")
        assert lines[-3:] == [r"\bottomrule", r"\end{tabular}", r"\end{table}"]
        rows = []
        for line in (lines[5], *lines[7:-3]):
            assert line.endswith(r" \\")
            cells = re.split(r"(?<!\\)&", line.removesuffix(r" \\"))
            assert len(cells) == len(columns[1])
            rows.append([shown(cell.strip()) for cell in cells])
        found.append((shown(caption[1]), rows))
    return found


def cells(table: Table) -> list[list[str]]:
    return [[plain(cell) for cell in row] for row in (table.head, *table.rows)]


@pytest.mark.parametrize("name", ["tuned", EVIL])
def test_latex_shows_the_cells_of_the_page(name: str) -> None:
    comparison = named(name)
    text = comparison.to_latex()
    assert text.startswith("% Needs \\usepackage{booktabs}.\n\\begin{table}")
    unfolded = [block for block in comparison.blocks() if isinstance(block, Table)]
    assert len(unfolded) == 3
    read = read_latex(text)
    assert [rows for _, rows in read] == [cells(table) for table in unfolded]
    for caption, _ in read:
        assert plain(f"base → {name}.") in caption


@given(st.text(st.characters(max_codepoint=0x17F, categories=["L", "N", "P", "S", "Zs"])))
def test_any_text_is_shown_as_it_is(text: str) -> None:
    table = Table(["a", text], [[text, text]])
    ((_, rows),) = read_latex(to_latex("x", [(*parts([table]), text)]))
    assert rows == cells(table)


def test_a_row_never_begins_with_what_the_row_above_would_take() -> None:
    for first in ("[1, 2]", "*", "-1"):
        assert latex(first)[0] not in "[*"


def test_what_pdflatex_does_not_know_is_said() -> None:
    assert "LuaLaTeX" not in MADE.to_latex("output")
    assert "LuaLaTeX" in named("模型").to_latex("output")


def strings(file: Path) -> set[str]:
    """The characters of all strings of a file but docstrings."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    nodes = (node for node in ast.walk(tree) if id(node) not in prose)
    return {
        c
        for node in nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for c in node.value
    }


def test_pdflatex_knows_all_that_our_tables_say() -> None:
    # A bullet begins verdicts in the terminal only.
    said = set().union(*map(strings, package_files())) - {"•"}
    assert {c for c in said if c > LAST_LATIN} <= LATEX.keys()


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_pdflatex_compiles_it(tmp_path: Path) -> None:
    body = named(EVIL).to_latex()
    text = r"\documentclass{article}\usepackage{booktabs}\begin{document}" + "\n"
    (tmp_path / "page.tex").write_text(text + body + r"\end{document}", encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "page.tex"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)


# Markdown, read back by a parser


def read_markdown(text: str) -> tuple[list[str], list[list[list[str]]]]:
    """Paragraphs, and the cells of tables, as a reader sees them."""
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)
    paragraphs: list[str] = []
    found: list[list[list[str]]] = []
    for before, token in itertools.pairwise(tokens):
        if token.type != "inline":
            if token.type == "tr_open":
                found[-1].append([])
            elif before.type == "table_open":
                found.append([])
            continue
        words = "".join(child.content for child in token.children or ())
        assert {child.type for child in token.children or ()} <= {"text", "text_special"}
        if before.type == "paragraph_open":
            paragraphs.append(words)
        else:
            found[-1][-1].append(words)
    return paragraphs, found


def as_typed(table: Table) -> list[list[str]]:
    return [[" ".join(cell.split()) for cell in row] for row in (table.head, *table.rows)]


@pytest.mark.parametrize("name", ["tuned", EVIL])
def test_markdown_shows_the_cells_of_the_page(name: str) -> None:
    comparison = named(name)
    paragraphs, found = read_markdown(comparison.to_markdown())
    unfolded = [block for block in comparison.blocks() if isinstance(block, Table)]
    assert found == [as_typed(table) for table in unfolded]
    assert f"base → {name}." in paragraphs[0]


def test_numbers_stay_readable_in_markdown() -> None:
    assert markdown("0.675 [0.643, 0.707]") == "0.675 [0.643, 0.707]"
    assert "[0.643" not in markdown("<0.643")


# which tables, and their captions


def test_a_table_is_chosen_by_its_heading() -> None:
    assert MADE.to_latex("The output") == MADE.to_latex("output") == MADE.to_latex("OUTPUT")
    ((caption, rows),) = read_latex(MADE.to_latex("output"))
    assert rows == cells(table_of(MADE, "The output"))
    # The same words as in the terminal.
    for row in table_of(MADE, "The output").rows:
        for cell in row:
            assert cell in MADE.summary()
    assert caption.startswith("The output. base → tuned. teacher-forced, over all tokens")
    assert "Over 10 texts, 1,020 tokens (BOS included). Settings: sink threshold 10;" in caption
    assert caption.endswith("; seed 0; dtype float32; hyperlens 0.1.0.")
    assert "batch size" not in caption


def test_folded_tables_are_found_by_name_only() -> None:
    folded = [b for block in MADE.blocks() if isinstance(block, Details) for b in block.blocks]
    assert any(isinstance(block, Table) for block in folded)
    ((_, rows),) = read_latex(MADE.to_latex("effective dimension at every layer"))
    assert len(rows) == 1 + 5 * 3
    assert "effective dimension at every layer" not in MADE.to_latex()


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("outptu", "no table is called 'outptu': expected one of The output; Along the layers;"),
        ("the", "tables are called 'the': expected one of The output; "),
        ("", "no table is called ''"),
    ],
)
def test_other_names_are_one_line(part: str, message: str) -> None:
    with pytest.raises(ResultsError, match=re.escape(message)):
        MADE.to_latex(part)
    with pytest.raises(ResultsError, match=re.escape(message)):
        MADE.to_markdown(part)


def names(tables: Sequence[Table]) -> list[str]:
    return [part.name for part in parts(tables)]


def test_every_table_has_a_name_of_its_own() -> None:
    assert names([Table(["layer"], []), Table(["layer"], []), Table([""], [])]) == [
        *("layer", "layer (2)"),
        "table",
    ]


def test_a_check_is_a_table_too() -> None:
    found = check_comparison(MADE, [{"metric": "logit_lens.kl", "layer": -1, "at_most": 0.5}])
    ((caption, rows),) = read_latex(found.to_latex())
    assert rows[1][0] == "logit_lens.kl, final_norm"
    assert rows[1][-1] == "not met"
    assert caption.startswith("Is the change within bounds? base → tuned. met: the whole interval")
