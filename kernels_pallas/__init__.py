"""Operations where FP4 pays. One public function each; knows `v4jax.numerics`, not models."""

from kernels_pallas.expert_matmul import expert_matmul

__all__ = ["expert_matmul"]
