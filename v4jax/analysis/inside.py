"""What a model does inside: index selections, router loads, hyper-connection maps.

`look_inside` runs one forward pass; the figures are of what it returns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np
from flax import nnx

from kernels_pallas import select_topk
from v4jax.analysis.figures import SHADES, Drawing, styled
from v4jax.config import CSA
from v4jax.layers import indexer
from v4jax.layers.context import make_context
from v4jax.model import Transformer
from v4jax.style import BLUE, FAINT, GREY, MARKERS

KINDS = {"sliding_attention": "sliding", "compressed_sparse_attention": "CSA",
         "heavily_compressed_attention": "HCA"}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Maps:
    """A hyper-connection's maps of the first row's T tokens, as the report names them (2.2).

    A [T, M]: how much of each stream the layer reads. B [T, M, M]: to stream k, from stream j, of
    the streams. C [T, M]: how much of the layer's output each stream gets.
    """

    A: np.ndarray
    B: np.ndarray
    C: np.ndarray

    @property
    def unevenness(self) -> tuple[float, float]:
        """The most by which a sum of B's rows, and of its columns, differs from 1 at any token.

        Sinkhorn's iterations end with the rows: they are exact but for hc_eps.
        """
        rows, columns = (float(np.abs(self.B.sum(axis=axis) - 1).max()) for axis in (2, 1))
        return rows, columns


@dataclasses.dataclass(frozen=True)
class Selection:
    """What the indexer of a CSA layer makes of the first row's T tokens and C entries.

    scores: float32 [T, C], -inf where an entry is not visible. chosen: bool [T, C]. rate: tokens
    that an entry stands for.
    """

    scores: np.ndarray
    chosen: np.ndarray
    rate: int

    @property
    def visible(self) -> np.ndarray:
        """bool [T, C]."""
        return self.scores > -np.inf

    @property
    def shares(self) -> np.ndarray:
        """softmax of the scores over the visible entries [T, C]; 0 where there are none."""
        highest = np.max(self.scores, axis=1, keepdims=True, initial=-1e30)
        grown = np.exp(self.scores - highest)
        return grown / np.maximum(grown.sum(axis=1, keepdims=True), 1e-30)


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer. attention, mlp: its kinds. load: tokens of all rows that each expert got [E]."""

    number: int
    attention: str
    mlp: str
    load: np.ndarray
    attention_maps: Maps
    expert_maps: Maps
    selection: Selection | None

    @property
    def name(self) -> str:
        return f"layer {self.number}, {KINDS[self.attention]}"


def walk(model: Transformer, tokens: jax.Array):
    """The model's forward pass with what it keeps for analysis, and each CSA layer's selection.

    tokens int32 [B, T]. Returns the M streams [B, T, D] after the last layer, and for each layer
    (load, maps of the attention's hyper-connection, those of the experts', None or (scores,
    chosen)).
    """
    ctx = make_context(model.config, tokens, index_formats=model.index_formats)
    kept, found = model(tokens, collect=True).aux["layers"], []
    for layer in kept:
        selection = None
        if "index" in layer:
            scores = indexer.scores(layer["index"]["operands"], ctx)
            selection = scores, select_topk(scores, model.config.index_topk, output="mask")
        found.append((layer["expert_load"], *layer["maps"], selection))
    return kept[-1]["streams"], found


def look_inside(model: Transformer, tokens) -> list[Layer]:
    """Runs `tokens` int32 [B, T], rows without padding, and returns what each layer did."""
    cfg = model.config
    _, found = nnx.jit(walk)(model, jax.numpy.asarray(tokens))
    rate = cfg.compress_rates.compressed_sparse_attention
    layers = []
    for number, (kinds, of_layer) in enumerate(zip(cfg.layers, found, strict=True)):
        load, attention_maps, expert_maps, chosen = jax.tree.map(np.asarray, of_layer)
        selection = chosen and Selection(chosen[0][0], chosen[1][0], rate)
        maps = _first_row(*attention_maps), _first_row(*expert_maps)
        layers.append(Layer(number, *kinds, load, *maps, selection))
    return layers


