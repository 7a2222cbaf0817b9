"""Hub ids, by the real loading code, from a hub cache on disk: no network is touched."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import lora, make_tiny
from test_corpus import make_tokenizer

pytestmark = pytest.mark.transformer_lens

PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
from conftest import token_texts
from hyperlens import compare_models, load_hooked
from hyperlens.errors import HyperlensError
texts = token_texts()
assert load_hooked(sys.argv[2], device="cpu").cfg.n_layers == 3
comparison = compare_models("someone/base", sys.argv[2], texts, progress=False, device="cpu")
print(comparison.meta["base"]["kind"], comparison.meta["base"]["name"])
print(comparison.value("drift", "l2", 3, "raw") > 0)
print(type(load_hooked("someone/base", device="cpu")).__name__)
from_hub = compare_models("someone/base", "someone/adapter", texts, progress=False, device="cpu")
print(from_hub.meta["tuned"]["kind"], from_hub.meta["tuned"]["name"])
print(from_hub.to_frame().equals(comparison.to_frame()))
print(load_hooked("someone/adapter", device="cpu").cfg.n_layers)
try:
    load_hooked("someone/absent")
except HyperlensError as error:
    print(error)
"""


def in_hub_cache(folder: Path, home: Path, name: str) -> None:
    """Lay a checkpoint folder out as the hub's cache has it."""
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / "0123456789abcdef"
    shutil.copytree(folder, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)


@pytest.mark.slow
def test_a_hub_id_and_an_adapter_that_names_it(tmp_path):
    base = make_tiny("llama")
    base.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    in_hub_cache(tmp_path / "base", tmp_path / "home", "someone/base")
    lora(make_tiny("llama"), "llama").save_pretrained(tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    named = json.loads(config.read_text()) | {"base_model_name_or_path": "someone/base"}
    config.write_text(json.dumps(named))
    in_hub_cache(tmp_path / "adapter", tmp_path / "home", "someone/adapter")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(Path(__file__).parent), str(tmp_path / "adapter")],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    kind, drifted, bridge, adapter, same, layers, absent = done.stdout.strip().splitlines()
    assert kind == "hub someone/base"
    assert drifted == "True"
    assert bridge == "TransformerBridge"
    assert adapter == "adapter someone/adapter"
    assert same == "True"
    assert layers == "3"
    assert "someone/absent" in absent
    assert "hub" in absent
