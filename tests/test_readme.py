"""What the README says of the variants is what the registry holds, and its code is code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from hf_efficient_attn import available_variants

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def table_rows() -> dict[str, list[str]]:
    section = README.split("\n## Variants\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if re.match(r"\| `\w+` \|", line)]
    return {row[0].strip().strip("`"): [cell.strip() for cell in row[1:]] for row in rows}


def test_every_variant_has_its_row() -> None:
    rows = table_rows()
    assert list(rows) == [name for name in rows if name in available_variants()]
    assert set(rows) == set(available_variants())
    for name, info in available_variants().items():
        paper, state = rows[name][1], rows[name][4]
        assert re.search(r"\d{4}", info.paper).group() in paper, (
            f"{name}: the README names another year than {info.paper}"
        )
        if info.module_class.constant_state:
            assert "N" not in state, f"{name}: the README's state {state!r} grows, the variant's does not"
        else:
            assert re.search("N|part", state), f"{name}: the README's state {state!r} does not grow, the variant's does"


def test_python_blocks_parse_and_links_exist() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) >= 3
    for block in blocks:
        ast.parse(block)
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if not link.startswith("http")]
    assert links
    for link in links:
        assert (ROOT / link).exists(), f"{link} does not exist"
