"""What README and docs say of the variants is what the registry holds, their links lead somewhere, and README's code runs."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from types import SimpleNamespace

from zoo import ZOO

from hf_efficient_attn import available_variants, describe, patch_model

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINK = re.compile(r"\]\((?!http)([^)#]*)(?:#([^)]+))?\)")
VARIANTS = (ROOT / "docs" / "variants" / "README.md").read_text(encoding="utf-8")


def table_rows() -> dict[str, list[str]]:
    section = VARIANTS.split("\n## All variants\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if re.match(r"\| `\w+` \|", line)]
    return {row[0].strip().strip("`"): [cell.strip() for cell in row[1:]] for row in rows}


def test_every_variant_has_its_row() -> None:
    rows = table_rows()
    assert list(rows) == [name for name in rows if name in available_variants()]
    assert set(rows) == set(available_variants())
    for name, info in available_variants().items():
        paper, state = rows[name][1], rows[name][4]
        cited = set(re.findall(r"\d{4}\.\d{5}", info.paper))
        assert cited <= set(re.findall(r"\d{4}\.\d{5}", paper)), (
            f"{name}: the page cites {paper}, not all of {info.paper}"
        )
        if info.module_class.constant_state:
            assert "N" not in state, f"{name}: the page's state {state!r} grows, the variant's does not"
        else:
            assert re.search("N|part", state), f"{name}: the page's state {state!r} does not grow, the variant's does"


def test_links_lead_somewhere() -> None:
    """To files that exist, and to headings that their pages have."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*.md")]
    links = [(page, link) for page in pages for link in LINK.findall(page.read_text(encoding="utf-8"))]
    assert len(links) > 20
    for page, (path, heading) in links:
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {path} does not exist"
        if heading:
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            known = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
            assert heading in known, f"{page.name}: {target.name} has no heading {heading}"


def test_python_blocks_run(tmp_path) -> None:
    """Each on tiny models of its own; where a block shows one-liners, each of them on a fresh model."""
    hello, save, thirty, transfer, choose = re.findall(r"```python\n(.*?)```", README, re.S)
    encoder = {"num_hidden_layers": 12, "max_position_embeddings": 512}
    ZOO["bert"].build_for("sequence-classification", **encoder).save_pretrained(tmp_path / "tiny")
    names = {'"bert-base-uncased"': repr(str(tmp_path / "tiny")), '"bert-topk"': repr(str(tmp_path / "topk"))}
    for old, new in names.items():
        hello, save = hello.replace(old, new), save.replace(old, new)
    given: dict = {}
    exec(hello + save, given)
    assert describe(given["model"])[0].variant == "topk_blocks"
    one_liners = ast.parse(thirty).body
    assert len(one_liners) >= 10
    for statement in one_liners:
        model = ZOO["bert"].build(**encoder)
        given |= {"model": model, "tokenizer": SimpleNamespace(model_max_length=512)}
        code = ast.unparse(statement)
        if code.startswith("unpatch_model"):
            patch_model(model, "block")
        exec(code, given)
        if code.startswith("patch_model"):
            assert any(row.variant for row in describe(model)), code
    for block in (transfer, choose):
        batches = [ZOO["llama"].inputs(2, 24)]
        given = {"model": ZOO["llama"].build(), "batches": batches, "patch_model": patch_model}
        exec(block, given)
        assert "found" in given or describe(given["model"])[0].variant == "hedgehog"
