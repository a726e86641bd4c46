"""A look inside a model shows what the model does, and names its axes rightly."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from v4jax import presets
from v4jax.analysis import inside
from v4jax.analysis.figures import Drawing
from v4jax.config import CSA, HCA
from v4jax.model import Transformer

pytestmark = pytest.mark.slow
TINY = dataclasses.replace(
    presets.shallow(presets.nano(64)),
    hidden_size=32,
    layer_types=(CSA, HCA, CSA, HCA),
    mlp_layer_types=("hash_moe", "moe", "moe", "moe"),
    scan_layers=True,
    num_nextn_predict_layers=0,
    index_topk=3,
)


@pytest.fixture(scope="module")
def looked():
    """A model with every parameter away from its start; tokens; the layers; the model's own aux."""
    model = Transformer(TINY, rngs=nnx.Rngs(0))
    state = nnx.state(model, nnx.Param)
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    nnx.update(model, jax.tree.unflatten(tree, moved))
    tokens = jax.random.randint(jax.random.key(2), (2, 32), 0, 64)
    out = nnx.jit(lambda m, t: m(t, collect=True))(model, tokens)
    return model, tokens, inside.look_inside(model, tokens), out.aux["layers"]


def test_the_walk_is_the_models_own_forward_pass(looked):
    model, tokens, layers, aux = looked
    streams, _ = nnx.jit(inside.walk)(model, tokens)
    np.testing.assert_allclose(streams, aux[-1]["streams"], rtol=1e-5, atol=1e-6)
    assert [layer.attention for layer in layers] == list(TINY.layer_types)
    for layer, expected in zip(layers, aux, strict=True):
        np.testing.assert_array_equal(layer.load, expected["expert_load"])


def test_maps_carry_the_streams_as_the_report_says(looked):
    """X_k <- sum_j B_kj X_j + C_k y, with y the same for all k: so differences between the streams
    after the experts, less those of the mixed ones, are all along one y."""
    _, _, layers, aux = looked
    for number in (1, 2):
        first = layers[number]
        for rows, columns in (first.attention_maps.unevenness, first.expert_maps.unevenness):
            assert rows < 1e-5 and columns < 0.2
        before = np.stack([np.asarray(x[0]) for x in aux[number - 1]["streams"]])
        after = np.stack([np.asarray(x[0]) for x in aux[number]["streams"]])
        # Two sublayers: after = B2 (B1 X + C1 y1) + C2 y2, of rank 2 beside B2 B1 X.
        a, b = first.attention_maps, first.expert_maps
        mixed = np.einsum("tkj,tji,itd->tkd", b.B, a.B, before)
        rest = np.moveaxis(after, 0, 1) - mixed
        spans = np.stack([np.einsum("tkj,tj->tk", b.B, a.C), b.C], axis=-1)
        for token in range(0, 32, 5):
            basis, _ = np.linalg.qr(spans[token])
            left = rest[token] - basis @ (basis.T @ rest[token])
            assert np.abs(left).max() < 1e-4 * np.abs(rest[token]).max()


def test_selections_are_causal_and_of_the_best(looked):
    _, _, layers, _ = looked
    for layer in (layers[0], layers[2]):
        selection = layer.selection
        for token in range(32):
            seen = np.flatnonzero(selection.visible[token])
            assert list(seen) == list(range((token + 1) // 4))
            chosen = np.flatnonzero(selection.chosen[token])
            best = sorted(seen, key=lambda c: -selection.scores[token, c])[:3]
            assert set(chosen) == set(best)
            assert selection.shares[token].sum() == pytest.approx(min(1, len(seen)), abs=1e-5)
    assert layers[1].selection is None
    found = inside.selected_text(layers[0], 31, range(32), lambda ids: ",".join(map(str, ids)))
    assert len(found) == 3 and found[0][1] >= found[1][1] >= found[2][1]
    assert all(text.startswith(f"{first},") for first, _, text in found)


def test_the_figures_are_of_all_layers_and_show_themselves(looked):
    _, _, layers, _ = looked
    for draw, panels in (
        (inside.draw_selections, 2 * 2 + 2),  # a map, its scale and distances, for each CSA layer
        (inside.draw_loads, 4),
        (inside.draw_hyper_connections, 4 * 6),
    ):
        figure = draw(layers)
        assert isinstance(figure, Drawing) and len(figure.axes) == panels
    png, size = figure._repr_png_()
    assert png.startswith(b"\x89PNG") and size["width"] == 660
