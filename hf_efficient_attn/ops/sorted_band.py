"""
Attention among tokens of one label (a cluster, a bucket). Keys are put in order of (label, position); then what a query
reads is one interval of ranks,
    decoder: the `window` most recent keys of its label, at or before it, and the sinks, which have none,
    encoder: the nearest `window` keys of its label on each side and its own, or a chunk of the order,
and a causal band cut at label boundaries is the special case where queries and keys have the same labels. With several
orders (rounds of hashing) a query reads the union of its intervals, each key once; its own key joins where none has it.

Queries are taken in order of their intervals, some to a tile; a tile reads the keys from the first to the last that any of
its queries sees, by a fused kernel. So the cost is N (window + tile) D, and follows the labels: a label of few keys costs
few. Queries and keys are copied tile by tile, some megabytes at a time, in whatever order they are stored. On a CPU and
without dropout a kernel does it in one pass (`sorted_intervals`).

Letters: B batch, H query heads, G key/value heads, N queries of this call, S keys (in a decoder those stored and the
call's own), D head size, C labels, R rounds; n tiles of T queries and L keys; an order of E entries of each of U heads,
G or H.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..caching import AttentionState, column
from .few import attend_ranges, attend_slots, recent_ranges
from .few import has_kernel as has_few_kernel
from .grain import at_once
from .joint import HUGE, Part, _backward, _forward, joint_attention_and_lse
from .sorted_intervals import has_kernel, sorted_intervals
from .tiles import _extended, _rows, _Space

TILE = 64  # queries
AREA = 2**19  # weights that exist at one time on a CPU
STEP = 8  # new tokens up to which each query reads its keys by itself


@dataclass(frozen=True)
class Intervals:
    """
    One order of the keys of each head, and what every query reads of it. order: (B, U, E) int64, the key at each rank.
    low, high: (B, H, N) int64, ranks low..high-1, which ascend together: of two queries one has neither bound above the
    other's. Of several orders all but the last are of the G key/value heads and list every key once.
    """

    order: Tensor
    low: Tensor
    high: Tensor

    def ranks(self) -> Tensor:
        """(B, U, E): the rank of each key, where all are listed."""
        ranks = torch.arange(self.order.shape[2], device=self.order.device).expand_as(self.order)
        return torch.empty_like(self.order).scatter_(2, self.order, ranks)

    def ranks_of(self, slots: Tensor) -> Tensor:
        """Slots (B, H, N, A), or -1 -> (B H N + 1, A), their ranks in the one order of `flat`, or -1; of no query -1."""
        batch, heads, entries = self.order.shape
        ranks = self.ranks().repeat_interleave(slots.shape[1] // heads, 1)
        row = torch.arange(batch * heads, device=slots.device).view(batch, heads, 1) * entries
        ranks = ranks + row.repeat_interleave(slots.shape[1] // heads, 1)
        ranks = torch.gather(ranks, 2, slots.clamp_min(0).flatten(2)).view(slots.shape)
        return pad(ranks.masked_fill(slots < 0, -1).flatten(0, 2), (0, 0, 0, 1), value=-1)

    def flat(self, groups: int, size: int) -> Intervals:
        """The same with one order (B U E,) of all, of places in the flattened (B, G, S), and ranks in it."""
        batch, heads, entries = self.order.shape
        row = torch.arange(batch * heads, device=self.order.device).view(batch, heads, 1)
        order = (self.order + row // (heads // groups) * size).flatten()
        begin = (row * entries).repeat_interleave(self.low.shape[1] // heads, 1)
        return Intervals(order, self.low + begin, self.high + begin)


@dataclass(frozen=True)
class Labels:
    """
    The keys of each head in order of (label, slot), (B, G, S); slots without a token have the label C. codes: (B G S,)
    int64, ascending, (head * (C + 1) + label) * (S + 1) + slot. starts: (B, G, C + 2), the first rank of each label, and S.
    """

    codes: Tensor
    order: Tensor
    starts: Tensor

    @staticmethod
    def of(labels: Tensor, count: int, used: Tensor | None = None) -> Labels:
        """labels: (B, G, S), integers below `count`, or `count` where there is no token; so where not `used` (B, S)."""
        labels, (batch, groups, size) = labels.to(torch.int64), labels.shape
        if used is not None:
            labels = labels.masked_fill(~used[:, None], count)
        heads = torch.arange(batch * groups, device=labels.device).view(batch, groups, 1) * (count + 1)
        codes = (heads + labels) * (size + 1) + torch.arange(size, device=labels.device)
        codes, order = torch.sort(codes.flatten())
        starts = torch.searchsorted(codes, (heads + torch.arange(count + 2, device=labels.device)) * (size + 1))
        begin = heads // (count + 1) * size
        return Labels(codes, order.view(batch, groups, size) - begin, starts - begin)

    def ranks(self, labels: Tensor, before: Tensor, live: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """
        For queries of these labels (B, H, N), of (B, H, N) each: the rank of the first key of the label, one past that of the
        last in a slot < `before` (B, N), which is at least 0, and one past that of the last of all. Where not `live` (B, N),
        all three are the rank of the first key that is no token.
        """
        (groups, places), size = self.starts.shape[1:], self.order.shape[2]
        labels, before = labels.to(torch.int64), before[:, None]
        if live is not None:
            labels = labels.masked_fill(~live[:, None], places - 2)
            before = before.masked_fill(~live[:, None], 0)
        heads = torch.arange(self.starts[..., 0].numel(), device=labels.device).view(-1, groups)
        heads = heads.repeat_interleave(labels.shape[1] // groups, 1)[..., None]
        place, codes = heads * places + labels, (heads * (places - 1) + labels) * (size + 1)
        start, stop = self.starts.flatten()[place], self.starts.flatten()[place + 1]
        end = torch.searchsorted(self.codes, codes + before) - heads * size
        return start, end, stop if live is None else torch.where(live[:, None], stop, start)

    def chunks(self, size: int, heads: int, lengths: Tensor | None, back: int = 0) -> Intervals:
        """Each row's tokens cut, in this order, into chunks of `size`: a token reads its chunk and `back` before it."""
        rank = Intervals(self.order, self.order, self.order).ranks()
        low, end = rank // size * size, self.order.shape[2] if lengths is None else lengths[:, None, None]
        high = torch.clamp_max(low + size, end)
        low = torch.minimum((low - back * size).clamp_min(0), high)
        low, high = (x.repeat_interleave(heads // self.order.shape[1], 1) for x in (low, high))
        return Intervals(self.order, low, high)


@torch.compiler.disable
def past_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_labels: Tensor,
    key_labels: Tensor,
    *,
    count: int,
    window: int,
    num_sinks: int,
    lengths: Tensor | None,
    state: AttentionState | None,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """
    Decoder: token t reads, in every round, the `window` most recent keys j <= t of its query's label, itself, and of the
    first `num_sinks` keys, which have no label, those at or before it.

    query (B, H, N, D), key and value (B, G, N, D), compacted, `lengths` (B,) or None; labels of queries (B, H, N, R) and
    keys (B, G, N, R), integers below `count`. state: what earlier calls left, or None; this call is added to it.
    """
    options = {"scaling": scaling, "dropout": dropout}
    n, offset = query.shape[2], 0
    if state is not None:
        offset = state.count
        buffer = state.store("tokens").extend(key, value, lengths)
        key, value = buffer.key, buffer.value
        labels = key_labels.to(torch.int32)
        key_labels = state.store("labels").extend(labels, labels[..., :0], lengths).key  # (B, G, S, R)
    position = (column(offset) + torch.arange(n, device=query.device)).expand(query.shape[0], n)
    if n <= STEP and state is not None and has_few_kernel(query, key, value, dropout):
        ranges = recent_ranges(query_labels, key_labels, position, window, num_sinks)
        most = key_labels.shape[3] * window + num_sinks + 1
        return attend_ranges(query, key, value, *ranges, most, scaling=scaling)[0]
    if n <= STEP and state is not None:
        slots, seen = _recent(query_labels, key_labels, position, window, num_sinks)
        return attend_slots(query, key, value, slots, seen, **options)
    used = live = None
    if lengths is not None or not isinstance(offset, int):
        total = torch.as_tensor(offset + (n if lengths is None else lengths)).view(-1, 1)
        used, live = torch.arange(key.shape[2], device=key.device) < total, position < total
    slot = torch.arange(key.shape[2], device=key.device)
    rounds, alone = [], (position >= num_sinks)[:, None].expand(query.shape[:3]).clone()
    for r in range(key_labels.shape[3]):
        labels = Labels.of(key_labels[..., r].masked_fill(slot < num_sinks, count), count, used)
        start, end, _ = labels.ranks(query_labels[..., r], position + 1, live)
        rounds.append(Intervals(labels.order, torch.maximum(start, end - window), end))
        alone &= query_labels[..., r] != _at(key_labels[..., r], position, query.shape[1])
    own = torch.where(alone, position[:, None], -1)
    lead = (position + 1).clamp_max(num_sinks) if num_sinks else None
    return interval_attention(query, key, value, rounds, own=own, lead=lead, **options)


@torch.compiler.disable
def near_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_labels: Tensor,
    key_labels: Tensor,
    *,
    count: int,
    window: int,
    lengths: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """Encoder, as `past_attention`: the nearest `window` keys on each side of t with its query's label, and key t."""
    n = query.shape[2]
    position = torch.arange(n, device=query.device).expand(query.shape[0], n)
    live = None if lengths is None else position < lengths[:, None]
    rounds, alone = [], torch.ones(query.shape[:3], dtype=torch.bool, device=query.device)
    for r in range(key_labels.shape[3]):
        labels = Labels.of(key_labels[..., r], count, live)
        start, end, stop = labels.ranks(query_labels[..., r], position + 1, live)
        same = query_labels[..., r] == key_labels[..., r].repeat_interleave(query.shape[1] // key.shape[1], 1)
        low = torch.maximum(start, end - same.to(torch.int64) - window)
        rounds.append(Intervals(labels.order, low, torch.minimum(stop, end + window)))
        alone &= ~same
    own = torch.where(alone, position[:, None], -1)
    return interval_attention(query, key, value, rounds, own=own, scaling=scaling, dropout=dropout)


def _at(labels: Tensor, position: Tensor, heads: int) -> Tensor:
    """labels (B, G, S) at slots position (B, N) -> (B, H, N)."""
    index = position.clamp_max(labels.shape[2] - 1)[:, None].expand(-1, labels.shape[1], -1)
    return torch.gather(labels, 2, index).repeat_interleave(heads // labels.shape[1], 1)


def _recent(
    query_labels: Tensor, key_labels: Tensor, position: Tensor, window: int, num_sinks: int
) -> tuple[Tensor, Tensor]:
    """The keys that few queries read: slots (B, H, N, K) int64 and, alike, which of them count."""
    heads, groups, size, rounds = query_labels.shape[1], *key_labels.shape[1:]
    slot = torch.arange(size, device=key_labels.device, dtype=torch.int32)
    here = position[:, None, :, None]
    visible = (slot == here) | ((slot < num_sinks) & (slot <= here))
    for r in range(rounds):
        keys = key_labels[..., r].repeat_interleave(heads // groups, 1)[:, :, None]
        among = (slot >= num_sinks) & (slot <= here)
        of_label = torch.where((keys == query_labels[..., r, None]) & among, slot, -1)
        oldest = of_label.topk(min(window, size), -1).values[..., -1:]
        visible = visible | ((of_label >= oldest) & (of_label >= 0))
    best = torch.where(visible, slot, -1).topk(min(rounds * window + num_sinks + 1, size), -1).values
    return best.to(torch.int64), best >= 0


def interval_attention(query: Tensor, key: Tensor, value: Tensor, rounds: list[Intervals], **options) -> Tensor:
    """The output of `interval_attention_and_lse` alone."""
    return interval_attention_and_lse(query, key, value, rounds, **options)[0]


@torch.compiler.disable
def interval_attention_and_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rounds: list[Intervals],
    *,
    own: Tensor | None = None,
    apart: Tensor | None = None,
    lead: Tensor | None = None,
    scaling: float,
    dropout: float = 0.0,
    tile: int = TILE,
) -> tuple[Tensor, Tensor]:
    """
    Each query reads the union of its intervals, each key once, and what there is beside them: query (B, H, N, D), key and value
    (B, G, S, D) -> (B, H, N, D), and the log-sum-exp (B, H, N) of each query's logits; zeros and -inf where there is nothing.

    own: (B, H, N) int64 or None, a slot that the query reads besides its intervals, which then do not hold it; apart: (B, H,
    N, A) int64 or None, slots that it never reads in an interval of orders that list every key; -1 where there is none. lead:
    (B or 1, N) int64 or None, how many of the first keys it reads besides, which then are in no interval.
    """
    if has_kernel(query, dropout):
        orders = [(one.order, one.low, one.high) for one in rounds]
        return sorted_intervals(query, key, value, orders, own, apart, lead, scaling=scaling)
    (groups, size), parts = key.shape[1:3], []
    flat = [one.flat(groups, size) for one in rounds]
    row = torch.arange(key.shape[:2].numel(), device=key.device).view(-1, groups, 1) * size
    ranks = [row + one.ranks() for one in rounds[:-1]]
    for r, one in enumerate(flat):
        earlier = list(zip(flat[:r], (x.flatten() for x in ranks[:r]), strict=True))
        away = None if apart is None else rounds[r].ranks_of(apart)
        parts.append(SortedBand(key, value, one, _tiles(one, tile), earlier, own if r == 0 else None, away))
    if lead is not None:
        first = int(lead.max())
        mask = (torch.arange(first, device=key.device) < lead[..., None])[:, None]
        parts.append(Part(key[:, :, :first], value[:, :, :first], mask=mask))
    return joint_attention_and_lse(query, parts, scaling=scaling, dropout=dropout)


def _tiles(intervals: Intervals, tile: int) -> list[tuple[Tensor, Tensor, int]]:
    """
    Tiles of about equal width together: rows (n, T) int64, queries of the flattened (B, H, N), or B H N in a slot that no
    query fills; first (n,) int64, the first rank that the tile reads; L, how many it reads.
    """
    low, high, size = intervals.low.flatten(), intervals.high.flatten(), len(intervals.order)
    codes, row = torch.sort(low * (size + 1) + high)
    low, high, count, device = codes // (size + 1), codes % (size + 1), len(row), row.device
    tile = min(tile, count)
    index = torch.arange(count, device=device)
    apart = torch.zeros_like(index)  # the first query of those whose intervals hang together, which alone share tiles
    apart[1:] = index[1:] * ((low[1:] > low[:-1]) & (low[1:] >= high[:-1]))
    begin = ((index - apart.cummax(0).values) % tile == 0).nonzero()[:, 0]
    end = torch.cat([begin[1:], begin.new_tensor([count])])
    length, place = torch.sort((high[end - 1] - low[begin]).clamp_min(1), descending=True)
    begin, end, lengths = begin[place], end[place], length.tolist()
    first, slot = low[begin], torch.arange(tile, device=device)
    tiles, done = [], 0
    while done < len(lengths):
        width = min(-(-lengths[done] // 16) * 16, size)
        piece = slice(done, done + max(1, at_once(AREA, device) // (tile * width)))
        index = begin[piece, None] + slot
        rows = row[index.clamp_max(count - 1)].masked_fill_(index >= end[piece, None], count)
        tiles.append((rows, first[piece].clamp_max(size - width), width))
        done = piece.stop
    return tiles


@dataclass(frozen=True)
class SortedBand:
    """
    A part for `joint_attention`: what the queries read by one order, a flat one, and the keys `own`. A key that a query has
    read by one of the `earlier` orders, which come with the ranks of keys in them, is left out; and so are the keys at the
    ranks `apart` (B H N + 1, A).
    """

    key: Tensor
    value: Tensor
    intervals: Intervals
    tiles: list[tuple[Tensor, Tensor, int]]
    earlier: list[tuple[Intervals, Tensor]]
    own: Tensor | None = None
    apart: Tensor | None = None
    bias: None = None
    scatter: None = None
    span: tuple[int, None] = (0, None)

    def accumulate(self, output, total, query, key, value, bias, scaling, dropout):
        """As `Part.accumulate`."""
        accurate, count = torch.promote_types(query.dtype, torch.float32), query.shape[:3].numel()
        queries, keys, values = (x.reshape(-1, x.shape[3]) for x in (query, key, value))
        own, before, kept, space = self._places(self.own), None, [], _Space(query)
        if output is None:
            output, total = queries.new_empty(count + 1, query.shape[3], dtype=accurate), None
            total = output.new_empty(count + 1)
        else:
            before = output, total = [
                torch.cat([x.flatten(0, 2), x.new_zeros(1, *x.shape[3:])]) for x in (output, total)
            ]
        for rows, _, part in self._parts(keys, values, space):
            flat = rows.flatten()
            q = _copy(queries, flat.clamp_max(count - 1), space, "q")
            out, lse, keep = _forward(
                q.view(len(rows), 1, -1, q.shape[1]), part.key, part.value, part, scaling, dropout
            )
            out, lse, keep_own = out.reshape(q.shape).to(accurate), lse.flatten().to(accurate), None
            if own is not None:
                place = own[flat]
                safe = place.clamp_min(0)
                k, v = (_copy(x, safe, space, name).to(accurate) for x, name in ((keys, "own k"), (values, "own v")))
                logit = ((q.to(accurate) * k).sum(-1) * scaling).masked_fill_(place < 0, float("-inf"))
                if dropout:
                    keep_own = (torch.rand_like(logit) >= dropout).to(accurate)[:, None] / (1 - dropout)
                    v = v * keep_own
                out, lse = _merge(out, lse, v, logit)
            if before is not None:
                out, lse = _merge(out, lse, *(x.index_select(0, flat) for x in before))
            output.index_copy_(0, flat, out)
            total.index_copy_(0, flat, lse)
            kept.append((keep, keep_own))
        return output[:-1].view(query.shape), total[:-1].view(query.shape[:3]), kept

    def differentiate(self, grad, output, total, query, key, value, bias, scaling, dropout, kept):
        """As `Part.differentiate`."""
        count, own = query.shape[:3].numel(), self._places(self.own)
        tables = [x.reshape(-1, x.shape[3]) for x in (grad, query, output)]
        keys, values = (x.reshape(-1, x.shape[3]) for x in (key, value))
        total = torch.cat([total.flatten(), total.new_full((1,), HUGE)])
        dq = query.new_empty(count + 1, query.shape[3], dtype=total.dtype)
        dk, dv = (torch.zeros_like(x, dtype=total.dtype) for x in (keys, values))
        space = _Space(query)
        for (rows, slots, part), (keep, keep_own) in zip(self._parts(keys, values, space), kept, strict=True):
            flat = rows.flatten()
            safe = flat.clamp_max(count - 1)
            per_row = [_copy(x, safe, space, name) for x, name in zip(tables, "gqo", strict=True)]
            lse, dims = total.index_select(0, flat), (len(rows), 1, -1, query.shape[3])
            g, q, o = (x.view(dims) for x in per_row)
            given = _backward(g, q, part.key, part.value, o, lse.view(len(rows), 1, -1), part, scaling, dropout, keep)
            dq1, dk1, dv1 = (x.reshape(-1, x.shape[3]).to(total.dtype) for x in given)
            dk.index_add_(0, slots, dk1)
            dv.index_add_(0, slots, dv1)
            if own is not None:
                g, q, o = (x.to(total.dtype) for x in per_row)
                place = own[flat]
                safe = place.clamp_min(0)
                k, v = (_copy(x, safe, space, name).to(total.dtype) for x, name in ((keys, "own k"), (values, "own v")))
                weight = torch.exp((q * k).sum(-1) * scaling - lse).masked_fill_(place < 0, 0.0)[:, None]
                dropped = 1 if keep_own is None else keep_own
                dlogit = weight * (g * (v * dropped - o)).sum(-1, keepdim=True) * scaling
                dq1 = dq1.addcmul(dlogit, k)
                dk.index_add_(0, safe, dlogit * q)
                dv.index_add_(0, safe, weight * dropped * g)
            dq.index_copy_(0, flat, dq1)
        return dq[:-1].view(query.shape), dk.view(key.shape), dv.view(value.shape), None

    def _parts(self, keys: Tensor, values: Tensor, space: _Space):
        """Of each group of tiles the rows (n, T), its keys' places (n L,) in the flattened (B, G, S), and the part itself."""
        orders = [(self.intervals, None), *self.earlier]
        bounds = [(_extended(one.low, -1), _extended(one.high, -1), ranks) for one, ranks in orders]
        for rows, first, width in self.tiles:
            places = (first[:, None] + torch.arange(width, device=first.device)).flatten()
            places = self.intervals.order.index_select(0, places)
            k, v = (_copy(x, places, space, name) for x, name in ((keys, "k"), (values, "v")))
            k, v = (x.view(len(rows), 1, width, -1) for x in (k, v))
            yield rows, places, Part(k, v, mask=_Seen(rows, first, places, bounds, self.apart))

    def _places(self, slots: Tensor | None) -> Tensor | None:
        """Slots (B, H, N) -> (B H N + 1,), their places in the flattened (B, G, S); -1 where there is none."""
        if slots is None:
            return None
        batch, groups, size = self.key.shape[:3]
        heads = torch.arange(batch * groups, device=slots.device).view(batch, groups)
        heads = heads.repeat_interleave(slots.shape[1] // groups, 1)[..., None]
        return _extended(torch.where(slots < 0, -1, slots + heads * size), -1)


def _copy(table: Tensor, index: Tensor, space: _Space, name: str) -> Tensor:
    """The entries `index` (n,) of table (m, D), in the space of that name."""
    return _rows(table, index, space(name, len(index), table.shape[1]))


def _merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Two results (n, D) on disjoint keys, with their log-sum-exp (n,), as one; `out` is overwritten."""
    joined = torch.logaddexp(lse, other_lse)
    safe = joined.masked_fill(joined == float("-inf"), 0.0)
    out = out.mul_(torch.exp(lse - safe)[:, None]).addcmul_(other, torch.exp(other_lse - safe)[:, None])
    return out, joined


@dataclass(frozen=True)
class _Seen:
    """
    The mask of some tiles, as `Part.mask`. bounds: low, high (B H N + 1,) of this order, and of each earlier one with the
    ranks (B G S,) that keys have in it; apart as in `SortedBand`.
    """

    rows: Tensor
    first: Tensor
    places: Tensor
    bounds: list[tuple[Tensor, Tensor, Tensor | None]]
    apart: Tensor | None

    def __call__(self, begin: int, end: int) -> Tensor:
        """(n, 1, end - begin, L)."""
        rows, first, places = self.rows[:, begin:end], self.first[:, None], self.places.view(len(self.first), 1, -1)
        low, high = ((x[rows] - first).to(torch.int32)[..., None] for x in self.bounds[0][:2])
        key = torch.arange(places.shape[2], device=first.device, dtype=torch.int32)
        seen = (key >= low).logical_and_(key < high)
        for low, high, ranks in self.bounds[1:]:
            rank = ranks[places].to(torch.int32)
            low, high = (x[rows].to(torch.int32)[..., None] for x in (low, high))
            seen.logical_and_((rank < low).logical_or_(rank >= high))
        if self.apart is not None:
            away, width = self.apart[rows] - first[..., None], places.shape[2]
            away = torch.where((away < 0) | (away >= width), width, away)  # a key that is cut off again
            seen = pad(seen, (0, 1)).scatter_(2, away, False)[..., :width]
        return seen[:, None]
