"""A model's gradient over four devices that are not here: kernels run on each one's own rows."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh

from kernels_pallas import compiling_for
from tests.collectives import collectives, of_tokens
from tests.kernels_pallas.aot.targets import devices
from tests.training import tiny
from v4jax import parallel
from v4jax.config import CSA
from v4jax.model import Transformer
from v4jax.training.step import Program, split_model

ROWS, LENGTH = 4, 29 * 8  # no axis of a parameter is a multiple of 29
KERNELS = {
    ("v6e", "tpu"): {"index_select": 1, "expert_rows": 4, "expert_weights": 2},
    ("h100", "gpu"): {
        "index_scores": 1,
        "select_topk": 1,
        "expert_matmul_rows": 4,
        "expert_matmul_weights": 2,
    },
}
CALL = r'custom_call_target="(?:tpu_custom_call|__gpu\$xla.gpu.triton)".*op_name="([^"]*)"'


@pytest.mark.parametrize(("target", "platform"), KERNELS)
def test_kernels_on_a_mesh(target, platform):
    """Without `parallel.over_rows` jax refuses a Mosaic kernel: it cannot partition it.

    One layer whose indexer selects and whose experts learn; rows and parameters over 2 x 2.
    """
    cfg = tiny.model(
        layer_types=(CSA,),
        mlp_layer_types=("moe",),
        num_nextn_predict_layers=0,
        sparse_attention="gathered",
        hidden_size=128,
        index_n_heads=8,
        index_head_dim=128,
    )
    four = np.array(devices(target)[:4]).reshape(2, 2)
    mesh = Mesh(four, parallel.AXES, axis_types=(AxisType.Auto,) * 2)
    model = nnx.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    program, state = Program.of(model), split_model(model)

    def loss(params, variables, tokens):
        out = program.bind(params, variables)(tokens, tokens)
        return jnp.sum(out.logits[..., 0]) + out.aux["layers"][0]["index_loss"]

    places = parallel.spread(state, nnx.state(model, nnx.Param), mesh), parallel.rows_sharding(mesh)
    tokens = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
    (params, variables), tokens = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        (state, tokens),
        places,
    )
    with compiling_for(platform), jax.set_mesh(mesh):
        lowered = jax.jit(jax.grad(loss)).lower(params, variables, tokens)
    text = lowered.compile({"xla_gpu_autotune_level": 0} if platform == "gpu" else None).as_text()
    calls = re.findall(CALL, text)
    kernels = KERNELS[target, platform]
    assert {name: sum(name in call for call in calls) for name in kernels} == kernels
    assert all("/shard_map/" in call for call in calls), calls
    found = collectives(text)
    assert {one.kind for one in found} >= {"all-gather"}  # parameters
    assert not of_tokens(found, 29), of_tokens(found, 29)
