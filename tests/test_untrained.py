"""The reports of untrained variants (perplexity, embeddings, export_onnx, passkey, ... of examples) on tiny models."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples import choose, choose_encoder, embeddings, export_onnx, passkey, perplexity, rows
from hf_efficient_attn import patched

WORDS = [f"w{i}" for i in range(30)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A GPT-2 and a BERT of a few words, a text, and labelled texts whose class is their most frequent word."""
    root = tmp_path_factory.mktemp("untrained")
    special = ["[UNK]", "[PAD]", "[CLS]", "[SEP]"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "pad", "cls", "sep")}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **names)
    torch.manual_seed(0)
    size = len(tokenizer)
    # Weights far larger than at the start of training, so that attention matters.
    gpt2 = GPT2LMHeadModel(
        GPT2Config(vocab_size=size, n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3)
    )
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    bert = BertModel(BertConfig(vocab_size=size, max_position_embeddings=32, initializer_range=0.3, **shape))
    for name, model in (("gpt2", gpt2), ("bert", bert)):
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    draw = torch.randint(30, (200,), generator=torch.Generator().manual_seed(1))
    (root / "text.txt").write_text(" ".join(WORDS[i] for i in draw))
    (root / "data").mkdir()
    for split, count in (("train", 24), ("test", 12)):
        rows = []
        for i in range(count):
            noise = torch.randint(30, (30,), generator=torch.Generator().manual_seed(count + i))
            rows.append({"text": " ".join([*(WORDS[j] for j in noise), *[WORDS[i % 2]] * 20]), "label": str(i % 2)})
        (root / "data" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def read(folder: Path, file: Path, *variants: str) -> dict[str, dict]:
    given = ["--model", str(folder / "gpt2"), "--texts", str(folder / "text.txt"), "--lengths", "64", "--windows", "2"]
    rows = perplexity.main([*given, "--variants", *variants, "--output", str(file)])["rows"]
    assert json.loads(file.read_text())["rows"] == rows
    return {row["label"]: row for row in rows}


def test_perplexity_of_dense_and_variants(folder, tmp_path) -> None:
    rows = read(folder, tmp_path / "a.json", "flash", "block")
    model, tokenizer = perplexity.load(str(folder / "gpt2"))
    ids = tokenizer((folder / "text.txt").read_text(), return_tensors="pt").input_ids[:, :128].view(2, 64)
    with torch.no_grad():
        want = math.exp(model(input_ids=ids, labels=ids).loss.item())
    assert rows["dense"]["perplexity"] == pytest.approx(want, rel=1e-4)
    assert rows["flash"]["perplexity"] == pytest.approx(want, rel=1e-4)
    assert rows["dense"]["cache_bytes"] == 2 * 2 * 64 * 32 * 4  # layers, keys and values, tokens, width, bytes
    for row in rows.values():
        assert 0 < row["seconds_ratio"] < 100 and row["peak_bytes"] > row["cache_bytes"] and row["tokens"] == 128


def test_what_was_measured_stays(folder, tmp_path, monkeypatch) -> None:
    (tmp_path / "few.yaml").write_text(
        "near: {variant: block, block_size: 8, num_sinks: 0}\nbroken: {variant: funel}\n"
    )
    before = read(folder, tmp_path / "a.json", str(tmp_path / "few.yaml"))
    assert before["near"]["perplexity"] != pytest.approx(before["dense"]["perplexity"], rel=1e-3)
    assert before["near"]["cache_ratio"] < 1 and "funnel" in before["broken"]["error"]
    counted, measure = [], perplexity.measure
    monkeypatch.setattr(perplexity, "measure", lambda *args: counted.append(1) or measure(*args))
    after = read(folder, tmp_path / "a.json", str(tmp_path / "few.yaml"), "flash")
    assert len(counted) == 1 and {name: after[name] for name in before} == before
    with pytest.raises(SystemExit, match="another run"):
        perplexity.main(["--texts", "topics", "--output", str(tmp_path / "a.json")])
    (tmp_path / "few.yaml").write_text("near: {variant: block, block_size: 4, num_sinks: 0}\n")
    with pytest.raises(SystemExit, match=r"holds 'near' as .*'block_size': 8.* another label"):
        read(folder, tmp_path / "a.json", str(tmp_path / "few.yaml"))
    with pytest.raises(ValueError, match="200 tokens; 2 stretches of 128 need 256"):
        perplexity.stretches(perplexity.load(str(folder / "gpt2"))[1], [str(folder / "text.txt")], 128, 2)


def test_rows_are_shown_where_dense_failed_and_as_they_are(folder, tmp_path, monkeypatch, capsys) -> None:
    measure = perplexity.measure

    def fails(model: torch.nn.Module, parts: list) -> dict:
        if not any(hasattr(part, "efficient_attn") for part in model.modules()):
            raise RuntimeError("[enforce fail] [/x] no memory")
        return measure(model, parts)

    monkeypatch.setattr(perplexity, "measure", fails)
    read(folder, tmp_path / "a.json", "block")
    shown = capsys.readouterr().out.splitlines()
    assert any("[enforce fail] [/x] no memory" in line and "dense" in line for line in shown if "│" in line)
    assert any("block" in line and " - " in line for line in shown if "│" in line)


def test_a_file_that_cannot_be_written_is_the_old_one(tmp_path, monkeypatch) -> None:
    results = {"rows": []}
    rows.add_row(results, {"label": "a"}, tmp_path / "a.json")
    write = Path.write_text

    def full(path: Path, text: str, **options) -> None:
        write(path, text[:20], **options)
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space"):
        rows.add_row(results, {"label": "b"}, tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text()) == {"rows": [{"label": "a"}]}


def test_embeddings_of_dense_and_variants(folder, tmp_path) -> None:
    (tmp_path / "few.yaml").write_text("near: {variant: block, block_size: 4}\nbroken: {variant: funel}\n")
    given = ["--model", str(folder / "bert"), "--dataset", str(folder / "data"), "--max-length", "48"]
    given += ["--train-texts", "24", "--test-texts", "12", "--output", str(tmp_path / "e.json"), "--variants"]
    rows = {row["label"]: row for row in embeddings.main([*given, "flash", str(tmp_path / "few.yaml")])["rows"]}
    assert rows["dense"]["fidelity"] == pytest.approx(1, abs=1e-5)
    assert rows["flash"]["fidelity"] == pytest.approx(1, abs=1e-5)
    assert rows["flash"]["probe_accuracy"] == rows["dense"]["probe_accuracy"] > 0.8  # guessing: 0.5
    assert rows["near"]["fidelity"] < 0.999 and "funnel" in rows["broken"]["error"]
    again = embeddings.main([*given, "flash", str(tmp_path / "few.yaml"), "linear"])["rows"]
    assert [row["label"] for row in again] == [*rows, "linear"] and again[: len(rows)] == list(rows.values())
    assert again[-1]["fidelity"] < 0.999


def test_selection_is_judged_on_another_text(folder, tmp_path) -> None:
    other = tmp_path / "other.txt"
    other.write_text(" ".join(reversed((folder / "text.txt").read_text().split())))
    (tmp_path / "few.yaml").write_text(
        "near: {variant: block, block_size: 8}\nhalf: {variant: block, block_size: 32}\n"
    )
    given = ["--model", str(folder / "gpt2"), "--choose-on", str(folder / "text.txt"), "--judge-on", str(other)]
    given += ["--length", "64", "--variants", str(tmp_path / "few.yaml"), "--max-cost", "0.6", "--cost", "flops"]
    results = choose.main([*given, "--output", str(tmp_path / "s.json")])
    assert json.loads((tmp_path / "s.json").read_text()) == results
    rows = {row["label"]: row for row in results["rows"]}
    assert list(rows) == ["dense", "chosen", "near", "half"]
    assert rows["chosen"]["share"]["flops"] <= 0.6 < 1 == rows["dense"]["share"]["flops"]
    assert rows["chosen"]["rise_percent_where_chosen"] <= rows["near"]["rise_percent_where_chosen"]
    heads = choose.main([*given, "--per-head", "--output", str(tmp_path / "h.json")])["rows"][1]
    assert sum(heads["places"].values()) == 4 and heads["share"]["flops"] <= 0.6
    want, tokenizer = perplexity.load(str(folder / "gpt2"))
    parts = perplexity.stretches(tokenizer, [str(other)], 64, 1)
    assert rows["dense"]["perplexity"] == pytest.approx(perplexity.measure(want, parts)["perplexity"])
    with patched(want, results["mapping"]):
        assert rows["chosen"]["perplexity"] == pytest.approx(perplexity.measure(want, parts)["perplexity"])
    with pytest.raises(SystemExit):
        choose.main([*given, "--output", str(tmp_path / "s.json")])


@pytest.mark.parametrize("program", [choose, perplexity, passkey])
def test_texts_longer_than_learned_positions_are_refused(folder, tmp_path, program) -> None:
    text, more = str(folder / "text.txt"), ["--texts", str(folder / "text.txt"), "--lengths", "32", "65"]
    if program is choose:
        more = ["--choose-on", text, "--judge-on", text, "--length", "65", "--max-cost", "0.5"]
    given = ["--model", str(folder / "gpt2"), "--variants", "block", *more, "--output", str(tmp_path / "a.json")]
    with pytest.raises(
        ValueError, match="gpt2 reads 64 tokens at most, as its learned positions end there; 65 are asked"
    ):
        program.main(given)
    assert not (tmp_path / "a.json").exists()


def test_what_programs_are_given_wrong_is_a_sentence(tmp_path, capsys) -> None:
    (tmp_path / "list.yaml").write_text("- block\n")
    (tmp_path / "empty.yaml").write_text("")
    for file, words in (
        ("list.yaml", "expected a mapping"),
        ("empty.yaml", "expected a mapping"),
        ("no.yaml", "No such file"),
    ):
        with pytest.raises(SystemExit, match=words):
            rows.read_variants([str(tmp_path / file)])
    assert rows.read_variants(["dense", "block"]) == {"dense": None, "block": {"variant": "block"}}

    given = ["--model", str(tmp_path / "none"), "--output", str(tmp_path / "a.json"), "--variants", "block"]
    for program, options, words in (
        (perplexity, ["--windows", "-1"], "--windows -1: at least 1"),
        (perplexity, ["--lengths", "64", "1"], "--lengths 1: at least 2"),
        (passkey, ["--numbers", "0"], "--numbers 0: at least 1"),
        (embeddings, ["--repeats", "0"], "--repeats 0: at least 1"),
        (export_onnx, ["--length", "0"], "--length 0: at least 1"),
    ):
        with pytest.raises(ValueError, match=words):
            program.main([*given, *options])

    def fails() -> None:
        raise ValueError("a sentence")

    with pytest.raises(SystemExit, match="error: a sentence"):
        rows.run_program(fails)


def test_selection_for_an_encoder(folder, tmp_path, capsys) -> None:
    (tmp_path / "few.yaml").write_text(
        "near: {variant: block, block_size: 8}\nwide: {variant: block, block_size: 32}\n"
    )
    given = ["--model", str(folder / "bert"), "--dataset", str(folder / "data"), "--max-length", "64"]
    given += [
        "--train-texts",
        "18",
        "--choose-texts",
        "6",
        "--test-texts",
        "12",
        "--variants",
        str(tmp_path / "few.yaml"),
    ]
    given += ["--max-cost", "0.9", "--cost", "flops", "state", "--output", str(tmp_path / "e.json")]
    with pytest.raises(SystemExit):  # max_cost and max_loss
        choose_encoder.main([*given, "--max-loss", "0.1"])
    with pytest.raises(ValueError, match="keeps no decoder state"):
        choose_encoder.main(given)
    given.remove("state")
    with pytest.raises(ValueError, match="12 texts are held out, none beside --choose-texts"):
        choose_encoder.main([*given, "--choose-texts", "12"])
    with pytest.raises(ValueError, match="--test-texts 0: at least 1"):
        choose_encoder.main([*given, "--test-texts", "0"])
    results = choose_encoder.main(given)
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert json.loads((tmp_path / "e.json").read_text()) == results
    assert all(row["share"].keys() == {"time", "memory", "flops"} for row in results["rows"])
    assert ["mapping", "accuracy", "lost", "chosen", "on", "time", "memory", "flops"] in [
        [word for word in line if word.isalpha()] for line in table
    ]
    rows = {row["label"]: row for row in results["rows"]}
    assert list(rows) == ["dense", "chosen", "near", "wide"] and rows["chosen"]["share"]["flops"] <= 0.9
    assert rows["dense"]["accuracy"] > 0.8 and rows["dense"]["lost_points"] == rows["dense"]["changed"] == 0
    assert rows["near"]["changed"] == sum(
        a != b for a, b in zip(rows["near"]["said"], rows["dense"]["said"], strict=True)
    )
    model, tokenizer = embeddings.open_encoder(str(folder / "bert"), 64)
    texts = [json.loads(line) for line in (folder / "data" / "train.jsonl").read_text().splitlines()]
    ids = [{"input_ids": tokenizer(t["text"])["input_ids"], "label": int(t["label"])} for t in texts]
    probe = choose_encoder.Probe(model, ids, 100.0)
    vectors = embeddings.embed(model, [row["input_ids"] for row in ids])
    fitted = LogisticRegression(C=100.0, max_iter=2000).fit(vectors, [row["label"] for row in ids])
    assert probe.says(model, ids) == fitted.predict(vectors).tolist()
    said = torch.tensor(fitted.predict_proba(vectors), dtype=torch.float32)
    batches = probe.batches(model, ids)
    assert torch.allclose(torch.stack([batch["said"] for batch in batches]), said, atol=1e-4)
    losses = torch.stack([probe.loss(model, batch) for batch in batches])
    assert torch.allclose(losses, -(said * said.log()).sum(1), atol=1e-3), "not the entropy, the least there is"
    for batch, probabilities in zip(batches[:4], said, strict=False):
        model.zero_grad()
        probe.loss(model, batch).backward()
        found = model.embeddings.word_embeddings.weight.grad.clone()
        model.zero_grad()
        logits = probe.logits(model, batch["input_ids"][0].tolist())
        torch.nn.functional.cross_entropy(logits[None], batch["drawn"]).backward()
        assert found.abs().max() > 1e-6 and torch.equal(found, model.embeddings.word_embeddings.weight.grad)
        assert probabilities[batch["drawn"]] > 0
    with torch.no_grad():
        model.embeddings.word_embeddings.weight.add_(torch.randn_like(model.embeddings.word_embeddings.weight))
        assert sum(probe.loss(model, batch) for batch in batches) > losses.sum() + 0.01


def test_a_class_is_drawn_as_often_as_it_is_said(folder) -> None:
    model, tokenizer = embeddings.open_encoder(str(folder / "bert"), 64)
    texts = [json.loads(line) for line in (folder / "data" / "train.jsonl").read_text().splitlines()]
    rows = [{"input_ids": tokenizer(t["text"])["input_ids"], "label": int(t["label"])} for t in texts]
    probe = choose_encoder.Probe(model, rows, 1.0)
    batches = probe.batches(model, rows[:1] * 400)
    share = torch.cat([batch["drawn"] for batch in batches]).bincount(minlength=len(probe.classes)) / 400
    assert torch.allclose(share, batches[0]["said"], atol=0.1) and share.max() < 1


def test_a_number_is_hidden_where_it_is_said_and_asked_for(folder) -> None:
    tokenizer = perplexity.load(str(folder / "gpt2"))[1]
    words = ["The", "pass", "key", "is", "Remember", "it", "What", "the", "?", "."]
    vocabulary = {word: i for i, word in enumerate(["[UNK]", *words, "12345", "x"])}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]")))
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    text, number = torch.full((100,), vocabulary["x"]), vocabulary["12345"]
    for depth in (0.0, 0.5, 1.0):
        ids, n = passkey.prompt(tokenizer, text, "12345", 64, depth)
        assert ids.shape == (1, 64) and n == 1
        places = (ids[0] == number).nonzero()[:, 0].tolist()
        room = int((ids == vocabulary["x"]).sum())
        assert len(places) == 3 and places[2] == 63 and abs(places[0] - depth * room - 4) < 1

    class Answers(torch.nn.Module):
        """Puts first what stands `back` tokens before the one that it is to say."""

        def __init__(self, back: int) -> None:
            super().__init__()
            self.back = back

        def forward(self, input_ids, use_cache, logits_to_keep):
            said = input_ids.roll(self.back - 1, 1)
            logits = torch.nn.functional.one_hot(said, len(vocabulary)).float()
            return type("Output", (), {"logits": logits[:, -logits_to_keep:]})

    assert passkey.right(Answers(63 - places[1]), ids, 1).tolist() == [True]
    assert passkey.right(Answers(64 - places[1]), ids, 1).tolist() == [False]
    with pytest.raises(ValueError, match="needs 177 tokens of text, and there are 100"):
        passkey.prompt(tokenizer, text, "12345", 203, 0.5)


