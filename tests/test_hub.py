"""Pushing to the Hub and loading from it: the real client against `hub_server.HubServer`, each side its own process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer
from test_hub_card import example_results

from hf_efficient_attn.hub import model_card

ROOT = Path(__file__).parents[1]

PUSH = """
import sys, torch
torch.set_num_threads(1)
torch.manual_seed(0)
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "d", "e", "f", "g"]
tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
config = BertConfig(vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                    intermediate_size=32, max_position_embeddings=64, num_labels=3)
model = BertForSequenceClassification(config).eval()
batch = tokenizer(["a b c d e f g a b c", "g f e"], padding=True, return_tensors="pt")
with torch.no_grad():
    dense = model(**batch).logits
    {patch}
    logits = model(**batch).logits
print("changed by the patch:", not torch.equal(dense, logits))
model.push_to_hub("me/tiny")
tokenizer.push_to_hub("me/tiny")
{card}
torch.save(dict(logits=logits, state=model.state_dict()), sys.argv[1])
"""

LOAD = """
import json, sys, torch
torch.set_num_threads(1)
{library}
from transformers import AutoModelForSequenceClassification, AutoTokenizer

pushed = torch.load(sys.argv[1])
model = AutoModelForSequenceClassification.from_pretrained("me/tiny"{revision}).eval()
tokenizer = AutoTokenizer.from_pretrained("me/tiny"{revision})
batch = tokenizer(["a b c d e f g a b c", "g f e"], padding=True, return_tensors="pt")
with torch.no_grad():
    logits = model(**batch).logits
state = model.state_dict()
equal_weights = state.keys() == pushed["state"].keys() and all(torch.equal(state[k], pushed["state"][k]) for k in state)
print(json.dumps(dict(model_type=type(model.config).model_type, model=type(model).__name__,
                      equal_logits=torch.equal(logits, pushed["logits"]), equal_weights=equal_weights)))
"""

CARD = "from huggingface_hub import ModelCard; ModelCard.load('card.md').push_to_hub('me/tiny')"
PATCH = "import hf_efficient_attn; hf_efficient_attn.patch_model(model, 'linformer', rank=4)"


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture
def client(hub, tmp_path):
    """Run Python code in a process of its own, whose Hub is `hub`, with an empty cache of its own each time."""

    def run(code: str, check: bool = True, **parts: str) -> subprocess.CompletedProcess:
        for name in ("patch", "card", "library", "revision"):
            code = code.replace("{" + name + "}", parts.get(name, ""))
        home = tmp_path / f"home{len(list(tmp_path.glob('home*')))}"
        home.mkdir()
        command = [sys.executable, "-c", code, str(tmp_path / "pushed.pt")]
        environment = hub.environment(home) | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0 or not check, done.stderr
        return done

    return run


def loaded(done: subprocess.CompletedProcess) -> dict:
    return json.loads(done.stdout.splitlines()[-1])


def test_plain_transformers_model_makes_the_round_trip(hub, client):
    """The positive control: with this library nowhere in sight, the server is a Hub to Transformers."""
    client(PUSH)
    files = hub.files("me/tiny")
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"} <= set(files)
    assert files["model.safetensors"].lfs
    assert not files["config.json"].lfs
    assert hub.asked("PUT", rf"^/lfs/{files['model.safetensors'].sha256}$")
    assert hub.asked("POST", r"^/me/tiny.git/info/lfs/objects/batch$")
    assert hub.asked("POST", r"^/me/tiny.git/info/lfs/verify$")
    assert len(hub.asked("POST", r"^/api/models/me/tiny/commit/main$")) == 2

    assert loaded(client(LOAD)) == {
        "model_type": "bert",
        "model": "BertForSequenceClassification",
        "equal_logits": True,
        "equal_weights": True,
    }
    assert hub.asked("GET", r"^/me/tiny/resolve/\w+/model.safetensors$")


def test_patched_model_makes_the_round_trip(hub, client, tmp_path):
    card = model_card(example_results(), "mixture", "me/tiny")
    (tmp_path / "card.md").write_text(card)
    pushed = client(PUSH, patch=PATCH, card=CARD)
    assert "changed by the patch: True" in pushed.stdout
    files = hub.files("me/tiny")
    assert files["model.safetensors"].lfs
    assert hub.asked("PUT", rf"^/lfs/{files['model.safetensors'].sha256}$")
    config = json.loads(files["config.json"].content)
    assert config["model_type"] == "efficient_bert"
    assert "efficient_attention" in config
    assert files["README.md"].content.decode() == card

    assert loaded(client(LOAD, library="import hf_efficient_attn")) == {
        "model_type": "efficient_bert",
        "model": "EfficientBertForSequenceClassification",
        "equal_logits": True,
        "equal_weights": True,
    }

    stranger = client(LOAD, check=False)
    assert stranger.returncode != 0
    assert "model type `efficient_bert` but Transformers does not recognize this architecture" in stranger.stderr


def test_branches_hold_versions_apart(hub, client):
    """A dense model on main and the patched one on a branch of the same repository."""
    client(PUSH)
    dense = hub.files("me/tiny")["model.safetensors"]
    client(PUSH.replace('"me/tiny")', '"me/tiny", revision="linformer")'), patch=PATCH)
    assert hub.files("me/tiny")["model.safetensors"] == dense
    assert hub.files("me/tiny", "linformer")["model.safetensors"] != dense
    on_branch = loaded(client(LOAD, library="import hf_efficient_attn", revision=', revision="linformer"'))
    assert on_branch["model_type"] == "efficient_bert"
    assert on_branch["equal_logits"]


def test_absent_repository_and_wrong_token_are_refused(hub, client):
    """The server can say no, and says it in the words that the client understands."""
    code = """
from huggingface_hub import create_repo, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
def refused(expected, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except expected as error:
        return type(error).__name__
    raise SystemExit(f"{call.__name__}{args} went through")
print(refused(RepositoryNotFoundError, hf_hub_download, "me/absent", "config.json"))
print(refused(HfHubHTTPError, create_repo, "me/new", token="hf_wrong"))
create_repo("me/new")
print(refused(HfHubHTTPError, create_repo, "me/new"))
create_repo("me/new", exist_ok=True)
print(refused(EntryNotFoundError, hf_hub_download, "me/new", "config.json"))
print(refused(RevisionNotFoundError, hf_hub_download, "me/new", "config.json", revision="absent"))
"""
    errors = client(code).stdout.split()
    assert errors[0] == "RepositoryNotFoundError"
    assert errors[-1] == "RevisionNotFoundError"
    assert len(errors) == 5
    assert list(hub.repositories) == ["me/new"]
