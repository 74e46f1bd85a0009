"""Imports go one way, variants know no Transformers, and importing the library changes nothing for other models."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import hf_efficient_attn

PACKAGE = Path(hf_efficient_attn.__file__).parent
ORDER = [  # a module may import from those before it
    {"version", "config", "caching", "modes", "auxiliary", "kernels"},
    {"ops", "losses"},
    {"variant"},
    {"registry"},
    {"variants"},
    {"masking", "measuring"},
    {"hosts"},
    {"dispatch"},
    {"swapping"},
    {"modeling", "positions"},
    {"patching"},
    {"hub", "recovery"},
    {"selection"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}


def local_imports(path: Path) -> set[str]:
    """The top-level modules of the package that a file imports, at any depth of its code."""
    depth = len(path.relative_to(PACKAGE).parts) - 1
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == depth + 1:
            found |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("hf_efficient_attn."):
            found.add(node.module.split(".")[1])
    return found


def backward_imports(files: dict[str, set[str]]) -> list[str]:
    return [f"{a} -> {b}" for a, names in files.items() for b in names if b != a and LEVEL[b] >= LEVEL[a]]


def test_imports_go_one_way() -> None:
    files: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if name != "__init__":
            assert name in LEVEL, f"{name} has no place in the order of imports"
            files.setdefault(name, set()).update(local_imports(path))
    assert files["dispatch"] >= {"hosts", "masking"}
    assert backward_imports(files) == []
    assert backward_imports({"config": {"patching"}}) == ["config -> patching"]


def test_variants_and_ops_import_no_transformers() -> None:
    users = [p.name for p in PACKAGE.rglob("*.py") if "transformers" in p.read_text() and "import" in p.read_text()]
    assert "dispatch.py" in users
    for folder in ("variants", "ops"):
        for path in (PACKAGE / folder).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert not any(n.split(".")[0] == "transformers" for n in names), path.name


def test_every_variant_file_is_imported() -> None:
    text = (PACKAGE / "variants" / "__init__.py").read_text()
    for path in (PACKAGE / "variants").glob("[a-z]*.py"):
        assert f"{path.stem}" in text, f"variants/__init__.py does not import {path.stem}"


def test_importing_overwrites_no_attention_function() -> None:
    code = """
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as masks
from transformers import BertConfig, AutoConfig
before = [dict(functions._global_mapping), dict(masks._global_mapping)]
import sys, hf_efficient_attn
after = [dict(functions._global_mapping), dict(masks._global_mapping)]
assert all(new[name] is function for old, new in zip(before, after) for name, function in old.items())
assert [set(new) - set(old) for old, new in zip(before, after)] == [{"efficient_attention"}] * 2
assert AutoConfig.for_model("bert").__class__ is BertConfig
heavy = {"datasets", "matplotlib", "evaluate", "sklearn"} & set(sys.modules)
assert not heavy, heavy
print("clean")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip().endswith("clean"), done.stderr
