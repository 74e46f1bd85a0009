"""What Transformers does to a cache, done to one that holds the states of patched layers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import QuantizedLayer
from zoo import ZOO

from hf_efficient_attn import hosts, patch_model, unpatch_model
from hf_efficient_attn.caching import SPARE, AttentionState, RecentTokens, TokenStore, pick
from hf_efficient_attn.registry import build, get_config_class
from hf_efficient_attn.variant import HostShape

VARIANTS = {
    "flash": {},
    "block": {"block_size": 5, "num_sinks": 1},
    "sliding_window": {"window": 4, "num_sinks": 2},
    "transformer_xl": {"segment_size": 5, "memory_size": 4, "num_sinks": 1},
}
SPLIT = 7
each_variant = pytest.mark.parametrize("variant", VARIANTS)


def decoder(variant: str, name: str = "llama") -> PreTrainedModel:
    return patch_model(ZOO[name].build(), variant, **VARIANTS[variant])


def text() -> tuple[Tensor, Tensor]:
    """Ids and mask (3, 13); two rows are left-padded."""
    inputs = ZOO["llama"].inputs(batch=3, length=13, pad="left")
    return inputs["input_ids"], inputs["attention_mask"]


@torch.no_grad()
def filled(model: PreTrainedModel) -> DynamicCache:
    cache, (ids, mask) = DynamicCache(), text()
    model(ids[:, :SPLIT], attention_mask=mask[:, :SPLIT], past_key_values=cache)
    return cache


@torch.no_grad()
def rest(model: PreTrainedModel, cache: DynamicCache, rows: Tensor | None = None) -> Tensor:
    """The logits of the tokens after SPLIT, of these rows of the text."""
    ids, mask = (x if rows is None else x[rows] for x in text())
    return model(ids[:, SPLIT:], attention_mask=mask, past_key_values=cache).logits


def assert_close(x: Tensor, y: Tensor) -> None:
    assert x.shape == y.shape
    assert (x - y).abs().max() < 1e-5


@each_variant
@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 1])), [2, 0, 1]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
    ],
    ids=["reorder", "repeat", "select"],
)
def test_rows_of_a_cache(variant: str, change, rows: list[int]):
    model = decoder(variant)
    expected = rest(model, filled(model))
    cache = filled(model)
    change(cache)
    assert_close(rest(model, cache, torch.tensor(rows)), expected[rows])
    assert (expected[0] - expected[1]).abs().max() > 1e-3


@each_variant
def test_reset_empties(variant: str):
    model = decoder(variant)
    cache, (ids, mask) = filled(model), text()
    cache.reset()
    assert cache.get_seq_length() == 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
        assert_close(model(ids, attention_mask=mask, past_key_values=cache).logits[mask.bool()], expected)


def shallow(cache: DynamicCache) -> DynamicCache:
    """Each layer copied, but not the tensors."""
    twin = DynamicCache()
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    return twin


@each_variant
@pytest.mark.parametrize("how", [copy.deepcopy, shallow])
def test_a_copied_cache_goes_its_own_way(variant: str, how):
    model = decoder(variant)
    cache = filled(model)
    other = how(cache)
    first = rest(model, cache)
    assert cache.get_seq_length() == 13
    assert other.get_seq_length() == SPLIT
    assert_close(rest(model, other), first)


@each_variant
@pytest.mark.parametrize("remove", [1, 3, 6])
def test_the_latest_call_can_be_taken_back(variant: str, remove: int):
    model = decoder(variant)
    expected = rest(model, filled(model))
    cache = filled(model)
    for layer in cache.layers:
        layer.activate_past_recording()
    rest(model, cache)
    cache.crop(-remove)
    assert cache.get_seq_length() == 13 - remove
    ids, mask = text()
    with torch.no_grad():
        again = model(ids[:, 13 - remove :], attention_mask=mask, past_key_values=cache).logits
    assert_close(again, expected[:, 6 - remove :])


def test_what_a_constant_state_let_go_of_cannot_come_back():
    cache = filled(decoder("sliding_window"))
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        cache.crop(-2)
    cache = filled(decoder("flash"))
    cache.crop(-2)
    assert cache.get_seq_length() == SPLIT - 2


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2_nocap", "qwen3"])
def test_a_cache_made_for_the_config(name: str):
    """Layers that Transformers makes for the architecture's own windows are replaced as well."""
    model = decoder("sliding_window", name)
    ids, mask = text()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :SPLIT], attention_mask=mask[:, :SPLIT], past_key_values=cache)
        later = model(ids[:, SPLIT:], attention_mask=mask, past_key_values=cache).logits
        expected = model(ids, attention_mask=mask, use_cache=False).logits[:, SPLIT:]
    assert all(isinstance(layer, AttentionState) for layer in cache.layers)
    assert_close(later, expected)


