"""The examples in docstrings run, and give what they say."""

import doctest
import importlib

import pytest
from test_import_rules import module_of, package_files

MODULES = [
    module_of(file) for file in package_files() if ">>> " in file.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_run(name: str) -> None:
    found = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert found.attempted > 0
    assert found.failed == 0
