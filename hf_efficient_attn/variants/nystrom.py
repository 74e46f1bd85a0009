"""
`nystrom`: attention through landmarks, the means q~ and k~ of queries and keys over stretches of tokens:

    out = softmax(scaling Q K~^T) A^+ softmax(scaling Q~ K^T) V,    A = softmax(scaling Q~ K~^T).

Paper: Xiong et al. 2021, Nystroemformer, arXiv:2102.03902. Encoder: `num_landmarks` = m near-equal stretches of the row's real
tokens, A^+ by `iterations` steps of the paper's iteration; rows of at most m tokens attend exactly. Cost N m.

Decoder (the paper has none): one landmark per complete segment of `segment_size` tokens, without the sinks. Landmark i reads
segments 0..i only, in A and in B = softmax(Q~ K^T) V. A is then lower triangular, and W of (A + ridge) W = B + ridge V~, V~ the
means of values, solved row by row, never changes what it gave: a landmark is a slot with key k~_i and value W_i, which
`ops.summaries` joins with the exact part, a query's own segment, `exact_segments` before it and `num_sinks` first tokens. A
slot weighs n_i exp(scaling q k~_i + bias), n_i the tokens that it stands for; A has these weights, too. Cost N^2 /
segment_size. State: all tokens, which later landmarks read, the queries of the segment under way, and the landmarks, O(N).

Dense limit: encoder num_landmarks >= N, decoder segment_size >= N.
Parameters: with `conv_kernel` = c `conv` (G, c), a convolution of the values along the sequence that is added to the output,
zero at the start, in a decoder over the token and c - 1 before it; in a decoder `slot_bias`, one per query head, zero at the
start.

From the paper: the iteration starts from each matrix's own norms, not from the largest in the batch, on which a row would
depend otherwise; the convolution belongs to key/value heads. The ridge holds W to V~: without it W grows from segment to
segment and without bound where landmarks attend to others more than to themselves; with ridge > 1 nothing in it exceeds
(ridge + 1) / (ridge - 1) times the largest of V. In models that rotate keys the mean over a segment blurs their high
frequencies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad
from torch.utils.checkpoint import checkpoint

from ..caching import Buffer, Count, RecentTokens, TokenStore, column, take
from ..config import option
from ..ops.exact import exact_attention, masked_attention, sdpa
from ..ops.joint import CHUNK, Part
from ..ops.local import Context, Segments, in_ranges, local_decoder
from ..ops.ranges import range_decoder
from ..ops.summaries import SlotsBefore, SlotStore, SummaryConfig, most_ended, segments_of
from ..registry import register_variant
from ..variant import EfficientAttention, HostShape
from .transformer_xl import TransformerXLConfig

ROWS = 16  # landmarks that read at one time: their masks reach over all tokens
NEVER = torch.finfo(torch.float32).min  # the logarithm of no token; finite, for rows that have nothing else


@dataclass(kw_only=True)
class NystromConfig(SummaryConfig):
    num_landmarks: int = option(128, "landmarks of an encoder's row", minimum=1)
    iterations: int = option(6, "steps towards the inverse, in encoders; many more lose quality", minimum=1)
    ridge: float = option(
        2.0, "decoder: how much landmarks' values are held to their segments' mean values", minimum=1.0
    )
    conv_kernel: int | None = option(
        None, "values that a convolution beside attention reads, odd; None: none", minimum=1
    )

    def validate(self) -> None:
        if self.conv_kernel and self.conv_kernel % 2 == 0:
            raise ValueError(
                f"NystromConfig.conv_kernel = {self.conv_kernel} must be odd, so that an encoder's kernel has a middle."
            )

    @classmethod
    def tiny(cls, causal: bool) -> NystromConfig:
        return cls(num_landmarks=4, segment_size=8, num_sinks=3)

    @classmethod
    def variations(cls, causal: bool) -> list[NystromConfig]:
        return [
            cls(num_landmarks=5, iterations=3, conv_kernel=5, segment_size=5, num_sinks=7),
            cls(num_landmarks=1, segment_size=4, exact_segments=0, num_sinks=0, ridge=1.0),
            cls(num_landmarks=8, conv_kernel=1, segment_size=3, exact_segments=2, num_sinks=6),
        ]

    @classmethod
    def dense_limit(cls, length: int, causal: bool) -> NystromConfig:
        return cls(num_landmarks=max(length, 1), segment_size=max(length, 1))

    def window_only(self, causal: bool) -> TransformerXLConfig | None:
        """A decoder's exact part, and nothing else; an encoder has none."""
        return TransformerXLConfig(**self.exact_part()) if causal else None


