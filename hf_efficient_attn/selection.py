"""
Which variant for which layer? `select_variants` finds the mapping that meets a budget, from the user's own text.

One pass over the text, forward and backward, through the dense model: at every layer each candidate reads the layer's own
queries, keys and values. With d_t the change of token t's attention output and g_t the gradient of the mean loss over T
tokens with respect to it, the rise of the loss is predicted as

    rise = T / 2 sum_t (g_t . d_t)^2,

the Gauss-Newton term with the empirical Fisher matrix in place of the Hessian (Theis 2018, arXiv:1801.05787, uses it for
pruning); the first-order term vanishes at a trained model up to noise. Where a text has one loss, as a classifier's, changes
of its tokens meet in it and may cancel: with g_t the gradient of the mean loss over B texts, rise = B / 2 sum_b
(sum_t g_bt . d_bt)^2. Rises of layers add up. Costs are measured: each
candidate alone, at the text's length, on this machine, against exact attention. Then the mappings that are best for some
exchange rate of loss against cost form a curve, of which few are run to see what they really lose.

With `per_head` all of this is done for each key/value head, with the query heads that read it, instead of each layer: the
same pass gives their outputs' changes side by side. A layer whose heads differ becomes `combined`.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from . import measuring
from .config import EfficientAttentionConfig
from .hosts import base_model, find_hosts
from .losses import causal_lm_losses, has_plain_head
from .modes import evaluating
from .ops.exact import exact_attention
from .ops.rows import Texts
from .patching import STRATEGIES, as_key, patched
from .recovery import patched_layers
from .registry import available_variants, build, get_info
from .swapping import Layers, make_config, parse_layers, placing, plan
from .variant import EfficientAttention, HostShape
from .variants.combined import CombinedConfig
from .variants.flash import FlashConfig

COSTS = ("time", "memory", "flops", "state")
DENSE = "dense"
Loss = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Budget:
    """
    What may be lost, or what may be spent. Exactly one of the two is given.

    max_loss: the highest loss of quality, as the relative rise of exp(loss): 0.02 is two per cent of perplexity. The
        cheapest mapping within it is wanted.
    max_cost: the highest cost of attention as a share of dense attention's. The best mapping within it is wanted.
    cost: "time" of a forward pass, its peak "memory", its "flops", or bytes of decoder "state"; of several, such as
        ("flops", "state"), the dearest counts for each candidate, so that a mapping within the budget is so in all of them.
    """

    max_loss: float | None = None
    max_cost: float | None = None
    cost: str | Sequence[str] = "time"

    def __post_init__(self) -> None:
        if not self.costs or set(self.costs) - set(COSTS):
            raise ValueError(f"Budget.cost = {self.cost!r}: choose one or more of {', '.join(COSTS)}.")
        if (self.max_loss is None) == (self.max_cost is None):
            raise ValueError("Budget: give either max_loss (such as 0.02) or max_cost (such as 0.33).")
        given = self.max_loss if self.max_cost is None else self.max_cost
        if not isinstance(given, (int, float)) or not given > 0:
            raise ValueError(f"Budget: {given!r} is no number above 0, such as 0.02 for two per cent.")

    @classmethod
    def of(cls, budget: Budget | Mapping[str, Any] | None) -> Budget:
        """
        The budget, or what its fields as a dict make.

        Raises:
            ValueError: something else.
        """
        if isinstance(budget, Budget):
            return budget
        try:
            return cls(**budget)
        except TypeError as error:
            raise ValueError(f"budget = {budget!r}: give max_loss or max_cost, and cost.") from error

    @property
    def costs(self) -> tuple[str, ...]:
        return (self.cost,) if isinstance(self.cost, str) else tuple(self.cost)


@dataclass(frozen=True)
class Point:
    """
    A mapping with what it costs and loses: `labels` names the candidate of each layer, or of each key/value head, layer by
    layer; `cost` is a share of dense attention's; `predicted` and `measured` are relative rises of exp(loss), `measured`
    None where it was not run.
    """

    labels: tuple[str, ...]
    cost: float
    predicted: float
    measured: float | None = None


@dataclass(frozen=True)
class LayerScore:
    """
    One candidate in one layer, or in one of its key/value heads (`head`, else None): its attention's `error`, the squared
    distance from dense relative to dense's square, and the `rise` of the loss, in nats, that is predicted.
    """

    layer: int
    label: str
    error: float
    rise: float
    head: int | None = None


@dataclass(frozen=True)
class Selection:
    """
    The result. `mapping` is what `patch_model` takes (layers that stay dense are left out, so it may be empty); `chosen` is
    its point; `curve` holds the non-dominated mappings by rising cost, `uniform` each candidate in all layers, measured;
    `scores` every candidate in every layer or head; `costs` each candidate's share of dense attention's cost, by kind of cost,
    without memory on devices that do not tell it, and without state where no layer keeps one.
    """

    mapping: dict[str, EfficientAttentionConfig]
    chosen: Point
    curve: list[Point]
    uniform: list[Point]
    scores: list[LayerScore]
    costs: dict[str, dict[str, float]]
    budget: Budget
    dense_loss: float = math.nan


def default_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """
    The mean loss in nats: the model's own where the batch has `labels`, else that of the next tokens.

    Raises:
        ValueError: no labels, and the model does not predict the next token.
    """
    if "labels" in batch:
        return model(**batch).loss
    inner = base_model(model)
    if not all(host.shape.causal for host in find_hosts(inner)) or inner.get_output_embeddings() is None:
        name = getattr(type(inner), "dense_class", type(inner)).__name__
        raise ValueError(f"{name} does not predict the next token; give batches with `labels`.")
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    if batch.keys() <= {"input_ids", "attention_mask"} and has_plain_head(inner, ids):
        losses, predicted = causal_lm_losses(inner, ids, mask)
        return losses.sum() / predicted.sum()
    labels = ids if mask is None else ids.masked_fill(~mask.bool(), -100)
    return model(**batch, labels=labels, use_cache=False).loss


def select_variants(
    model: nn.Module,
    data: Iterable[Mapping[str, Tensor]],
    *,
    candidates: Sequence[Any],
    budget: Budget | Mapping[str, Any],
    loss: Loss = default_loss,
    loss_of: str | None = None,
    runs: int = 6,
    per_head: bool = False,
    layers: Layers = None,
) -> Selection:
    """
    The mapping of layers to variants that meets the budget, measured on `data`: batches of the model's inputs, of the length
    that counts. The model is the dense one and stays as it is.

    candidates: names, configs, config dicts, (name or label, config) pairs, or a mapping of labels to these; dense is always
    one of them. loss: (model, batch) -> the mean loss in nats. loss_of: what it is the mean over, each "token" or each "text";
    by default "text" where a batch has one label for each of its texts. runs: how many mappings of the curve may be run.
    per_head: choose for each key/value head, not for each layer; a layer whose heads differ becomes `combined`. layers: those
    to choose for, as for `patch_model`; all others stay dense, and costs count none of them.

    Raises:
        ValueError: no data or no candidate, a loss that is not finite, a candidate that cannot serve the model, decoder
            state as the cost of an encoder, or a budget that nothing meets, with the nearest that exists.
    """
    budget, layers = Budget.of(budget), as_key(layers)
    batches = [] if isinstance(data, Mapping) else list(data)
    if not batches:
        raise ValueError("select_variants needs text: `data` must be a list of batches, and has none.")
    if not all(isinstance(batch, Mapping) for batch in batches):
        raise ValueError(
            f"data holds a {type(batches[0]).__name__}: give a list of batches, dicts of tensors such as "
            "dict(tokenizer(texts, return_tensors='pt'))."
        )
    if runs < 1:
        raise ValueError(f"runs = {runs}: at least one mapping must be run.")
    if loss_of not in (None, "token", "text"):
        raise ValueError(f'loss_of = {loss_of!r}: choose "token" or "text".')
    if loss_of is None:
        loss_of = "text" if any("labels" in batch and batch["labels"].dim() == 1 for batch in batches) else "token"
    base = base_model(model)
    hosts = find_hosts(base)
    shapes = [hosts[number].shape for number in parse_layers(layers, len(hosts))]
    table = _labelled(base, candidates, layers, shapes if per_head else [])
    decodes = any(shape.causal for shape in shapes)
    if "state" in budget.costs and not decodes:
        raise ValueError(
            f"{type(base).__name__} keeps no decoder state that could be a cost; leave it out of the budget."
        )
    device = next(model.parameters()).device
    with evaluating(model), torch.random.fork_rng([device] if device.type == "cuda" else []):
        dense_loss, length, scores = _calibrate(model, batches, table, loss, loss_of, per_head, layers)
        if not math.isfinite(dense_loss):
            raise ValueError(
                f"the dense model's loss on this text is {dense_loss}, which nothing can be compared with."
            )
        told = {"memory": device.type in ("cpu", "cuda"), "state": decodes}
        measured = [name for name in COSTS if name in budget.costs or told.get(name, True)]
        costs = {name: _costs(name, table, shapes, length, next(model.parameters())) for name in measured}
        places = list(dict.fromkeys((score.layer, score.head) for score in scores))
        rises = [{s.label: s.rise for s in scores if (s.layer, s.head) == place} for place in places]
        numbers = [layer for layer, _ in places]
        dearest = {label: max(costs[name][label] for name in budget.costs) for label in (DENSE, *table)}
        curve = _curve(rises, dearest)

        def run(point: Point) -> Point:
            mapping = _mapping(point.labels, numbers, table)
            if not mapping:
                return replace(point, measured=0.0)
            with patched(model, mapping):
                return replace(point, measured=_relative(_mean_loss(model, batches, loss) - dense_loss))

        uniform = [run(_point([label] * len(places), rises, dearest)) for label in table]
        chosen, curve = _search(curve, uniform, budget, run, runs)
    return Selection(_mapping(chosen.labels, numbers, table), chosen, curve, uniform, scores, costs, budget, dense_loss)


def choose(
    model: nn.Module, *, data: Any = None, budget: Any = None, candidates: Any = None, **options: Any
) -> dict[str, Any]:
    """
    The mapping behind `patch_model(model, "auto", data=..., budget=...)`; further keywords are those of `select_variants`.
    Without `candidates`: every attention variant that brings no parameters, and so has nothing of its own to train, with its
    defaults.

    Raises:
        ValueError: no data or budget, a keyword that there is not, or what `select_variants` refuses.
    """
    _, *known = inspect.signature(select_variants).parameters
    if unknown := sorted(options.keys() - {*known}):
        raise ValueError(f"'auto' takes no {', '.join(map(repr, unknown))}; it takes {', '.join(known)}.")
    if data is None or budget is None:
        raise ValueError('"auto" chooses by your text and budget: give data=, a list of batches, and budget=.')
    if candidates is None:
        shape = find_hosts(base_model(model))[0].shape
        shape = _one_head(shape) if options.get("per_head") else shape
        candidates = [name for name in available_variants("attention") if _trains_nothing(name, shape)]
    return select_variants(model, data, candidates=candidates, budget=budget, **options).mapping


def _trains_nothing(name: str, shape: HostShape) -> bool:
    info = get_info(name)
    try:
        module = build(info.config_class(), shape)
    except ValueError:  # cannot serve this layer
        return False
    return not list(module.parameters()) and info.family != "exact"


def _one_head(shape: HostShape) -> HostShape:
    """A layer of one key/value head and the query heads that read it."""
    return replace(shape, num_heads=shape.group_size, num_kv_heads=1)


def _labelled(
    model: nn.Module, candidates: Any, layers: Layers, split: Sequence[HostShape]
) -> dict[str, EfficientAttentionConfig]:
    """Label -> config, each of them able to serve these layers, and one key/value head of those in `split`."""
    if isinstance(candidates, str):
        raise ValueError(f"candidates = {candidates!r}: give a list of variants.")
    table: dict[str, EfficientAttentionConfig] = {}
    for candidate in candidates.items() if isinstance(candidates, Mapping) else candidates:
        label, choice = candidate if isinstance(candidate, tuple) else (None, candidate)
        config = make_config(choice)
        label = label or (choice if isinstance(choice, str) else config.name)
        if label in table or label == DENSE:
            raise ValueError(f"two candidates are called {label!r}; give each a label, as in ('small window', config).")
        if get_info(config.name).kind != "attention":
            raise ValueError(f"candidate {label!r} replaces no attention, so it cannot stand in for a layer's.")
        plan(model, {as_key(layers): config})
        for shape in split:
            try:
                build(config, _one_head(shape))
            except ValueError as error:
                raise ValueError(f"candidate {label!r} for a key/value head by itself (per_head): {error}") from error
        table[label] = config
    if not table:
        raise ValueError("select_variants needs at least one candidate beside dense.")
    return table


class _Trial:
    """A forward hook of one exact layer, which tries the candidates on its inputs when the output's gradient arrives."""

    def __init__(
        self, layer: int, modules: dict[str, EfficientAttention], heads: int | None, loss_of: str, weight: float
    ) -> None:
        self.layer, self.modules, self.heads, self.loss_of = layer, modules, heads, loss_of
        self.weight = weight  # of a batch among all
        self.length = 0  # tokens of the longest text
        self.distance = {label: torch.zeros(heads or 1, dtype=torch.float64) for label in modules}
        self.rise = {label: torch.zeros(heads or 1, dtype=torch.float64) for label in modules}
        self.square = torch.zeros(heads or 1, dtype=torch.float64)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        if not torch.is_grad_enabled():  # not the pass that counts
            return output
        kept = tuple(x.detach() for x in args)
        exact = output.detach()
        kwargs = {name: kwargs[name] for name in ("padding", "scaling", "causal", "hidden") if name in kwargs}
        rows = kwargs["padding"]
        tokens = exact.shape[0] * exact.shape[2] if rows is None or rows.real is None else int(rows.real.sum())
        self.length = max(self.length, rows.longest if isinstance(rows, Texts) else exact.shape[2])
        self.square += self._summed(exact.float().square())
        output = output if output.requires_grad else output.requires_grad_(True)
        output.register_hook(lambda gradient: self._try(gradient, kept, kwargs, exact, tokens))
        return output

    @torch.no_grad()
    def _try(self, gradient: Tensor, args: tuple, kwargs: dict[str, Any], exact: Tensor, tokens: int) -> None:
        for label, variant in self.modules.items():
            change = (variant(*args, **kwargs) - exact).float()
            self.distance[label] += self._summed(change.square())
            along = (gradient.float() * change).unflatten(1, (self.heads or 1, -1)).sum((2, 4))  # (B, heads, N)
            along, losses = (along, tokens) if self.loss_of == "token" else (along.sum(2), len(along))
            self.rise[label] += self.weight * losses / 2 * self._summed(along.square())

    def _summed(self, x: Tensor) -> Tensor:
        """x (B, H, ...) -> its sums over all but the key/value heads that are told apart, on the CPU."""
        return x.unflatten(1, (self.heads or 1, -1)).transpose(0, 1).flatten(1).sum(1).cpu().double()

    def scores(self) -> list[LayerScore]:
        """What is not a number counts as infinitely bad."""
        rises = {label: rise.nan_to_num(math.inf, math.inf).tolist() for label, rise in self.rise.items()}
        return [
            LayerScore(self.layer, label, error.item(), rises[label][i], None if self.heads is None else i)
            for label in self.modules
            for i, error in enumerate(self.distance[label] / self.square.clamp_min(1e-30))
        ]


