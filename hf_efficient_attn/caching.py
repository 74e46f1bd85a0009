"""
What a decoder remembers between calls: `AttentionState`, one cache layer of Transformers for one patched layer, and what it
keeps keys and values in: `TokenStore` of all tokens, `FirstTokens` and `RecentTokens`.

Every tensor has the batch first, so beam search, repetition and selection work on all states alike. Nothing stored is
ever written in place: an earlier state stays valid, which is what lets `crop` take back the latest call. New tokens of
generation go into spare room behind the newest state, which no earlier state can see.
Positions count real tokens, per row. A position or count is an int while all rows agree and a (B,) tensor otherwise.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import CacheLayerMixin

Count = int | Tensor
SPARE = 64  # slots of spare room at least


def column(count: Count) -> Count:
    """(B,) -> (B, 1), so that it broadcasts against positions; an int stays an int."""
    return count[:, None] if isinstance(count, Tensor) else count


class Node:
    """A tree of batch-first tensors: `entries` maps names to tensors, counts and further nodes."""

    def __init__(self) -> None:
        self.entries: dict[str, Tensor | int | Node | None] = {}

    def __copy__(self) -> Node:
        """A tree of its own that shares the tensors, as with Transformers' own cache layers."""
        twin = type(self).__new__(type(self))
        vars(twin).update(vars(self))
        twin.entries = {name: copy.copy(e) if isinstance(e, Node) else e for name, e in self.entries.items()}
        return twin

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replaces every tensor of the tree by function(tensor)."""
        for name, entry in self.entries.items():
            if isinstance(entry, Node):
                entry.map_tensors(function)
            elif isinstance(entry, Tensor):
                self.entries[name] = function(entry)

    def own(self) -> None:
        """Copies every tensor that shows part of a larger one, all of which it would keep alive."""
        for name, entry in self.entries.items():
            if isinstance(entry, Node):
                entry.own()
            elif isinstance(entry, Tensor) and self.wastes(name, entry):
                self.entries[name] = entry.clone()

    def wastes(self, name: str, entry: Tensor) -> bool:
        """Whether the tensor that is called so shows part of a larger one."""
        return entry.untyped_storage().nbytes() > entry.nbytes

    def snapshot(self) -> dict:
        """The tree as plain dicts, sharing the tensors; `restore` puts it back."""
        return {n: (e, e.snapshot()) if isinstance(e, Node) else e for n, e in self.entries.items()}

    def restore(self, saved: dict) -> None:
        self.entries = {}
        for name, entry in saved.items():
            if isinstance(entry, tuple):
                entry[0].restore(entry[1])
                entry = entry[0]
            self.entries[name] = entry

    def can_crop(self) -> bool:
        """Whether `crop_to` can forget the newest tokens: what they replaced must still be there."""
        return all(e.can_crop() if isinstance(e, Node) else e is None for e in self.entries.values())

    def crop_to(self, count: Count) -> None:
        """Forgets every token at position >= count; called only where `can_crop`."""
        for entry in self.entries.values():
            if isinstance(entry, Node):
                entry.crop_to(count)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in the tree, the whole batch."""
        return sum(e.nbytes if isinstance(e, (Node, Tensor)) else 0 for e in self.entries.values())


@dataclass(frozen=True)
class Buffer:
    """
    Stored tokens followed by a call's new ones, compacted: slot i of row b holds position first + i.

    key, value: (B, G, S, D). first: position of slot 0. new: slot of the first new token. length: slots in use.
    The three counts are ints while rows agree, else (B,) tensors.
    """

    key: Tensor
    value: Tensor
    first: Count
    new: Count
    length: Count


