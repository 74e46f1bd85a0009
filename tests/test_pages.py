"""The code of the documentation's pages runs as it stands there, in the order of the page, on tiny models."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer
from test_cli import call, folder  # noqa: F401
from transformers import BertTokenizer
from typer.main import get_command
from zoo import ZOO

import hf_efficient_attn as hea
from hf_efficient_attn import auxiliary, cli, hub, measuring, recovery, selection

ROOT = Path(__file__).parent.parent
API = ROOT / "docs" / "api.md"
LIMITS = ROOT / "docs" / "limits.md"
TRAINING = ROOT / "docs" / "training_and_shipping.md"
INTERNAL = {"AuxiliaryLearner", "choose", "main"}
OF_ITS_OWN = "# a process of its own\n"


def blocks(page: Path, language: str = "python") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.S)


@pytest.mark.slow  # trains, and exports to ONNX
def test_from_a_patch_to_a_shipped_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a BERT of one layer that reads 128 tokens in place of MiniLM, and a Hub on this machine."""
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *map(chr, range(33, 127)),
        *(f"##{chr(i)}" for i in range(33, 127)),
    ]
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}, model_max_length=128).save_pretrained(
        tmp_path / "tiny"
    )
    ZOO["bert"].build(vocab_size=len(words), num_hidden_layers=1, max_position_embeddings=128).save_pretrained(
        tmp_path / "tiny"
    )
    monkeypatch.chdir(tmp_path)
    known: dict = {}
    with HubServer() as hub:
        environment = hub.environment(tmp_path / "home") | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        for code in blocks(TRAINING):
            code = re.sub(r"^MODEL = .*", 'MODEL = "tiny"', code, flags=re.M).replace("1024", "160")
            if code.startswith(OF_ITS_OWN):
                subprocess.run([sys.executable, "-c", code], env=environment, check=True)
            else:
                exec(code, known)
        files = hub.files("me/minilm-hedgehog")
    assert {"model.safetensors", "tokenizer.json", "README.md"} <= set(files)
    assert "import hf_efficient_attn" in files["README.md"].content.decode()


def test_every_public_name_is_in_the_reference() -> None:
    page = API.read_text(encoding="utf-8")
    named = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`\n]+)`", page))))
    assert set(hea.__all__) - named == set()
    for module in (auxiliary, hub, measuring, recovery, selection):
        own = {name for name, x in vars(module).items() if getattr(x, "__module__", None) == module.__name__}
        assert {name for name in own if name[0] != "_"} - named - INTERNAL == set(), module.__name__
    assert "no_such_name" not in named


@pytest.mark.slow  # measures and chooses
def test_the_reference_s_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").symlink_to(ROOT / "results")
    known = {"__name__": __name__}  # where dataclasses look for their module
    for code in blocks(API):
        exec(code, known)


def test_the_reference_s_commands_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").symlink_to(ROOT / "results")
    (commands,) = blocks(API, "bash")
    given = {"gpt2": str(folder), "book.txt": str(folder / "text.txt")}
    for line in commands.splitlines():
        program, *args = shlex.split(line)
        assert program == "hf-efficient-attn"
        code, said = call(*(given.get(arg, arg) for arg in args))
        assert code == 0, said
    assert json.loads(Path("mapping.json").read_text()) is not None
    options = set(re.findall(r"`(--[a-z-]+)", API.read_text(encoding="utf-8"))) - {"--help"}
    commands = (get_command(cli.app).commands[name] for name in ("measure", "select", "card"))
    assert options == {name for c in commands for p in c.params for name in p.opts if name[:2] == "--"} - {"--help"}


def test_refusals_are_quoted_as_they_are_raised() -> None:
    """What a reader finds the page by: parts of sentences, of which the code has each within one string."""
    spoken = []
    for file in (ROOT / "hf_efficient_attn").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [x.value if isinstance(getattr(x, "value", None), str) else "\0" for x in parts]
            spoken += ["".join(texts)] if isinstance(node, (ast.JoinedStr, ast.Constant)) else []
    rows = [line for line in LIMITS.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    quoted = [part for row in rows for part in re.findall('"([^"]+)"', re.sub("`[^`]*`", "", row))]
    assert len(quoted) > 50
    assert [part for part in quoted if not any(part in sentence for sentence in spoken)] == []
    assert not any("no such sentence" in sentence for sentence in spoken)