def _first_row(a: np.ndarray, post: np.ndarray, comb: np.ndarray) -> Maps:
    """The report's B is comb transposed: comb's first index is the stream that is read."""
    return Maps(a[:, 0].T, comb[:, :, 0].transpose(2, 1, 0), post[:, 0].T)


def selected_text(
    layer: Layer, token: int, tokens: Sequence[int], decode: Callable[[Sequence[int]], str]
) -> list[tuple[int, float, str]]:
    """(first token, share, text) of each entry that `token` selects, the best first.

    tokens: the first row. The text is that of the entry's own window, not of the overlap.
    """
    assert layer.selection is not None, f"{layer.name} selects nothing"
    shares, rate = layer.selection.shares[token], layer.selection.rate
    chosen = sorted(np.flatnonzero(layer.selection.chosen[token]), key=lambda c: -shares[c])
    return [
        (c * rate, float(shares[c]), decode(tokens[c * rate : (c + 1) * rate]))
        for c in map(int, chosen)
    ]


# ---- the figures ----


@styled
def draw_selections(layers: Sequence[Layer]) -> Drawing:
    """Each CSA layer's selections, query by entry, and from how far back they come."""
    selecting = [layer for layer in layers if layer.attention == CSA and layer.selection]
    count = max(1, len(selecting))
    figure = Drawing(6.6, 2.75 * count)
    for row, layer in enumerate(selecting):
        selection = layer.selection
        assert selection is not None
        axes = figure.add_subplot(count, 2, 2 * row + 1)
        _selection_map(figure, axes, selection)
        axes.set_title(f"({'abcdefgh'[2 * row % 8]}) {layer.name}: selected")
        axes = figure.add_subplot(count, 2, 2 * row + 2)
        _distances(axes, selection)
        axes.set_title(f"({'abcdefgh'[(2 * row + 1) % 8]}) how far back")
    return figure


def _selection_map(figure, axes, selection: Selection) -> None:
    """White: not visible. Grey: visible, not selected. Colour: the selected entries' share."""
    seen, chosen = selection.visible, selection.chosen
    extent = (-0.5, seen.shape[1] - 0.5, seen.shape[0] - 0.5, -0.5)
    options = {"aspect": "auto", "interpolation": "nearest", "extent": extent}
    grey = np.where(seen & ~chosen, 1.0, np.nan)
    axes.imshow(grey, cmap=_one_colour(FAINT), vmin=0, vmax=1, **options)
    shares = np.where(chosen, selection.shares, np.nan)
    # A query that sees few entries gives each a large share: the scale is of the others.
    choosing = shares[seen.sum(axis=1) > 2 * chosen.sum(axis=1)]
    top = float(np.nanquantile(choosing, 0.99)) if np.isfinite(choosing).any() else 1.0
    # From a visible blue on: the palest shades are grey's.
    image = axes.imshow(shares, cmap=SHADES, vmin=-0.25 * top, vmax=top, **options)
    bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=28, extend="max")
    bar.ax.set_ylim(0, top)
    bar.set_label("share of the index softmax", fontsize=8)
    axes.set_xlabel(f"entry, of {selection.rate} tokens each")
    axes.set_ylabel("query token")


def _one_colour(color: str):
    from matplotlib.colors import ListedColormap

    return ListedColormap([color])


def _distances(axes, selection: Selection) -> None:
    """Distances of selected and of all visible entries, where there are more than k of these."""
    seen, chosen, rate = selection.visible, selection.chosen, selection.rate
    queries, entries = seen.shape
    back = np.arange(queries)[:, None] - (np.arange(entries) * rate + rate - 1)
    counted = (seen.sum(axis=1) > chosen.sum(axis=1))[:, None] & seen
    if not counted.any():
        axes.annotate("no query has to choose", (0.5, 0.5), xycoords="axes fraction", ha="center")
        return
    edges = np.linspace(0, back[counted].max() + 1, 13)
    middle = (edges[1:] + edges[:-1]) / 2
    for mask, label, color, dash, marker in (
        (counted, "all visible", GREY, "--", MARKERS[1]),
        (counted & chosen, "selected", BLUE, "-", MARKERS[0]),
    ):
        share = np.histogram(back[mask], edges)[0] / mask.sum()
        axes.plot(middle, 100 * share, dash, color=color, marker=marker, markersize=4, label=label)
    axes.set_xlabel("tokens between query and entry")
    axes.set_ylabel("% of entries")
    axes.set_ylim(0)
    axes.legend()


