"""
Does a decoder still find what lies far back? A number is hidden in a long text and asked for at its end, dense and with each
variant swapped in and nothing trained (Mohtashami and Jaggi 2023, arXiv:2305.16300).

    python -m examples.passkey --model smollm2 --texts book.txt.gz --lengths 2048 4096 8192 \\
        --variants sliding_window topk_blocks --output results.json

Every length has `--numbers` prompts, in which the number stands at equal distances from the beginning to the end. `found`
is the share of numbers whose tokens all come first of the vocabulary, each after the right ones before it, and `tokens`
the share of tokens that do. Windows do well on perplexity and fail here. The file is written after every row, and rows
that it holds already are not computed again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from examples.embedded import MODELS
from examples.perplexity import load, read_text
from examples.rows import Help, add_row, check_counts, open_results, read_variants, run_program, show, swapped

HIDDEN = "\nThe pass key is{number}. Remember it.{number} is the pass key.\n"
QUESTION = "\nWhat is the pass key? The pass key is"


def prompt(tokenizer, text: torch.Tensor, number: str, length: int, depth: float) -> tuple[torch.Tensor, int]:
    """
    ids (1, length): `text`, (T,), cut to fit, with the number at `depth` of it, from 0 to 1, then the question and the
    number again; and how many tokens the number at the end has.
    """

    def ids(words: str) -> torch.Tensor:
        return torch.tensor(tokenizer(words, add_special_tokens=False).input_ids)

    hidden, asked = ids(HIDDEN.format(number=f" {number}")), ids(QUESTION)
    answer = ids(f"{QUESTION} {number}")[len(asked) :]
    room = length - len(hidden) - len(asked) - len(answer)
    if not 0 < room <= len(text):
        raise ValueError(f"a prompt of {length} tokens needs {room} tokens of text, and there are {len(text)}.")
    place = round(depth * room)
    return torch.cat([text[:place], hidden, text[place:room], asked, answer])[None], len(answer)


@torch.no_grad()
def right(model: torch.nn.Module, ids: torch.Tensor, n: int) -> torch.Tensor:
    """(n,) bool: which of the last n tokens of ids (1, N) the model puts first, given those before it."""
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=n + 1).logits[0, :-1]
    return logits.argmax(-1) == ids[0, -n:]


def main(args: Sequence[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--model", default="smollm2", help=f"a Hub id, a folder, or one of: {', '.join(MODELS)}")
    parser.add_argument(
        "--texts", nargs="+", default=["topics"], help="text files (also .gz), or 'topics', taken in turns"
    )
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048], help="tokens of a text")
    parser.add_argument("--numbers", type=int, default=10, help="prompts of each length")
    parser.add_argument(
        "--variants", nargs="+", required=True, metavar="NAME|FILE", help="names, and YAML files label -> variant"
    )
    parser.add_argument("--output", type=Path, required=True, help="a JSON file; rows in it are kept")
    options = parser.parse_args(args)
    check_counts(options, lengths=2, numbers=1)
    chosen = read_variants(options.variants)
    settings = {"model": options.model, "texts": [Path(t).name for t in options.texts], "numbers": options.numbers}
    results = open_results(options.output, settings, "examples.passkey", args, chosen)
    model, tokenizer = load(options.model, max(options.lengths))
    texts = [tokenizer(read_text(name), return_tensors="pt", verbose=False).input_ids[0] for name in options.texts]
    generator = torch.Generator().manual_seed(0)
    numbers = [
        str(number) for number in torch.randint(10_000, 100_000, (options.numbers,), generator=generator).tolist()
    ]
    for length in options.lengths:
        prompts = [
            prompt(tokenizer, texts[i % len(texts)], number, length, (i + 0.5) / len(numbers))
            for i, number in enumerate(numbers)
        ]
        for label, config in chosen.items():
            if (label, length) in {(row["label"], row["length"]) for row in results["rows"]}:
                continue
            row = {"label": label, "length": length, "config": config}
            try:
                with swapped(model, config):
                    answers = [right(model, *given) for given in prompts]
                row["found_at"] = [
                    bool(answer.all()) for answer in answers
                ]  # from the beginning of the text to its end
                row["found"] = sum(row["found_at"]) / len(answers)
                row["tokens"] = torch.cat(answers).float().mean().item()
            except Exception as error:  # a variant that fails is a row that says so
                row["error"] = f"{type(error).__name__}: {error}"
            add_row(results, row, options.output)
    title = "numbers found, untrained; beginning of the text to its end: + found, - not"
    columns = {"found": "{found:.2f}", "tokens right": "{tokens:.2f}", "where": "{where}"}
    show(results, title, columns, where=lambda row: "".join("+" if found else "-" for found in row["found_at"]))
    return results


if __name__ == "__main__":
    run_program(main)