@pytest.mark.parametrize("implementation", ["static", "offloaded_static"])
def test_a_cache_of_fixed_size_is_refused(implementation: str):
    model, (ids, mask) = decoder("sliding_window"), text()
    with pytest.raises(ValueError, match="decoder state of"):
        model.generate(ids, attention_mask=mask, cache_implementation=implementation, max_new_tokens=3)
    with pytest.raises(ValueError, match=r"holds 0 tokens in a StaticLayer.*a cache of fixed size has no place"):
        model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=32))


class Rounded(QuantizedLayer):
    """A quantised layer, of which Transformers brings none that needs no further package in all versions."""

    def _quantize(self, tensor, *args):
        return tensor

    def _dequantize(self, tensor):
        return tensor


def test_a_cache_that_is_refused_is_called_what_it_is():
    dense, model, (ids, _) = decoder("sliding_window"), decoder("sliding_window"), text()
    count = len(hosts.find_hosts(model))
    filled_by_dense = DynamicCache()
    unpatch_model(dense)(ids, past_key_values=filled_by_dense)
    cases = [
        (Cache(layers=[Rounded() for _ in range(count)]), "holds 0 tokens in a Rounded.*; a quantised cache has no"),
        (filled_by_dense, r"holds 13 tokens in a DynamicLayer.*from the first token on\.$"),
        (DynamicCache(offloading=True, config=model.config), "an offloaded cache moves keys away"),
    ]
    for cache, sentence in cases:
        with pytest.raises(ValueError, match=sentence) as told:
            model(ids, past_key_values=cache)
        assert "fixed size" not in str(told.value)


def test_a_layer_that_attends_twice_per_call_is_refused_with_a_cache():
    """DiffLlama asks for two outputs of the same keys; a state would count the tokens twice."""
    import architectures

    model = patch_model(architectures.build("diffllama"), "flash")
    ids, _ = text()
    assert model(ids, use_cache=False).last_hidden_state.isfinite().all()
    with pytest.raises(ValueError, match="several times per call"):
        model(ids, use_cache=True)


def test_a_layer_that_stores_its_keys_elsewhere_is_refused_with_a_cache():
    """HRM runs one layer several times and gives each run a place of its own in the cache."""
    import architectures

    model = patch_model(architectures.build("hrm_text"), "flash")
    ids, _ = text()
    assert model(ids, use_cache=False).last_hidden_state.isfinite().all()
    with pytest.raises(ValueError, match="another layer's place"):
        model(ids, use_cache=True)


def test_a_state_shows_no_keys_to_those_who_look():
    cache = filled(decoder("flash"))
    assert cache.layers[0].keys.shape == (3, 2, 0, 8)
    assert cache.layers[0].nbytes > 0