@torch.enable_grad()
def _calibrate(
    model, batches, table, loss, loss_of: str = "token", per_head: bool = False, layers: Layers = None
) -> tuple[float, int, list[LayerScore]]:
    """The dense loss, the longest text, and every candidate's score in every layer or head, from one forward and backward."""
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    total, trials, handles = 0.0, [], []
    with patched(model, "flash", layers=layers):
        try:
            for parameter in wanted:
                parameter.requires_grad_(False)
            for number, name, exact in patched_layers(model):
                place = placing(list(base_model(model).get_submodule(name).parameters()), base_model(model))
                modules = {label: build(config, exact.host).to(**place).eval() for label, config in table.items()}
                exact.needs_hidden = any(module.needs_hidden for module in modules.values())
                heads = exact.host.num_kv_heads if per_head else None
                trials.append(_Trial(number, modules, heads, loss_of, 1 / len(batches)))
                handles.append(exact.register_forward_hook(trials[-1], with_kwargs=True))
            for batch in batches:
                value = loss(model, batch)
                value.backward()
                total += float(value.detach()) / len(batches)
        finally:
            for handle in handles:
                handle.remove()
            for parameter, requires in wanted.items():
                parameter.requires_grad_(requires)
    return total, max(trial.length for trial in trials), [score for trial in trials for score in trial.scores()]