@styled
def draw_loads(layers: Sequence[Layer]) -> Drawing:
    """Tokens that each expert got, as a multiple of an even share: a panel a layer."""
    columns = min(4, len(layers))
    rows = -(-len(layers) // columns)
    figure = Drawing(6.6, 0.45 + 1.65 * rows)
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    highest = max((layer.load / layer.load.mean()).max() for layer in layers)
    for axes, layer in zip(panels.flat, layers, strict=False):
        hashed = layer.mlp == "hash_moe"
        load = layer.load / layer.load.mean()
        color = GREY if hashed else BLUE
        axes.bar(range(len(load)), load, 0.75, color="white" if hashed else color,
                 edgecolor=color, hatch="////" if hashed else None, linewidth=0.8)  # fmt: skip
        axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
        axes.set_title(f"layer {layer.number}, {'hashed' if hashed else 'learned'}")
        axes.annotate(f"most {load.max():.2f}", (0.97, 0.97), xycoords="axes fraction",
                      ha="right", va="top", fontsize=8)  # fmt: skip
        axes.set_xlabel("expert")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylim(0, 1.25 * highest)
    for axes in panels.flat[len(layers) :]:
        axes.set_visible(False)
    for axes in panels[:, 0]:
        axes.set_ylabel("load / even share")
    return figure


@styled
def draw_hyper_connections(layers: Sequence[Layer]) -> Drawing:
    """Means over tokens of A, B and C, both sublayers of each layer; a row a layer."""
    figure = Drawing(6.6, 0.75 + 1.3 * len(layers))
    streams = layers[0].attention_maps.A.shape[1]
    widths = (1.6, streams, 1.6, 0.9, 1.6, streams, 1.6)
    grid = figure.add_gridspec(len(layers), 7, width_ratios=widths)
    for row, layer in enumerate(layers):
        for start, maps in ((0, layer.attention_maps), (4, layer.expert_maps)):
            means = maps.A.mean(0)[:, None], maps.B.mean(0), maps.C.mean(0)[:, None]
            for column, (name, values) in enumerate(zip("ABC", means, strict=True)):
                axes = figure.add_subplot(grid[row, start + column])
                _numbers(axes, values, top=2 if name == "C" else 1)
                if row == 0:
                    title = {"A": "A, read", "B": "B, mix", "C": "C, write"}[name]
                    axes.set_title(title, loc="center", fontsize=8.5)
                if name == "B" and row == len(layers) - 1:
                    axes.set_xlabel("from stream", fontsize=8)
                if name == "B":
                    axes.set_ylabel("to stream", fontsize=8)
                if (start, column) == (0, 0):
                    axes.set_ylabel(f"{layer.name}\nstream", fontsize=8)
    both = [m.unevenness for x in layers for m in (x.attention_maps, x.expert_maps)]
    rows, columns = (max(values) for values in zip(*both, strict=True))
    figure.suptitle("before attention (left) and before the experts (right)", fontsize=9.5,
                    fontweight="bold")  # fmt: skip
    figure.supxlabel(
        f"Means over {len(layers[0].attention_maps.A)} tokens. Of every token's B, rows sum to 1 "
        f"within {rows:.0e}, columns within {columns:.0e}.", fontsize=7.5, color=GREY,
    )  # fmt: skip
    return figure


def _numbers(axes, values: np.ndarray, top: float) -> None:
    """A matrix as shades with its numbers; 0 is white, `top` the darkest."""
    axes.imshow(values, cmap=SHADES, vmin=0, vmax=1.35 * top, aspect="auto")
    for (k, j), value in np.ndenumerate(values):
        axes.text(j, k, f"{value:.2f}", ha="center", va="center", fontsize=6.5,
                  color="white" if value > 0.6 * top else "black")  # fmt: skip
    rows, columns = values.shape
    axes.set_xticks(range(columns) if columns > 1 else [])
    axes.set_yticks(range(rows))
    axes.tick_params(length=0, labelsize=7)
    axes.spines[:].set_visible(False)
