"""The command line on a tiny model: what it prints, what it writes, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from hf_efficient_attn import available_variants, cli, patch_model

WORDS = [f"w{i}" for i in range(30)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("cli")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["[UNK]", *WORDS])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=31, n_positions=64, n_embd=16, n_layer=2, n_head=2)).save_pretrained(root)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(root)
    order = torch.randint(30, (200,), generator=torch.Generator().manual_seed(1))
    (root / "text.txt").write_text(" ".join(WORDS[i] for i in order))
    return root


def call(*args) -> tuple[int, str]:
    cli.console.width = 200
    done = CliRunner().invoke(cli.app, [str(arg) for arg in args])
    return done.exit_code, " ".join(done.output.split())


def test_variants_and_options() -> None:
    code, words = call("variants")
    assert code == 0 and all(name in words for name in available_variants())
    code, words = call("options", "sliding_window")
    assert code == 0 and "window" in words and "dense_below" in words
    code, words = call("options", "sliding_windows")
    assert code == 2 and "Did you mean 'sliding_window'" in words
    code, words = call("options", "combined")
    assert code == 0 and "[variant, share] of each part" in words  # which is no markup
    code, words = call("options", "[/red]")
    assert code == 2 and "unknown variant '[/red]'" in words


def test_measure(folder) -> None:
    code, words = call("measure", folder, "--variants", "block", "--lengths", 32, "--lengths", 96, "--repeats", 1)
    assert code == 0, words
    assert "repeated for this" in words and "96 tokens" in words and "block" in words
    assert call("measure", folder, "--variants", "blok", "--lengths", 32)[0] == 2
    code, words = call("measure", folder, "--variants", "block", "--lengths", 32, "--device", "moon")
    assert code == 2 and "--device moon: not on this machine" in words


def test_files_of_gguf(folder, monkeypatch) -> None:
    """Model and tokenizer come from the file that is named."""
    asked = []
    for kind in (cli.AutoModelForCausalLM, cli.AutoTokenizer):

        def load(path, gguf_file=None, kind=kind, load=kind.from_pretrained):
            asked.append((kind, gguf_file))
            return load(path)

        monkeypatch.setattr(kind, "from_pretrained", load)
    options = ["--candidates", "block", "--length", 48, "--texts", 1, "--max-loss", 9, "--gguf-file", "a.gguf"]
    code, words = call("select", folder, folder / "text.txt", *options, "--device", "cpu")
    assert code == 0, words
    assert asked == [(cli.AutoModelForCausalLM, "a.gguf"), (cli.AutoTokenizer, "a.gguf")]


def test_select_writes_a_mapping_that_patches(folder, tmp_path) -> None:
    output = tmp_path / "mapping.json"
    narrow = json.dumps({"variant": "sliding_window", "window": 2, "num_sinks": 0})
    asked = ["--candidates", narrow, "--length", 48, "--texts", 2, "--cost", "state"]
    code, words = call("select", folder, folder / "text.txt", *asked, "--max-cost", 0.5, "-o", output)
    assert code == 0, words
    assert "chosen" in words and "sliding_window in all" in words
    patch_model(AutoModelForCausalLM.from_pretrained(folder), json.loads(output.read_text()))
    code, words = call("select", folder, folder / "text.txt", *asked, "--max-cost", 0.0001)
    assert code == 2 and "the cheapest mapping" in words
    code, words = call("select", folder, folder / "text.txt", *asked[:2], "--length", 480, "--max-loss", 0.1)
    assert code == 2 and "fewer than the 480 asked for" in words


def test_a_folder_is_no_file_for_the_mapping(folder, tmp_path) -> None:
    given = ["select", folder, folder / "text.txt", "--candidates", "block", "--length", 32, "--max-loss", 9]
    code, words = call(*given, "--output", tmp_path)
    assert code == 2 and "a folder is there" in words


def test_one_variant_in_two_sizes(folder) -> None:
    sizes = [json.dumps({"variant": "sliding_window", "window": w}) for w in (2, 8)]
    asked = ["--length", 48, "--texts", 1, "--cost", "state", "--max-loss", 9]
    code, words = call("select", folder, folder / "text.txt", *(x for s in sizes for x in ("--candidates", s)), *asked)
    assert code == 0, words
    assert all(f"{size} in all" in words for size in sizes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"--candidates": '{"variant": '}, "not JSON"),
        ({"--output": "nowhere/mapping.json"}, "there is no folder nowhere"),
        ({"--max-loss": None}, "either max_loss"),
        ({"--length": 4000}, "fewer than the 4,000 asked for"),
        ({"MODEL": "./a/nowhere"}, "nowhere"),
    ],
)
def test_bad_input_to_select_is_a_sentence(folder, change, words) -> None:
    asked = {"--candidates": "block", "--length": 48, "--max-loss": 0.1} | change
    model = asked.pop("MODEL", folder)
    code, said = call("select", model, folder / "text.txt", *(x for k, v in asked.items() if v for x in (k, v)))
    assert code == 2 and words in said, said


@pytest.mark.parametrize(
    ("variant", "length", "words"), [("auto", 32, "unknown variant 'auto'"), ("block", 0, "at least one token")]
)
def test_bad_input_to_measure_is_a_sentence(folder, variant, length, words) -> None:
    code, said = call("measure", folder, "--variants", variant, "--lengths", length)
    assert code == 2 and words in said, said