@torch.no_grad()
def _mean_loss(model: nn.Module, batches: Sequence[Mapping[str, Tensor]], loss: Loss) -> float:
    return sum(float(loss(model, batch)) for batch in batches) / len(batches)


def _relative(rise: float) -> float:
    """The relative rise of exp(loss) from the loss's rise in nats; what is not finite counts as infinitely bad."""
    return math.expm1(min(rise, 700.0)) if math.isfinite(rise) else math.inf


def _costs(kind: str, table, shapes: Sequence[HostShape], length: int, like: Tensor) -> dict[str, float]:
    """
    Each candidate's cost as a share of exact attention's, for one text of `length` tokens of the dtype and device of `like`;
    the mean over the layers. Dense is 1.
    """
    alike = [replace(shape, layer=0, patched_index=number % 2) for number, shape in enumerate(shapes)]
    if kind == "state":  # which encoder layers do not keep
        alike = [shape for shape in alike if shape.causal]
    costs = dict.fromkeys((DENSE, *table), 1.0)
    for label, config in table.items():
        own = alike if config.alternates else [replace(shape, patched_index=0) for shape in alike]
        found = {shape: _cost(kind, config, shape, length, like) for shape in dict.fromkeys(own)}
        costs[label] = sum(found[shape] for shape in own) / len(own)
    return costs