@register_variant(
    "nystrom",
    family="low rank",
    summary="attention through landmarks, means of queries and keys; in a decoder beside an exact window",
    paper="Xiong 2021, arXiv:2102.03902",
)
class NystromAttention(EfficientAttention):
    config_class = NystromConfig
    linear_cost = False  # in a decoder

    def __init__(self, config: NystromConfig, host: HostShape) -> None:
        super().__init__(config, host)
        if config.conv_kernel:
            self.conv = nn.Parameter(torch.zeros(host.num_kv_heads, config.conv_kernel))
        if host.causal:
            self.slot_bias = nn.Parameter(torch.zeros(host.num_heads))

    def attend(self, query, key, value, *, lengths, scaling, dropout, causal, state, hidden) -> Tensor:
        options = {"scaling": scaling, "dropout": dropout}
        if causal:
            return self._decoder(query, key, value, lengths, state, **options)
        output = self._encoder(query, key, value, lengths, **options)
        if self.config.conv_kernel:
            side = self.config.conv_kernel // 2
            output = self._add_convolution(output, pad(value, (0, 0, side, side)))
        return output

    def _add_convolution(self, output: Tensor, value: Tensor) -> Tensor:
        """value (B, G, N + c - 1, D): with what stands around it."""
        groups = value.shape[1]
        read = conv2d(value, self.conv.to(value)[:, None, :, None], groups=groups)
        return (output.unflatten(1, (groups, -1)) + read[:, :, None]).flatten(1, 2)

    # Encoder

    def _encoder(self, query, key, value, lengths, *, scaling, dropout) -> Tensor:
        m, n, options = self.config.num_landmarks, key.shape[2], {"scaling": scaling, "dropout": dropout}
        if n <= m:
            return exact_attention(query, key, value, lengths=lengths, causal=False, **options)
        with _accurately(query):
            accurate = torch.promote_types(query.dtype, torch.float32)
            q_mean, k_mean = (_stretch_means(x.to(accurate), m, lengths) for x in (query, key))
            read = exact_attention(
                q_mean, key.to(accurate), value.to(accurate), lengths=lengths, scaling=scaling, causal=False
            )
            matrix = _logits(q_mean, k_mean, scaling).softmax(-1)
            slots = _solve_by_iteration(matrix, read, self.config.iterations)  # large, and of both signs
            output = sdpa(query.to(accurate), _per_query_head(k_mean, query), slots, **options).to(query)
        if lengths is None:
            return output
        few = {"lengths": lengths.clamp_max(m), "causal": False, **options}
        exact = exact_attention(query[:, :, :m], key[:, :, :m], value[:, :, :m], **few)
        return torch.where((lengths <= m)[:, None, None, None], pad(exact, (0, 0, 0, n - m)), output)

    # Decoder

    def _decoder(self, query, key, value, lengths, state, *, scaling, dropout) -> Tensor:
        config, n, b = self.config, query.shape[2], self.config.segment_size
        pattern, options = Segments(b, config.exact_segments * b), {"scaling": scaling, "dropout": dropout}
        tokens = TokenStore() if state is None else state.store("tokens")
        buffer = tokens.extend(key, value, lengths)
        slots = self._landmarks(query, buffer, lengths, state, scaling)
        context = replace(_context(buffer, pattern, config.num_sinks), state=state, whole=lengths is None)
        if slots is None:
            output = local_decoder(query, context, pattern, **options)
        else:
            output = self._join(query, context, pattern, slots, **options)
        if config.conv_kernel:
            output = self._add_convolution(output, _with_past(buffer, config.conv_kernel - 1, n))
        return output

    def _landmarks(self, query, buffer: Buffer, lengths, state, scaling) -> tuple[Tensor, Tensor] | None:
        """Keys and values (B, H, S, D) of the landmarks of all complete segments, those that the call completes added."""
        count, b, n = 0 if state is None else state.count, self.config.segment_size, query.shape[2]
        begun, ended = count // b, (count + (n if lengths is None else lengths)) // b
        most = most_ended(state, b, n, lengths)
        queries = RecentTokens(b) if state is None else state.store("queries", lambda: RecentTokens(b))
        asked = queries.extend(query, query[..., :0], lengths)
        store = SlotStore(b, 1) if state is None else state.store("landmarks", lambda: SlotStore(b, 1))
        if most:
            q_mean, k_mean = (
                self._segment_means(x, first, begun, most)
                for x, first in ((asked.key, asked.first), (buffer.key, buffer.first))
            )
            with _accurately(query):
                v_mean = self._segment_means(buffer.value, buffer.first, begun, most)
                values = self._solve(q_mean, k_mean, _per_query_head(v_mean, query), store, buffer, begun, scaling)
            made = ended - begun
            store.extend(k_mean.to(query), values.to(query), None if isinstance(made, int) else made)
        if state is not None:
            queries.keep_from(ended * b)
        held = store.entries
        return None if held["key"] is None else (_per_query_head(held["key"], query), held["value"])

    def _segment_means(self, x: Tensor, first: Count, begun: Count, n: int) -> Tensor:
        """(B, G, n, D), float32 or better: the means of segments from `begun` on, without the sinks."""
        b, sinks = self.config.segment_size, self.config.num_sinks
        x = segments_of(x, first, begun, n, b)
        accurate = torch.promote_types(x.dtype, torch.float32)
        masked = n if sinks else 0
        if isinstance(begun, int):
            masked = min(max(-(-sinks // b) - begun, 0), n)
        head, rest = x.split([masked, n - masked], 2)
        real = column(begun) * b + torch.arange(masked * b, device=x.device) >= sinks
        real = real.view(1 if real.ndim == 1 else len(real), 1, masked, b, 1)
        head = head.masked_fill(~real, 0).sum(3, dtype=accurate) / real.sum(3).clamp_min(1)
        return torch.cat([head, rest.mean(3, dtype=accurate)], 2)

    def _solve(self, q_mean, k_mean, v_mean, store: SlotStore, buffer: Buffer, begun: Count, scaling) -> Tensor:
        """The values W (B, H, n, D) of the n landmarks from `begun` on."""
        config, b, n = self.config, self.config.segment_size, q_mean.shape[2]
        device, exact = q_mean.device, isinstance(begun, int)
        position = torch.arange(buffer.key.shape[2], device=device)
        begun_column = torch.as_tensor(begun, device=device).reshape(-1, 1, 1)  # (1 or B, 1, 1)

        def visible(begin: int, end: int) -> Tensor:
            t = position[: (begun + end) * b] if exact else position
            until = (begun_column + torch.arange(begin + 1, end + 1, device=device)[:, None]) * b
            return ((t >= config.num_sinks) & (t < until))[:, None]

        tokens = buffer.key.to(q_mean), buffer.value.to(q_mean)
        read = masked_attention(q_mean, *tokens, visible, scaling=scaling, at_once=ROWS)
        held = store.entries
        keys, values = k_mean[:, :, :0], read[:, :, :0]
        if held["key"] is not None:
            keys, values = held["key"].to(k_mean), held["value"].to(read)
        there = torch.arange(keys.shape[2], device=device) < begun_column[:, 0]  # which of the stored ones a row has
        weights = self._log_counts(0, keys.shape[2], read).masked_fill(~there, NEVER)
        solved = []
        for begin in range(0, n, CHUNK):
            piece = slice(begin, min(begin + CHUNK, n))
            keys = torch.cat([keys, k_mean[:, :, piece]], 2)
            own = self._log_counts(begun_column[:, 0] + begin, piece.stop - begin, read)
            weights = torch.cat([weights.expand(len(own), -1), own], 1)
            rows = read[:, :, piece] + config.ridge * v_mean[:, :, piece]
            given = q_mean[:, :, piece], keys, weights, values, rows, config.ridge, scaling
            again = n > CHUNK and torch.is_grad_enabled()
            solved.append(checkpoint(_solve_rows, *given, use_reentrant=False) if again else _solve_rows(*given))
            values = torch.cat([values, solved[-1]], 2)
        return torch.cat(solved, 2)

    def _log_counts(self, first: Count, n: int, like: Tensor) -> Tensor:
        """
        (1 or B, n), float32 or better: the logarithm of the tokens that landmarks first.. stand for; `first` int or (1 or B, 1)
        """
        b = self.config.segment_size
        j = torch.as_tensor(first, device=like.device).reshape(-1, 1) + torch.arange(n, device=like.device)
        tokens = ((j + 1) * b - self.config.num_sinks).clamp(0, b)
        return torch.where(
            tokens > 0, tokens.clamp_min(1).to(torch.promote_types(like.dtype, torch.float32)).log(), NEVER
        )

    def _join(self, query, context: Context, pattern: Segments, slots, *, scaling, dropout) -> Tensor:
        b, sinks, size, device = pattern.block, self.config.num_sinks, slots[0].shape[2], query.device
        if in_ranges(query, context, pattern, dropout):
            tokens = self._log_counts(0, size, query)
            bias = self.slot_bias[:, None] + tokens.to(query).masked_fill(tokens < 0, float("-inf"))
            return range_decoder(query, context, pattern, slots, bias[None], SlotsBefore(b, 1), scaling=scaling)
        index = torch.arange(size, device=device)
        whole = -(-sinks // b)  # the first segment without a sink; the one before it may hold tokens, too
        ranges = [(whole - 1, whole)] if sinks % b else []

        def far(position: Count) -> list[Part]:
            def part(first: int, last: int, tokens: int) -> Part:
                def mask(begin: int, end: int) -> Tensor:
                    t = column(position) + torch.arange(begin, end, device=device)
                    seen = index[first:last] < (pattern.begin_of(t) // b)[..., None]
                    return seen[None, None] if seen.ndim == 2 else seen[:, None]

                own = (x[:, :, first:last] for x in slots)
                return Part(*own, mask=mask, bias=self.slot_bias + math.log(tokens))

            parts = [part(first, last, b - sinks % b) for first, last in ranges if first < size]
            return parts + ([part(whole, size, b)] if whole < size else [])

        return local_decoder(query, context, pattern, far=far, scaling=scaling, dropout=dropout)


def _accurately(x: Tensor) -> torch.autocast:
    """Without autocast: an inverse makes errors larger."""
    return torch.autocast(x.device.type, enabled=False)


def _solve_rows(q_mean, keys, log_counts, values, read, ridge: float, scaling) -> Tensor:
    """
    Rows of (A + ridge) W = B. q_mean, read (B, H, c, D): their landmarks and B. keys (B, G, s + c, D) and log_counts (1 or B,
    s + c): of all landmarks up to theirs; values (B, H, s, D): W of those before. -> W (B, H, c, D).
    """
    before, c = values.shape[2], read.shape[2]
    logits = _logits(q_mean, keys, scaling) + log_counts[:, None, None]
    later = torch.ones(c, before + c, dtype=torch.bool, device=read.device).triu_(before + 1)
    weights = logits.masked_fill(later, float("-inf")).softmax(-1)
    rest, own = read - weights[..., :before] @ values, weights[..., before:]
    own = own + ridge * torch.eye(c, dtype=own.dtype, device=own.device)
    return torch.linalg.solve_triangular(own, rest, upper=False)


def _logits(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """scaling q k^T of grouped queries (B, H, N, D) and keys (B, G, M, D) -> (B, H, N, M)."""
    groups = key.shape[1]
    logits = query.unflatten(1, (groups, -1)).flatten(2, 3) @ key.mT * scaling
    return logits.view(*query.shape[:3], key.shape[2])


def _per_query_head(x: Tensor, query: Tensor) -> Tensor:
    """(B, G, S, D) -> (B, H, S, D), for the few keys of landmarks."""
    share = query.shape[1] // x.shape[1]
    return x if share == 1 else x.repeat_interleave(share, 1)


def _stretch_means(x: Tensor, m: int, lengths: Tensor | None) -> Tensor:
    """(B, G, N, D) -> (B, G, m, D): token t of n belongs to stretch t m // n; zeros where a stretch has no token."""
    n = x.shape[2]
    if lengths is None and n % m == 0:
        return x.unflatten(2, (m, -1)).mean(3)
    ends = torch.tensor([n], device=x.device) if lengths is None else lengths
    t = torch.arange(n, device=x.device)
    stretch = torch.where(t < ends[:, None], t * m // ends[:, None].clamp_min(1), m)
    belongs = (stretch[:, None] == torch.arange(m, device=x.device)[:, None]).to(x.dtype)
    return (belongs / belongs.sum(2, keepdim=True).clamp_min(1))[:, None] @ x


def _solve_by_iteration(a: Tensor, x: Tensor, iterations: int) -> Tensor:
    """
    Z x for a of entries >= 0, (B, H, m, m), and x (B, H, m, D). Z comes near the pseudo-inverse of a by the paper's iteration
    of order three, Z <- Z (13 - aZ (15 - aZ (7 - aZ))) / 4; its last step is taken on x.
    """
    shape, (a, x) = x.shape, (y.flatten(0, 1) for y in (a, x))
    z = a.mT / (a.sum(-2).amax(-1) * a.sum(-1).amax(-1))[:, None, None]
    for _ in range(iterations - 1):
        az = a @ z
        inner = torch.baddbmm(az, az, az, beta=7, alpha=-1)
        inner = torch.baddbmm(az, az, inner, beta=15, alpha=-1)
        z = torch.baddbmm(z, z, inner, beta=3.25, alpha=-0.25)
    y = 7 * x - a @ (z @ x)
    y = 15 * x - a @ (z @ y)
    y = 13 * x - a @ (z @ y)
    return (z @ y).view(shape) / 4


def _context(buffer: Buffer, pattern: Segments, num_sinks: int) -> Context:
    """What the exact part of a call's queries needs of all tokens."""
    sinks = buffer.key[:, :, :num_sinks], buffer.value[:, :, :num_sinks]
    if not isinstance(buffer.new, int):
        return Context(buffer.key, buffer.value, 0, buffer.new, *sinks)
    first = max(pattern.needed_from(buffer.new), 0)
    if first == 0:
        return Context(buffer.key, buffer.value, 0, buffer.new, *sinks)
    return Context(buffer.key[:, :, first:], buffer.value[:, :, first:], first, buffer.new - first, *sinks)


def _with_past(buffer: Buffer, past: int, n: int) -> Tensor:
    """Values (B, G, past + n, D) of a call's n tokens and those before them, zeros before the first."""
    if isinstance(buffer.new, int) and buffer.new == 0:
        return pad(buffer.value, (0, 0, past, 0))
    source = column(buffer.new) + torch.arange(-past, n, device=buffer.value.device)
    source = source.expand(len(buffer.value), -1)
    held = take(buffer.value, source.clamp(0, buffer.value.shape[2] - 1))
    return held.masked_fill((source < 0)[:, None, :, None], 0)
