"""Operations where FP4 pays. One public function each; knows `v4jax.numerics`, not models."""

from kernels_pallas.dispatch import compiling_for
from kernels_pallas.expert_matmul import expert_matmul
from kernels_pallas.index_scores import index_scores
from kernels_pallas.index_select import index_select
from kernels_pallas.select_topk import select_topk
from kernels_pallas.visibility import visible_range

__all__ = [
    "compiling_for",
    "expert_matmul",
    "index_scores",
    "index_select",
    "select_topk",
    "visible_range",
]