def _cost(kind: str, config, shape: HostShape, length: int, like: Tensor) -> float:
    placed = {"dtype": like.dtype, "device": like.device}
    heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
    query, key, value = (torch.randn(1, n, length, shape.head_dim, **placed) for n in heads)
    options = {"scaling": shape.head_dim**-0.5, "causal": shape.causal}
    module = build(config, shape).to(**placed).eval()
    extra = {"hidden": torch.randn(1, length, shape.hidden_size, **placed)} if module.needs_hidden else {}

    @torch.no_grad()
    def dense() -> None:
        exact_attention(query, key, value, lengths=None, **options)

    @torch.no_grad()
    def ours() -> None:
        module(query, key, value, **options, **extra)

    if kind == "time":
        return measuring.time_ratio(ours, dense, device=like.device).ratio
    if kind == "memory":
        return measuring.peak_memory(ours, like.device) / measuring.peak_memory(dense, like.device)
    if kind == "flops":
        return measuring.count_flops(ours) / measuring.count_flops(dense)
    return measuring.state_bytes(module, length, like) / (key.nbytes + value.nbytes)


def _point(labels: Sequence[str], rises: Sequence[Mapping[str, float]], costs: Mapping[str, float]) -> Point:
    """`rises` holds for each layer or head what each candidate's rise would be."""
    rise = sum(there.get(label, 0.0) for label, there in zip(labels, rises, strict=True))
    return Point(tuple(labels), math.fsum(costs[label] for label in labels) / len(labels), _relative(rise))


