"""
The contract of a variant, as checks on its module alone: `CHECKS` maps a name to a function of a `Subject`.

`tests/test_contract.py` runs them on every registered variant and `tests/test_the_suite.py` on broken ones. Each check has
its positive control: what must differ is seen to differ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from naive import naive_attention
from torch import Tensor

from hf_efficient_attn import measuring
from hf_efficient_attn.caching import Node
from hf_efficient_attn.ops.rows import Texts
from hf_efficient_attn.registry import build, get_info
from hf_efficient_attn.variant import EfficientAttention, HostShape

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8
LENGTHS = (1, 3, 4, 5, 8, 9, 17, 29)
SCALING = 0.4


@dataclass(frozen=True)
class Subject:
    """A registered variant in one direction; `oracle` is the name of its formula in tests/naive."""

    name: str
    causal: bool
    oracle: str

    def host(self, **changes) -> HostShape:
        shape = HostShape(HEADS, KV_HEADS, HEAD_DIM, HEADS * HEAD_DIM, self.causal, num_layers=2)
        return replace(shape, **changes)

    def build(self, config=None, *, dtype=torch.float64, noise=0.1, **host) -> EfficientAttention:
        """The module with tiny hyper-parameters; its parameters are moved off their start, so that all of them matter."""
        info = get_info(self.name)
        shape = self.host(**host)
        module = build(config or info.config_class.tiny(self.causal), shape).to(dtype).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter += noise * torch.randn(parameter.shape, generator=generator, dtype=dtype)
        return module


def inputs(batch: int, length: int, *, kv_heads=KV_HEADS, dtype=torch.float64, seed=0, kv_length=None) -> list[Tensor]:
    """query, key, value and hidden, at a scale where attention is far from uniform."""
    g = torch.Generator().manual_seed(seed)
    m = kv_length or length
    shapes = [(batch, HEADS, length, HEAD_DIM), (batch, kv_heads, m, HEAD_DIM), (batch, kv_heads, m, HEAD_DIM)]
    shapes.append((batch, length, HEADS * HEAD_DIM))
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]


def run(module: EfficientAttention, query, key, value, hidden=None, scaling=SCALING, **kwargs) -> Tensor:
    extra = {"hidden": hidden} if module.needs_hidden else {}
    return module(query, key, value, scaling=scaling, causal=module.host.causal, **extra, **kwargs)


def expected(subject: Subject, module, query, key, value, hidden=None, padding=None) -> Tensor:
    return naive_attention(
        subject.oracle, query, key, value, padding, config=module.config, scaling=SCALING, causal=subject.causal,
        module=module, hidden=hidden if module.needs_hidden else None,
    )  # fmt: skip


def paddings(length: int) -> dict[str, Tensor | None]:
    """True = keep, four rows each: the masks that a batch can have."""
    if length == 1:
        return {"none": None}
    column = torch.arange(length)
    counts = torch.tensor([length, max(1, length // 2), max(1, length - 1), 1])
    holes = torch.rand(4, length, generator=torch.Generator().manual_seed(2)) > 0.3
    holes[:, -1] = True
    return {
        "none": None,
        "right": column < counts[:, None],
        "left": column >= length - counts[:, None],
        "holes": holes,
    }


def close(got: Tensor, want: Tensor, tolerance: float, what: str) -> None:
    assert torch.isfinite(got).all(), f"{what}: not finite"
    error = (got - want).abs().max().item() if got.numel() else 0.0
    assert error <= tolerance, f"{what}: off by {error:.3g}, allowed {tolerance:g}"


def check_forward_is_the_formula(subject: Subject) -> None:
    module = subject.build()
    for length in LENGTHS:
        for label, padding in paddings(length).items():
            args = inputs(4, length)
            got = run(module, *args, padding=padding)
            close(got, expected(subject, module, *args, padding=padding), 1e-9, f"length {length}, padding {label}")
            assert got.abs().max() > 1e-3


def check_every_choice_is_the_formula(subject: Subject) -> None:
    for config in get_info(subject.name).config_class.variations(subject.causal):
        module = subject.build(config)
        for length in (1, 9, 29):
            for label, padding in paddings(length).items():
                args = [x.requires_grad_() for x in inputs(4, length)]
                got, want = run(module, *args, padding=padding), expected(subject, module, *args, padding=padding)
                close(got, want, 1e-9, f"{config}, length {length}, padding {label}")
                ours, theirs = (torch.autograd.grad(x.square().sum(), args[:3], retain_graph=True) for x in (got, want))
                for a, b in zip(ours, theirs, strict=True):
                    close(a, b, 1e-8, f"gradient, {config}, length {length}, padding {label}")
        if subject.causal:
            args = inputs(4, 29)
            for padding in (None, paddings(29)["left"]):
                full = run(module, *args, padding=padding)
                for splits in SPLITS[1:5]:
                    close(decode(module, args, splits, padding), full, 1e-9, f"{config}, calls of {splits}")


def check_head_layouts(subject: Subject) -> None:
    for kv_heads in (1, HEADS):
        try:
            module = subject.build(num_kv_heads=kv_heads)
        except ValueError as error:  # a variant that shares heads out may refuse a layer with too few
            if kv_heads == 1 and "key/value head" in str(error):
                continue
            raise
        args = inputs(2, 21, kv_heads=kv_heads)
        want = expected(subject, module, *args)
        close(run(module, *args), want, 1e-9, f"{kv_heads} key/value heads")
        turned = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in args[:3]]
        close(run(module, *turned, *args[3:]), want, 1e-9, "tokens side by side in memory")
        assert run(module, *(x[:0] for x in args)).shape == args[0][:0].shape


def check_gradients_are_the_formula_s(subject: Subject) -> None:
    module = subject.build()
    for label in ("none", "left"):
        padding = paddings(17)[label]
        args = [x.requires_grad_() for x in inputs(4, 17)]
        weight = torch.randn(args[0].shape, dtype=torch.float64)
        leaves = args[:3] + [p for p in module.parameters() if p.requires_grad]
        ours = torch.autograd.grad((run(module, *args, padding=padding) * weight).sum(), leaves, allow_unused=True)
        theirs = torch.autograd.grad(
            (expected(subject, module, *args, padding=padding) * weight).sum(), leaves, allow_unused=True
        )
        for index, (got, want) in enumerate(zip(ours, theirs, strict=True)):
            assert (got is None) == (want is None), f"gradient {index} is {'missing' if got is None else 'too many'}"
            if want is not None:
                assert want.abs().max() > 1e-6 or index >= 3, "the formula gives no gradient to compare with"
                close(got, want, 1e-8, f"gradient {index}, padding {label}")


def check_every_parameter_learns(subject: Subject) -> None:
    module = subject.build().train()
    args = [x.requires_grad_() for x in inputs(2, 29)]
    run(module, *args).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, f"{name} gets no gradient"
        assert parameter.grad.abs().max() > 0, f"{name} gets a zero gradient"


def check_padding_does_not_matter(subject: Subject) -> None:
    module = subject.build()
    for label in ("right", "left", "holes"):
        padding = paddings(29)[label]
        args = inputs(4, 29)
        clean = run(module, *args, padding=padding)
        poison = [x.masked_fill(~padding[:, None, :, None], 1e9) for x in args[:3]]
        poison.append(args[3].masked_fill(~padding[:, :, None], 1e9))
        dirty = run(module, *poison, padding=padding)
        assert torch.isfinite(dirty).all(), f"padding {label}: a padded query is not finite"
        real = padding[:, None, :, None]
        close(dirty * real, clean * real, 1e-9, f"padding {label} poisoned")
        for row in range(4):  # each row is what it is alone, without padding
            alone = [x[row : row + 1][:, :, padding[row]] for x in args[:3]] + [args[3][row : row + 1][:, padding[row]]]
            close(clean[row][:, padding[row]][None], run(module, *alone), 1e-9, f"padding {label}, row {row} alone")
        moved = [x.clone() for x in args]
        moved[2][0, :, padding[0].nonzero()[0, 0]] += 10
        assert (run(module, *moved, padding=padding) - clean)[0].abs().max() > 1e-4, (
            "a real token does not matter either"
        )


def check_packed_texts(subject: Subject) -> None:
    """Several texts in a row: each is what it is alone, in value and gradient."""
    module, lengths = subject.build(), [[9, 1, 19], [29], [3, 4, 22]]
    args = [x.requires_grad_() for x in inputs(3, 29)]
    leaves = args[:3] + [p for p in module.parameters() if p.requires_grad]
    index = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths])
    alone = []
    for row, sizes in enumerate(lengths):
        texts = zip(*(x[row : row + 1].split(sizes, -2) for x in args), strict=True)
        alone.append(torch.cat([run(module, *text) for text in texts], 2))
    alone = torch.cat(alone)
    packed = run(module, *args, padding=Texts.of(index))
    close(packed, alone, 1e-9, "texts of one row")
    assert (run(module, *args) - packed).abs().max() > 1e-3, "texts of one row see each other, and it is the same"
    weight = torch.randn(args[0].shape, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad((x * weight).sum(), leaves, allow_unused=True) for x in (packed, alone))
    for i, (got, want) in enumerate(zip(ours, theirs, strict=True)):
        close(torch.zeros(1) if got is None else got, torch.zeros(1) if want is None else want, 1e-8, f"gradient {i}")
    if subject.causal:
        with pytest.raises(ValueError, match="without a cache"):
            run(module, *args, padding=Texts.of(index), state=module.make_state())


def check_causality(subject: Subject) -> None:
    if not subject.causal:
        return
    module = subject.build()
    length = 33
    args = inputs(2, length)
    before = run(module, *args)
    for token in (5, 16, 31, 32):
        moved = [x.clone() for x in args]
        for x in moved[:3]:
            x[:, :, token] += 3 * torch.randn_like(x[:, :, token])
        moved[3][:, token] += 3
        after = run(module, *moved)
        leak = (after - before)[:, :, :token].abs().max().item()
        assert leak <= 1e-10, f"token {token} changes what comes before it by {leak:.3g}"
        assert (after - before)[:, :, token:].abs().max() > 1e-3, f"token {token} changes nothing after it"
    for cut in (1, 7, 8, 20):  # the output does not depend on how long the call is
        close(
            run(module, *[x[:, :, :cut] for x in args[:3]], args[3][:, :cut]), before[:, :, :cut], 1e-9, f"cut at {cut}"
        )


def check_dense_limit(subject: Subject) -> None:
    config_class = get_info(subject.name).config_class
    length = 23
    config = config_class.dense_limit(length, subject.causal)
    if config is None:
        return
    module, args = subject.build(config, noise=0.0), inputs(4, length)
    for label, padding in paddings(length).items():
        dense = naive_attention(
            "flash", *args[:3], padding, config=config_class.dense_limit(length, subject.causal), scaling=SCALING,
            causal=subject.causal,
        )  # fmt: skip
        close(run(module, *args, padding=padding), dense, 1e-10, f"dense limit, padding {label}")
    single = [x.float() for x in args]
    close(run(subject.build(config, dtype=torch.float32, noise=0.0), *single), dense_of(subject, args), 1e-5, "float32")
    if subject.name != "flash":
        sparse = run(subject.build(noise=0.0), *args)
        assert (sparse - dense_of(subject, args)).abs().max() > 1e-3, "the tiny config is dense: it tests nothing"


def dense_of(subject: Subject, args) -> Tensor:
    config = get_info("flash").config_class()
    return naive_attention("flash", *args[:3], None, config=config, scaling=SCALING, causal=subject.causal).to(args[0])


def decode(module, args, splits, padding=None, after=None, scaling=SCALING) -> Tensor:
    """The same tokens in several calls, through a decoder state."""
    state = module.make_state()
    outputs, begin = [], 0
    for size in splits:
        end = begin + size
        part = [x[:, :, begin:end] for x in args[:3]]
        state.update(part[1], part[2])
        part += [x[:, begin:end] for x in args[3:]]
        mask = None if padding is None else padding[:, begin:end]
        outputs.append(run(module, *part, padding=mask, state=state, scaling=scaling))
        begin = end
        if after is not None:
            after(state, end)
    return torch.cat(outputs, 2)


SPLITS = ((29,), (1,) * 29, (17, 12), (8, 8, 13), (3, 1, 1, 20, 4), (28, 1), (5, 24))


def check_decoding(subject: Subject) -> None:
    if not subject.causal:
        return
    module = subject.build(dtype=torch.float32)
    args = inputs(4, 29, dtype=torch.float32)
    for label, padding in paddings(29).items():
        full = run(module, *args, padding=padding)
        for splits in SPLITS:
            close(decode(module, args, splits, padding), full, 1e-4, f"calls of {splits}, padding {label}")
    forgetful = decode(module, args, (17, 12), after=lambda state, end: state.reset())
    assert (forgetful - run(module, *args)).abs().max() > 1e-3, "a forgotten state goes unseen"


def check_long_second_call(subject: Subject) -> None:
    """More new tokens than any direct path takes, on a state whose rows have different lengths."""
    if not subject.causal:
        return
    module = subject.build(dtype=torch.float32)
    args = inputs(4, 150, dtype=torch.float32)
    padding = torch.arange(150) >= torch.tensor([0, 5, 18, 33])[:, None]
    full = run(module, *args, padding=padding)
    for splits in ((40, 110), (41, 70, 39), (100, 50)):
        close(decode(module, args, splits, padding), full, 1e-4, f"calls of {splits}")
        close(decode(module, args, splits), run(module, *args), 1e-4, f"calls of {splits}, no padding")


def check_beams(subject: Subject) -> None:
    if not subject.causal:
        return
    module = subject.build(dtype=torch.float32)
    for padding in (None, paddings(29)["left"]):
        args = inputs(4, 29, dtype=torch.float32)
        order = torch.tensor([2, 2, 0, 3])
        moved = [torch.cat([x[order][:, :, :17], x[:, :, 17:]], 2) for x in args[:3]]
        moved.append(torch.cat([args[3][order][:, :17], args[3][:, 17:]], 1))
        mask = None if padding is None else torch.cat([padding[order][:, :17], padding[:, 17:]], 1)

        def reorder(state, end, order=order):
            if end == 17:
                state.reorder_cache(order)

        mixed = [torch.cat([a[:, :, :17], m[:, :, 17:]], 2) for a, m in zip(args[:3], moved[:3], strict=True)]
        mixed.append(args[3])
        given = None if padding is None else padding.clone()
        if given is not None:
            given[:, 17:] = mask[:, 17:]
        got = decode(module, mixed, (17, 1, 11), given, after=reorder)[:, :, 17:]
        want = run(module, *moved, padding=mask)[:, :, 17:]
        close(got, want, 1e-4, "after reorder_cache")
        unmoved = decode(module, mixed, (17, 1, 11), given)[:, :, 17:]
        assert (unmoved - want).abs().max() > 1e-3, "the order of beams does not matter"


def check_crop(subject: Subject) -> None:
    """A recorded call can be taken back in part, as assisted decoding does; an unrecorded one equals or raises."""
    if not subject.causal:
        return
    module = subject.build(dtype=torch.float32)
    args = inputs(2, 29, dtype=torch.float32)
    full = run(module, *args)
    other = inputs(2, 29, dtype=torch.float32, seed=7)

    def step(state, begin, end, source):
        part = [x[:, :, begin:end] for x in source[:3]]
        state.update(part[1], part[2])
        return run(module, *part, source[3][:, begin:end], state=state)

    for record in (True, False):
        for accepted in (0, 3, 6):
            state = module.make_state()
            step(state, 0, 17, args)
            if record:
                state.activate_past_recording()
            guess = [
                torch.cat([a[:, :, : 17 + accepted], o[:, :, 17 + accepted :]], 2)
                for a, o in zip(args[:3], other[:3], strict=True)
            ]
            guess.append(torch.cat([args[3][:, : 17 + accepted], other[3][:, 17 + accepted :]], 1))
            step(state, 17, 23, guess)
            if not record and accepted < 6 and not state.can_crop():
                with pytest.raises(RuntimeError, match="activate_past_recording"):
                    state.crop(-(6 - accepted))
                continue
            state.crop(-(6 - accepted))
            assert state.get_seq_length() == 17 + accepted
            close(step(state, 17 + accepted, 29, args), full[:, :, 17 + accepted :], 1e-4, f"crop to {accepted} of 6")


def held(node: Node) -> dict[int, int]:
    """The bytes of each stretch of memory that a state keeps alive, by its address."""
    found = {}
    for entry in node.entries.values():
        if isinstance(entry, Node):
            found |= held(entry)
        elif isinstance(entry, Tensor):
            found[entry.untyped_storage().data_ptr()] = entry.untyped_storage().nbytes()
    for room in getattr(node, "rooms", {}).values():
        found[room.tensor.untyped_storage().data_ptr()] = room.tensor.untyped_storage().nbytes()
    return found


@torch.no_grad()
def check_kept_alive(subject: Subject) -> None:
    if not subject.causal:
        return

    def after(state, end):
        kept = sum(held(state).values())
        assert kept <= state.nbytes, f"after {end} tokens {kept} bytes are kept alive, of which {state.nbytes} are used"

    module, args = subject.build(dtype=torch.float32), inputs(1, 100, dtype=torch.float32)
    for splits in ((60,) + (1,) * 40, (1, 1, 58) + (1,) * 40):
        decode(module, args, splits, after=after)


def check_state_size(subject: Subject) -> None:
    if not subject.causal:
        return
    module = subject.build(dtype=torch.float32)
    sizes = {}
    for length in (100, 200):
        args = inputs(1, length, dtype=torch.float32)
        decode(
            module,
            args,
            (60,) + (1,) * (length - 60),
            after=lambda state, end, n=length: sizes.update({n: state.nbytes}),
        )
    dense = 2 * 200 * KV_HEADS * HEAD_DIM * 4
    if type(module).constant_state:
        assert sizes[200] <= 1.2 * sizes[100], f"the state grows: {sizes}"
        assert sizes[200] > 0
    else:
        assert sizes[200] <= 1.5 * dense + 4096, f"the state is larger than a dense cache ({dense}): {sizes}"


def check_more_keys_than_queries(subject: Subject) -> None:
    module = subject.build()
    args = inputs(2, 7, kv_length=19)
    if module.needs_hidden:
        return
    got = run(module, *args)
    assert got.shape == args[0].shape
    if subject.causal:
        close(got, expected(subject, module, *args), 1e-9, "M > N")


def check_nothing_to_read(subject: Subject) -> None:
    module, args = subject.build(), inputs(2, 7)
    assert run(module, *(x[:, :, :0] for x in args[:3]), *(x[:, :0] for x in args[3:])).shape == args[0][:, :, :0].shape
    assert run(module, *(x[:0] for x in args)).shape == args[0][:0].shape
    if subject.causal:
        close(decode(module, args, (3, 0, 4)), run(module, *args), 1e-9, "a call without tokens")


def check_half_precision(subject: Subject) -> None:
    args = inputs(2, 29, dtype=torch.bfloat16)
    reference, exact_args = subject.build(dtype=torch.float32).to(torch.bfloat16).float(), [x.float() for x in args]
    exact = run(reference, *exact_args)
    half = run(subject.build(dtype=torch.float32).to(torch.bfloat16), *args)
    assert half.dtype == torch.bfloat16
    limit = 2e-2 * exact.abs().max().clamp_min(1)
    wrong = (half.float() - exact).abs().amax((1, 3)) > limit
    wrong &= ~without_margin(reference, exact_args, exact, limit)
    assert not wrong.any(), f"bf16 is off in {wrong.sum()} of {wrong.numel()} queries"


def without_margin(module, args, exact, limit) -> Tensor:
    """(B, N) bool: the queries whose output jumps when queries and keys move by 1e-4, because a hard choice is that close."""
    generator, close_calls = torch.Generator().manual_seed(4), torch.zeros_like(exact[:, 0, :, 0], dtype=torch.bool)
    for _ in range(8):
        moved = [x + 1e-4 * torch.randn(x.shape, generator=generator) for x in args[:2]] + args[2:]
        close_calls |= (run(module, *moved) - exact).abs().amax((1, 3)) > limit
    assert close_calls.float().mean() <= 0.1, "every tenth query has no margin: the inputs test nothing"
    return close_calls


def check_dense_below(subject: Subject) -> None:
    info = get_info(subject.name)
    config = replace(info.config_class.tiny(subject.causal), dense_below=14)
    module = subject.build(config)
    for length in (5, 13, 14, 29):
        for label, padding in paddings(length).items():
            args = inputs(4, length)
            want = expected(subject, module, *args, padding=padding)
            close(run(module, *args, padding=padding), want, 1e-9, f"dense_below, length {length}, padding {label}")
    if subject.causal:
        args = inputs(4, 29)
        for padding in (None, paddings(29)["left"]):
            full = run(module, *args, padding=padding)
            for splits in SPLITS[1:5]:
                close(decode(module, args, splits, padding), full, 1e-9, f"dense_below, calls of {splits}")


def check_dropout(subject: Subject) -> None:
    module = subject.build().train()
    args = inputs(2, 29)
    torch.manual_seed(3)
    got = run(module, *args, dropout=0.5)
    assert torch.isfinite(got).all()


def check_growth(subject: Subject) -> None:
    """Peak bytes and FLOPs at 2N over N, forward and backward."""
    module = subject.build(dtype=torch.float32)

    def step(length: int) -> Callable[[], None]:
        args = [x.requires_grad_() for x in inputs(1, length, dtype=torch.float32)]

        def once() -> None:
            run(module, *args).sum().backward()
            for x in (*args, *module.parameters()):
                x.grad = None

        return once

    short, long = 2048, 4096
    if getattr(module.config, "max_length", None) and not subject.causal:
        info = get_info(subject.name)
        module = subject.build(replace(info.config_class.tiny(subject.causal), max_length=long), dtype=torch.float32)
    peak = measuring.peak_memory(step(long)) / measuring.peak_memory(step(short))
    assert 1.2 < peak < 2.3, f"peak bytes grow {peak:.2f} times where N doubles"
    flops = measuring.count_flops(step(long)) / max(measuring.count_flops(step(short)), 1)
    limit = 2.3 if type(module).linear_cost else 4.2
    assert 1.2 < flops < limit, f"FLOPs grow {flops:.2f} times where N doubles, allowed {limit}"


CHECKS: dict[str, Callable[[Subject], None]] = {
    name.removeprefix("check_"): function for name, function in list(globals().items()) if name.startswith("check_")
}
