"""The tables of README and docs are what the results files hold."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from examples import report, tables  # noqa: E402
from hf_efficient_attn import available_variants  # noqa: E402


def test_tables_are_up_to_date(capsys) -> None:
    assert tables.main(["--check"]) == 0, capsys.readouterr().out


def test_a_changed_number_is_found() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert tables.rewritten(text) == text
    marked = text.index("<!-- table: decoders_2048")
    place = text.index(".", text.index("`dense`", marked)) + 1
    changed = text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :]
    assert changed != text and tables.rewritten(changed) == text


def test_pages_speak_of_registered_variants() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "variants").glob("*.md"))
    named = re.findall(r"^## `(\w+)`$", pages, re.MULTILINE)
    assert len(named) == len(set(named)) > 25 and set(named) <= set(available_variants())


def test_every_fine_tune_has_its_report() -> None:
    files = sorted((ROOT / "results").glob("*/results.json"))
    assert len(files) > 5
    for file in files:
        results = json.loads(file.read_text(encoding="utf-8"))
        text = report.markdown(results)
        assert all(row["label"] in text for row in results["rows"]), file


def test_exported_models_gave_what_pytorch_gives() -> None:
    rows = json.loads((ROOT / "results" / "onnx.json").read_text(encoding="utf-8"))["rows"]
    assert len(rows) > 10
    assert not [row["label"] for row in rows if not row.get("apart", 0.0) <= 1e-4]