def _curve(rises: Sequence[Mapping[str, float]], costs: Mapping[str, float]) -> list[Point]:
    """
    The lower convex hull of (cost, predicted rise): every mapping that is best for some exchange rate, by rising cost. From
    each place's cheapest candidate on, the steps along the places' own hulls are taken in order of rise saved per cost.
    """
    steps, start = [], []
    for place, there in enumerate(rises):
        options = [(costs[label], rise, label) for label, rise in there.items() if math.isfinite(rise)]
        options.append((costs[DENSE], 0.0, DENSE))
        hull: list[tuple[float, float, str]] = []
        for cost, rise, label in sorted(options, key=lambda x: (*x[:2], x[2] != DENSE)):  # dense where nothing is saved
            if hull and rise >= hull[-1][1]:
                continue
            while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], (cost, rise, label)):
                hull.pop()
            hull.append((cost, rise, label))
        start.append(hull[0][2])
        steps += [(_slope(a, b), place, b[2]) for a, b in itertools.pairwise(hull)]
    chosen = list(start)
    curve = [_point(chosen, rises, costs)]
    for _, place, label in sorted(steps, key=lambda step: -step[0]):
        chosen[place] = label
        curve.append(_point(chosen, rises, costs))
    return curve


def _slope(cheap: tuple, dear: tuple) -> float:
    """Rise saved per cost spent."""
    return (cheap[1] - dear[1]) / max(dear[0] - cheap[0], 1e-12)