def tokens(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    drawn = torch.randn(2, 2, 3, n, 4, generator=torch.Generator().manual_seed(seed))
    return drawn[0], drawn[1]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("window", [None, 40])
def test_tokens_of_generation_go_behind_the_others_without_a_copy(mode, window: int | None):
    (key, value), store, places = tokens(400), RecentTokens(window) if window else TokenStore(), set()
    with mode():
        store.extend(key[:, :, :50].clone(), value[:, :, :50].clone())
        for n in range(50, 400):
            buffer = store.extend(key[:, :, n : n + 1], value[:, :, n : n + 1])
            first = buffer.first
            assert torch.equal(buffer.key, key[:, :, first : n + 1])
            assert torch.equal(buffer.value, value[:, :, first : n + 1])
            if window:
                store.keep_from(n + 1 - window)
                assert store.first == max(0, n + 1 - window)
                assert store.nbytes <= 2 * 2 * 3 * (2 * window + SPARE) * 4 * 4
            places.add(store.rooms["key"].tensor.data_ptr())
    assert len(places) <= 10, "a copy of all tokens for each new one"


def test_spare_room_is_shared_by_no_two_states():
    """A state that was taken back, copied, or made in inference mode goes on without changing what another one sees."""
    key, other, store = tokens(30)[0], tokens(30, 1)[0], TokenStore()

    def add(store: TokenStore, source: Tensor, n: int) -> None:
        store.extend(source[:, :, n : n + 1], source[:, :, n : n + 1])

    with torch.no_grad():
        store.extend(key[:, :, :10], key[:, :, :10])
        add(store, key, 10)
        saved, seen = store.snapshot(), store.entries["key"]
        copied = copy.deepcopy(store)
        for n in range(11, 15):
            add(store, key, n)
        longest = store.entries["key"]
        store.restore(saved)
        for branch in (store, copied):
            for n in range(11, 15):
                add(branch, other, n)
            assert torch.equal(branch.entries["key"], torch.cat([key[:, :, :11], other[:, :, 11:15]], 2))
        assert torch.equal(seen, key[:, :, :11]) and torch.equal(longest, key[:, :, :15])
        store.crop_to(12)
        add(store, key, 12)
        assert torch.equal(store.entries["key"], torch.cat([key[:, :, :11], other[:, :, 11:12], key[:, :, 12:13]], 2))
    with torch.inference_mode():
        add(store, key, 13)
        add(store, key, 14)
    with torch.no_grad():  # where a tensor of inference mode must not be written
        add(store, key, 15)
    assert torch.equal(store.entries["key"][:, :, 12:], key[:, :, 12:16])


def test_what_a_graph_holds_is_not_written():
    (key, value), store = tokens(12), TokenStore()
    with torch.no_grad():
        store.extend(key[:, :, :4], value[:, :, :4])
        store.extend(key[:, :, 4:5], value[:, :, 4:5])
    new = value[:, :, 5:8].clone().requires_grad_()
    buffer = store.extend(key[:, :, 5:8], new)
    loss = (buffer.key * buffer.value).square().sum()
    with torch.no_grad():
        store.extend(key[:, :, 8:9], value[:, :, 8:9])
        store.extend(key[:, :, 9:10], value[:, :, 9:10])
    loss.backward()
    assert torch.allclose(new.grad, 2 * key[:, :, 5:8].square() * value[:, :, 5:8])
    assert torch.equal(store.entries["value"].detach(), value[:, :, :10])


def test_rows_are_picked_from_any_layout():
    slots = torch.randint(7, (2, 3, 5), generator=torch.Generator().manual_seed(0))
    base = torch.randn(2, 7, 3, 4, generator=torch.Generator().manual_seed(1))
    heads_last, part = base.transpose(1, 2), torch.randn(2, 3, 20, 4)[:, :, 9:16]
    shared, wide = base.transpose(1, 2)[:1].expand(2, -1, -1, -1), torch.randn(2, 3, 7, 9)[..., 1:5]
    for x in (heads_last, heads_last.contiguous(), part, shared, wide, part.mT.contiguous().mT):
        expected = torch.gather(x, 2, slots[..., None].expand(-1, -1, -1, 4))
        with torch.no_grad():
            assert torch.equal(pick(x, slots), expected)
        assert torch.equal(pick(x, slots), expected)


@torch.no_grad()
def test_padding_that_begins_in_a_call_of_which_part_is_taken_back():
    """All tokens are real until a recorded call brings some that are not."""
    model, ids = decoder("flash"), ZOO["llama"].inputs(2, 40)["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, 12:15] = 0
    expected, cache = model(ids, attention_mask=mask).logits, DynamicCache()

    def read(begin: int, end: int) -> torch.Tensor:
        return model(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache).logits

    read(0, 10)
    cache.activate_past_recording()
    read(10, 20)
    cache.crop(-3)
    for layer in cache.layers:
        layer.record_past = False
    read(17, 24)
    read(24, 30)
    assert cache.layers[0].real.shape == (2, 30)
    cache.crop(-10)
    assert cache.layers[0].count.tolist() == [20, 17]
    assert_close(read(20, 40), expected[:, 20:])


@torch.no_grad()
def test_a_long_call_leaves_no_room_behind():
    """A second turn of a chat: what a window keeps is as much as if all had come at once."""
    module = build(get_config_class("sliding_window").from_kwargs(window=8), HostShape(2, 2, 4, 8, True))

    def held(*sizes: int) -> int:
        state = module.make_state()
        for size in sizes:
            q, k, v = (torch.randn(1, 2, size, 4) for _ in range(3))
            state.update(k, v)
            module(q, k, v, scaling=0.5, causal=True, state=state)
        return state.nbytes

    assert held(4, 4000, 1) == held(4004, 1) < 10_000


@torch.no_grad()
def test_room_is_let_go_of_with_what_it_was_behind():
    store, x = TokenStore(), torch.randn(2, 1, 40, 4)
    store.extend(x, x)
    for change in (lambda: store.map_tensors(lambda x: x[[1, 0]]), lambda: store.crop_to(30)):
        store.extend(x[:, :, :1], x[:, :, :1])
        assert store.rooms
        change()
        assert not store.rooms


def test_what_a_graph_needs_is_not_written_to_later():
    module = build(
        get_config_class("linformer").from_kwargs(rank=4, max_length=64, segment_size=4), HostShape(2, 2, 4, 8, True)
    )
    state = module.make_state()

    def call(size: int) -> torch.Tensor:
        q, k, v = (torch.randn(1, 2, size, 4) for _ in range(3))
        state.update(k, v)
        return module(q.requires_grad_(), k, v, scaling=0.5, causal=True, state=state)

    with torch.no_grad():
        call(16)
    output = call(2)
    with torch.no_grad():
        call(8)
    output.sum().backward()


def test_more_than_was_read_is_not_taken_back():
    module = build(get_config_class("flash")(), HostShape(2, 2, 4, 8, True))
    state, (q, k, v) = module.make_state(), (torch.randn(1, 2, 3, 4) for _ in range(3))
    state.update(k, v)
    module(q, k, v, scaling=0.5, causal=True, state=state)
    with pytest.raises(ValueError, match="cannot take 7 tokens back"):
        state.crop(-7)
    state.crop(-2)
    assert state.seen == state.count == 1


def test_an_empty_store_is_picked_from():
    empty = torch.randn(2, 3, 0, 4)
    with torch.no_grad():
        assert pick(empty, torch.zeros(2, 3, 0, dtype=torch.int64)).shape == (2, 3, 0, 4)


def test_an_offloaded_cache_is_refused():
    model = patch_model(ZOO["llama"].build(), "sliding_window", window=4)
    cache = DynamicCache()
    cache.offloading = True  # which needs an accelerator to be made
    with pytest.raises(ValueError, match="an offloaded cache"):
        model(ZOO["llama"].inputs()["input_ids"], past_key_values=cache)


def test_rows_of_different_lengths_take_tokens_where_they_end():
    """Without gradients in spare room, with them by a copy: the same to whoever reads slots that are in use."""
    stores, memory = (TokenStore(), TokenStore()), set()
    for n, lengths in ((6, [6, 3]), (1, None), (4, [2, 4]), (1, [0, 1]), (1, None), (1, None)):
        x, real = torch.randn(2, 3, n, 4), None if lengths is None else torch.tensor(lengths)
        with torch.no_grad():
            inside = stores[0].extend(x, -x, real)
            stores[0].own()
        outside = stores[1].extend(x, -x, real)
        used = (torch.arange(inside.key.shape[2]) < torch.as_tensor(inside.length).reshape(-1, 1)).expand(2, -1)
        assert torch.equal(inside.length, outside.length) and inside.key.isfinite().all()
        for ours, theirs in ((inside.key, outside.key), (inside.value, outside.value)):
            assert torch.equal(ours.mT[..., used[0]][0], theirs.mT[..., used[0]][0])
            assert torch.equal(ours.mT[..., used[1]][1], theirs.mT[..., used[1]][1])
        memory.add(inside.key.untyped_storage().data_ptr())
    assert len(memory) == 2  # the first call's own, and the room made by the second