def test_numbers_found_are_rows(folder, tmp_path) -> None:
    given = ["--model", str(folder / "gpt2"), "--texts", str(folder / "text.txt"), "--lengths", "64", "--numbers", "4"]
    given += ["--variants", "flash", "block", "--output", str(tmp_path / "p.json")]
    rows = {row["label"]: row for row in passkey.main(given)["rows"]}
    assert list(rows) == ["dense", "flash", "block"]
    assert all(len(row["found_at"]) == 4 and 0 <= row["found"] <= row["tokens"] <= 1 for row in rows.values())
    assert rows["flash"]["found_at"] == rows["dense"]["found_at"]
    assert len(passkey.main(given)["rows"]) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="peaks of processes are set back on Linux alone")
def test_onnx_files(folder, tmp_path) -> None:
    for module in ("onnxscript", "onnxruntime"):
        pytest.importorskip(module)
    given = ["--model", str(folder / "bert"), "--length", "96", "--repeats", "1", "--keep", str(tmp_path / "kept")]
    given += ["--output", str(tmp_path / "a.json"), "--variants", "block", "lsh"]
    rows = {row["label"]: row for row in export_onnx.main(given)["rows"]}
    assert "depends on the numbers" in rows["lsh"]["error"]
    for name in ("dense", "block"):
        assert rows[name]["apart"] < 1e-5 and rows[name]["seconds_ratio"] > 0 and rows[name]["run_bytes"] >= 0
        assert (tmp_path / "kept" / f"{name}.onnx").stat().st_size == rows[name]["file_bytes"]
    again = export_onnx.main([*given, "flash"])["rows"]
    assert [row["label"] for row in again] == ["dense", "block", "lsh", "flash"]
    assert again[:3] == list(rows.values())