def _search(curve, uniform, budget: Budget, run: Callable[[Point], Point], runs: int) -> tuple[Point, list[Point]]:
    """The best point within the budget among those that are run, and the curve with what was measured of it."""
    curve = list(curve)
    if budget.max_cost is not None:
        limit = budget.max_cost * (1 + 1e-9)  # costs are sums of shares
        within = [i for i, point in enumerate(curve) if point.cost <= limit]
        for i in within[-runs:]:
            curve[i] = run(curve[i])
        found = [curve[i] for i in within if curve[i].measured is not None]
        found += [point for point in uniform if point.cost <= limit]
        if not found:
            nearest = min([*curve, *uniform], key=lambda point: point.cost)
            raise ValueError(
                f"no candidate costs at most {budget.max_cost:g} of dense attention's {' and '.join(budget.costs)}; "
                f"the cheapest mapping, {_words(nearest)}, costs {nearest.cost:.3g}. Give cheaper candidates or a higher "
                "max_cost."
            )
        return min(found, key=lambda point: point.measured), curve
    low, high = 0, len(curve) - 1  # the last point loses least; find the first that meets the budget
    while low < high and runs > 0:
        middle, runs = (low + high) // 2, runs - 1
        curve[middle] = run(curve[middle])
        low, high = (low, middle) if curve[middle].measured <= budget.max_loss else (middle + 1, high)
    if curve[high].measured is None:
        curve[high] = run(curve[high])
    found = [p for p in [*curve, *uniform] if p.measured is not None and p.measured <= budget.max_loss]
    if not found:
        nearest = min((p for p in [*curve, *uniform] if p.measured is not None), key=lambda point: point.measured)
        raise ValueError(
            f"no mapping loses at most {budget.max_loss:.3g}; the nearest, {_words(nearest)}, loses {nearest.measured:.3g}. "
            "Give better candidates or a higher max_loss."
        )
    return min(found, key=lambda point: (point.cost, point.measured)), curve


def _words(point: Point) -> str:
    counts = {label: point.labels.count(label) for label in dict.fromkeys(point.labels)}
    return ", ".join(f"{label} in {count} of {len(point.labels)}" for label, count in counts.items())


def _mapping(
    labels: Sequence[str], layers: Sequence[int], table: Mapping[str, EfficientAttentionConfig]
) -> dict[str, EfficientAttentionConfig]:
    """Layers -> config from the label at each place and the layer it belongs to; dense layers are left out."""
    numbers: dict[tuple[str, ...], list[str]] = {}
    for layer in dict.fromkeys(layers):
        heads = tuple(label for label, place in zip(labels, layers, strict=True) if place == layer)
        if set(heads) != {DENSE}:
            numbers.setdefault(heads, []).append(str(layer))
    return {",".join(chosen): _config(heads, table) for heads, chosen in numbers.items()}


def _config(heads: Sequence[str], table: Mapping[str, EfficientAttentionConfig]) -> EfficientAttentionConfig:
    """The variant of a layer from the labels of its key/value heads, in their order."""
    if len(set(heads)) == 1:
        return table[heads[0]]
    runs = [(label, len(list(same))) for label, same in itertools.groupby(heads)]
    return CombinedConfig(parts=[[table.get(label, FlashConfig()), share] for label, share in runs])


STRATEGIES["auto"] = choose