@dataclass
class Room:
    """A tensor (B, G, capacity, D), of which `view` shows the slots that are in use, the last of them before `end`."""

    tensor: Tensor
    view: Tensor
    end: int

    @classmethod
    def around(cls, x: Tensor, more: int) -> Room:
        """x (B, G, S, D) with room behind it for `more` slots and some that may come later."""
        size = x.shape[2]
        tensor = x.new_zeros(*x.shape[:2], size + more + max(SPARE, size // 8), x.shape[3])
        tensor[:, :, :size] = x
        return cls(tensor, tensor[:, :, :size], size)

    def takes(self, new: Tensor) -> bool:
        """Whether `new` may be written behind the view."""
        open_ = torch.is_inference_mode_enabled() or not self.tensor.is_inference()
        return open_ and self.end + new.shape[2] <= self.tensor.shape[2]

    def fits(self) -> bool:
        """Whether it is not much larger than what it shows."""
        return self.tensor.shape[2] <= 2 * (self.view.shape[2] + SPARE)

    def append(self, new: Tensor, stored: Count) -> None:
        """New tokens (B, G, N, D) at slots stored.. of the view, which grows by N; a row may have stored fewer than others."""
        size, n = self.view.shape[2], new.shape[2]
        begin, self.end = self.end - size, self.end + n
        self.view = self.tensor[:, :, begin : self.end]
        if isinstance(stored, int):
            self.view[:, :, size:] = new
            return
        slots = stored[:, None] if n == 1 else stored[:, None] + torch.arange(n, device=new.device)
        self.view.scatter_(2, slots[:, None, :, None].expand_as(new), new)


class TokenStore(Node):
    """Keys and values (B, G, S, D) of positions 0..count-1 of each row in slots 0.., the rest of S unused."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = {"key": None, "value": None, "count": 0}
        self.rooms: dict[str, Room] = {}  # of an entry that is the room's view, and of no other

    def __copy__(self) -> Node:
        twin = super().__copy__()
        twin.rooms = {}
        return twin

    @property
    def count(self) -> Count:
        """One past the newest position stored."""
        return self.entries["count"]

    def extend(self, key: Tensor, value: Tensor, lengths: Tensor | None = None) -> Buffer:
        """
        Appends a call's tokens and returns the whole, stored ones first.

        key, value: (B, G, N, D), compacted. lengths: (B,) real tokens of this call, or None where all N are real.
        """
        entries, before = self.entries, self.count
        count = before + (key.shape[2] if lengths is None else lengths)
        if entries["key"] is not None:
            key, value = self._appended("key", key, before), self._appended("value", value, before)
        entries.update(key=key, value=value, count=count)
        return Buffer(key, value, 0, before, count)

    def _appended(self, name: str, new: Tensor, stored: Count) -> Tensor:
        """
        What is stored and `new` behind it, in each row: without gradients in spare room, so that a token does not copy all
        before it. Slots that it fills were of no use to an earlier state.
        """
        old, room = self.entries[name], self.rooms.pop(name, None)
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or old.dtype != new.dtype:
            both, size = torch.cat([old, new], 2), old.shape[2]
            if isinstance(stored, int):
                return both
            slots = torch.arange(both.shape[2], device=new.device)  # rows end at different ones: close the gap
            source = torch.where(slots < stored[:, None], slots, slots + size - stored[:, None])
            return take(both, source.clamp_max(both.shape[2] - 1))
        if room is None or room.view is not old or not room.takes(new):
            room = Room.around(old, new.shape[2])
        room.append(new, stored)
        self.rooms[name] = room
        return room.view

    def own(self) -> None:
        """Room stays where it is of use: not behind what a graph may need, nor what a long call left where little was kept."""
        kept = {} if torch.is_grad_enabled() else self.rooms
        self.rooms = {name: room for name, room in kept.items() if room.view is self.entries[name] and room.fits()}
        super().own()

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> None:
        super().map_tensors(function)
        self.rooms = {}

    def restore(self, saved: dict) -> None:
        super().restore(saved)
        self.rooms = {}

    def wastes(self, name: str, entry: Tensor) -> bool:
        return name not in self.rooms and super().wastes(name, entry)

    @property
    def nbytes(self) -> int:
        """With spare room."""
        rooms = [room for name, room in self.rooms.items() if room.view is self.entries[name]]
        return super().nbytes + sum(room.tensor.nbytes - room.view.nbytes for room in rooms)

    def keep_until(self, position: int) -> None:
        """Forgets tokens at `position` and after."""
        entries = self.entries
        if entries["key"] is None:
            return
        if entries["key"].shape[2] > position:
            entries.update(key=entries["key"][:, :, :position], value=entries["value"][:, :, :position])
        count = entries["count"]
        entries["count"] = min(count, position) if isinstance(count, int) else count.clamp_max(position)

    def can_crop(self) -> bool:
        return True

    def crop_to(self, count: Count) -> None:
        entries, self.rooms = self.entries, {}
        old = entries["count"]
        if isinstance(count, int) and isinstance(old, int):
            entries["count"] = min(old, count)
            if entries["key"] is not None:
                entries.update(key=entries["key"][:, :, :count], value=entries["value"][:, :, :count])
        else:
            device = entries["key"].device
            entries["count"] = torch.minimum(torch.as_tensor(old, device=device), torch.as_tensor(count, device=device))


class FirstTokens(TokenStore):
    """The first `most` tokens of a sequence."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most
        self.entries["least"] = 0  # so many tokens each row has at least

    def extend(self, key: Tensor, value: Tensor, lengths: Tensor | None = None) -> None:
        entries, most = self.entries, self.most
        if entries["key"] is not None and entries["least"] >= most:
            return
        some = None if lengths is None else lengths.clamp_max(most)
        super().extend(key[:, :, :most], value[:, :, :most], some)
        self.keep_until(most)
        more = key.shape[2] if lengths is None else 0
        entries["least"] = self.count if isinstance(self.count, int) else entries["least"] + more

    def crop_to(self, count: Count) -> None:
        super().crop_to(count)
        self.entries["least"] = min(self.entries["least"], count) if isinstance(count, int) else 0


class RecentTokens(TokenStore):
    """
    The newest keys and values of a sequence. All rows end in the last slot: where they have come unequally far, a new token is
    put behind all of them in the same slot, the oldest that are let go of are in the same slots, and the first slots of
    shorter rows stand for nothing. Such rows keep the newest `most` slots.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    @property
    def first(self) -> Count:
        """The position of slot 0, below 0 where the slot stands for nothing."""
        key = self.entries["key"]
        return self.count - (0 if key is None else key.shape[2])

    def extend(self, key: Tensor, value: Tensor, lengths: Tensor | None = None) -> Buffer:
        """As of any store; but rows that came unequally far before the call end in the last slot."""
        entries, n, before, held = self.entries, key.shape[2], self.count, 0
        if entries["key"] is not None:
            held = entries["key"].shape[2]
            key, value = self._appended("key", key, held), self._appended("value", value, held)
        added, size = n if lengths is None else lengths, held + n
        buffer = Buffer(key, value, before - held, held, held + added)
        if lengths is not None:
            slots = (torch.arange(size, device=key.device) - (n - lengths)[:, None]).clamp_min(0)
            if isinstance(before, int):
                slots = slots[:, max(size - self.most, 0) :]
            key, value = take(key, slots), take(value, slots)
            if not isinstance(before, int):
                buffer = Buffer(key, value, before + added - size, size - added, size)
        entries.update(key=key, value=value, count=before + added)
        if not isinstance(self.count, int):
            self._forget(key.shape[2] - self.most)
        return buffer

    def keep_from(self, position: Count) -> None:
        """Forgets tokens before `position` where rows agree."""
        if isinstance(position, int) and isinstance(self.count, int):
            self._forget(position - self.first)

    def _forget(self, slots: int) -> None:
        """The first so many slots, if any."""
        entries = self.entries
        for name in ("key", "value") if slots > 0 and entries["key"] is not None else ():
            room, kept = self.rooms.get(name), entries[name][:, :, slots:]
            if room is not None and room.view is entries[name]:
                room.view = kept
            entries[name] = kept

    def can_crop(self) -> bool:
        return isinstance(self.count, int) and self.first == 0


class AttentionState(Node, CacheLayerMixin):
    """
    The cache layer of one patched attention layer, put into the user's own `Cache` in place of an empty layer.

    `update` hands back the new keys and values alone; the variant keeps what it needs in `entries`. `count` is the
    number of real tokens before the current call, `read` that of all tokens before it, and `seen` of those that Transformers
    knows of, which are more while a call runs.
    """

    is_sliding = False
    is_compileable = False
    supports_early_init = False

    def __init__(self) -> None:
        CacheLayerMixin.__init__(self)
        Node.__init__(self)
        self.seen = 0
        self.read = 0
        self.count: Count = 0
        self.padded: Tensor | None = (
            None  # (B, at most `read`) bool, which tokens are real, up to the latest padded call
        )
        self.shared: dict | None = None  # what the layers of a model make once for all, in the call that they read
        self.owner: dict | None = None  # the config of the variant that fills this state
        self.expected = False  # the patched layer that owns this state is in its forward
        self.interrupted = False  # a call failed on the way: layers hold different tokens
        self.record_past = False
        self.records: list[dict] = []  # of each call since the latest `crop`: the state before it, and its inputs
        self.pending: dict | None = None  # a call's inputs to be read again before the next call

    def __copy__(self) -> Node:
        twin = super().__copy__()
        twin.records = []  # which speak of this tree
        return twin

    # What Transformers asks of a cache layer

    @property
    def is_croppable(self) -> bool:
        """Whether the newest tokens can be taken back: calls are recorded, or nothing was let go of yet."""
        return self.record_past or self.can_crop()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = self.values = key_states[:, :, :0].clone()  # where others look; what is kept lies in `entries`
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if self.owner is not None and not self.expected:  # dense attention would see the new keys alone
            raise ValueError(
                f"this layer of the cache is the decoder state of a patched layer ({self.owner}), which a dense layer cannot "
                "read. Start with a new cache."
            )
        self.expected = False
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.seen += key_states.shape[-2]
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + int(query_length), 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        owner = self.owner
        self.__init__()
        self.owner = owner

    def offload(self) -> None:
        self.map_tensors(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.is_initialized:
            self.map_tensors(lambda x: x.to(self.device, non_blocking=True))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.map_tensors(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.map_tensors(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.map_tensors(lambda x: x[indices.to(x.device)])

    def activate_past_recording(self) -> None:
        """From now on the calls since the latest `crop` can be taken back, in whole or in part, by the next one."""
        self.record_past = True

    def stop_past_recording(self) -> None:
        """What was recorded is dropped, and so are the states before it."""
        self.record_past, self.records = False, []

    def crop(self, tokens_to_remove: int) -> None:
        """
        Forgets the newest `-tokens_to_remove` tokens (the sign is Transformers' own; a positive number is its older
        form, the length to keep). 0 drops what was recorded for taking a call back.

        Raises:
            RuntimeError: the state no longer holds what these tokens replaced.
            ValueError: more tokens than were read.
        """
        tokens_to_remove = int(tokens_to_remove)  # assisted decoding of Transformers 5.17 gives a tensor
        remove = -tokens_to_remove if tokens_to_remove <= 0 else max(self.seen - tokens_to_remove, 0)
        if remove > self.seen:
            raise ValueError(f"cannot take {remove} tokens back: this attention state has read {self.seen}.")
        if remove == 0:
            self.records = []
            return
        keep = self.seen - remove
        record = next((record for record in reversed(self.records) if record["read"] <= keep), None)
        self.records = []
        if record is not None:
            taken = keep - record["read"]
            self.restore(record["entries"])
            self.read, self.count, self.padded, self.pending = record["read"], record["count"], record["padded"], None
            if taken:
                self.pending = {n: x[..., :taken, :] if x.ndim > 2 else x[:, :taken] for n, x in record["call"].items()}
            self.seen = keep
            return
        if self.pending is not None or not self.can_crop():
            raise RuntimeError(
                f"cannot take {remove} of {self.seen} tokens back: this attention state has already let go of what they "
                "replaced. Call `activate_past_recording()` on the cache before the forward that is to be taken back."
            )
        if self.padded is None:
            self.count = keep
        else:
            self.padded = self.real[:, :keep]
            self.count = self.padded.sum(1)
        self.seen = self.read = keep
        self.crop_to(self.count)
        self.own()

    # What `EfficientAttention` does around a variant

    def begin(self, call: dict[str, Tensor]) -> None:
        """Before a call's tokens are read: `call` holds its inputs, tokens on the last axis but one."""
        if not self.record_past:
            self.records = []
            return
        now = {"read": self.read, "count": self.count, "padded": self.padded}
        self.records.append({"entries": self.snapshot(), "call": call, **now})

    def commit(self, real: Tensor | None, batch: int, length: int) -> None:
        """After a call's tokens were read: `real` (B, N) bool as the call gave it, or None where all are real."""
        if not torch.compiler.is_compiling():
            self.own()
        if real is not None:
            before = real.new_ones(batch, self.read) if self.padded is None else self.real
            self.padded = torch.cat([before, real], 1)
        self.count = self.once("count", lambda: self.count + (length if real is None else real.sum(1)))
        self.read += length
        for state in (self, *self.entries.values()):
            if isinstance(state, AttentionState):
                state.shared = None

    @property
    def real(self) -> Tensor | None:
        """(B, read) bool, which tokens are real, or None where all are."""
        return None if self.padded is None else pad(self.padded, (0, self.read - self.padded.shape[1]), value=True)

    def once(self, what: Hashable, make: Callable[[], Any]) -> Any:
        """
        make(), or what it gave another layer of the model in the same call: layers have read the same tokens, so that `what`
        need only name what else it depends on.
        """
        if self.shared is None:
            return make()
        what = self.read, what
        if what not in self.shared:
            self.shared[what] = make()
        return self.shared[what]

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> None:
        super().map_tensors(function)
        for owner in ("count", "padded"):
            if isinstance(getattr(self, owner), Tensor):
                setattr(self, owner, function(getattr(self, owner)))
        if self.pending is not None:
            self.pending = {name: function(x) for name, x in self.pending.items()}
        self.records = []  # rows moved: what was recorded no longer fits

    def store(self, name: str, factory: Callable[[], Node] = TokenStore) -> Node:
        """The node called `name`, made on first use."""
        if name not in self.entries:
            self.entries[name] = factory()
        return self.entries[name]

    def part(self, name: str, factory: Callable[[], AttentionState]) -> AttentionState:
        """The state of a variant that serves some of the layer's heads, which stands where this one does."""
        own = self.store(name, factory)
        own.read, own.count, own.shared = self.read, self.count, self.shared
        return own


def take(x: Tensor, source: Tensor) -> Tensor:
    """The slots `source` (B, T) of x (B, G, S, D) -> (B, G, T, D)."""
    return pick(x, source[:, None].expand(-1, x.shape[1], -1))


def pick(x: Tensor, slots: Tensor) -> Tensor:
    """x (B, G, S, D), slots (B, G, K) -> (B, G, K, D)."""
    width, steps = x.shape[3], x.stride()
    if (
        x.device.type != "cpu"
        or torch.is_grad_enabled()
        or not width
        or not x.shape[2]
        or steps[3] != 1
        or any(s % width for s in steps[:3])
    ):
        return torch.gather(x, 2, slots[..., None].expand(-1, -1, -1, width))
    # Whole rows at a time, which gather does not do: x as rows of its storage, whatever lies between them.
    batch, group, slot = (s // width for s in steps[:3])
    count = 1 + sum((n - 1) * step for n, step in zip(x.shape, (batch, group, slot), strict=False))
    places = slots * slot + torch.arange(x.shape[1])[:, None] * group + torch.arange(x.shape[0])[:, None, None] * batch
    return x.as_strided((count, width), (width, 1)).index_select(0, places.flatten()).view(*slots.shape, width)
