# %% [markdown]
# # MXFP4 by hand
#
# DeepSeek-V4's routed experts and its indexer's query and key are held in MXFP4 (report 5.2.1):
# 4-bit elements (E2M1), 32 of which share a scale that is a power of two (E8M0). Everything here
# goes through `v4jax.numerics`, the codec that training uses.

# %%
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from v4jax.analysis import rounding
from v4jax.analysis.toy_switch import Toy, train
from v4jax.numerics import FP8_1X128, MXFP4, NVFP4, fake_quantize, hadamard, pack, quantize

# %% [markdown]
# ## The grid
#
# A sign, two bits of exponent, one of mantissa: sixteen codes, fifteen values. Steps grow with the
# value; below a quarter all is lost.

# %%
codes = np.arange(16, dtype=np.uint8)
print(codes.view(ml_dtypes.float4_e2m1fn).astype(float))
rounding.draw_grid()

# %% [markdown]
# ## A block
#
# The scale is the smallest power of two by which the block's largest value is at most 6:
# 2^ceil(log2(amax / 6)). Nothing saturates; the largest value lands between 3 and 6. Two elements
# go into a byte, the first in the low half, and a scale is its exponent plus 127: 17 bytes for 32
# values, 4.25 bits each.

# %%
x = jnp.asarray(rounding.samples("Gaussian", rows=1, width=32))
q = quantize(x, MXFP4)
p = pack(q)
print("largest ", float(jnp.abs(x).max()), " scale", float(q.scales[0, 0]))
print("x       ", np.round(np.asarray(x[0, :6]), 3))
print("elements", np.asarray(q.values[0, :6]).astype(float))
print("bytes   ", [f"{byte:02x}" for byte in np.asarray(p.codes[0, :3])], "scale", p.scales[0, 0])
print(f"{p.codes.nbytes + p.scales.nbytes} bytes for {x.size} values")

# %% [markdown]
# The same from `ml_dtypes`' casts, which know elements and scales but not blocks.

# %%
amax = np.abs(np.asarray(x)).max()
scale = 2.0 ** np.ceil(np.log2(amax / 6))
elements = (np.asarray(x) / scale).astype(ml_dtypes.float4_e2m1fn)
assert float(q.scales[0, 0]) == scale == 2.0 ** (int(p.scales[0, 0]) - 127)
assert (np.asarray(q.values) == elements).all()
low, high = elements.view(np.uint8)[0, 0::2], elements.view(np.uint8)[0, 1::2]
assert (np.asarray(p.codes)[0] == low | high << 4).all()
assert (np.asarray(fake_quantize(x, MXFP4)) == elements.astype(np.float32) * scale).all()

# %% [markdown]
# ## How much it costs
#
# Signal to noise by distribution: 6 dB are a factor of two in the error's size. A block's largest
# value sets the steps of all the others, so long tails cost. NVFP4 has blocks of 16 with finer
# scales; FP8 is what the rest of the released model uses.

# %%
ways = {
    "MXFP4": (MXFP4, False),
    "MXFP4, rotated": (MXFP4, True),
    "NVFP4": (NVFP4, False),
    "FP8, 1x128": (FP8_1X128, False),
}
rounding.draw_errors(
    {
        kind: {
            way: rounding.signal_to_noise(rounding.samples(kind), fmt, rotate)
            for way, (fmt, rotate) in ways.items()
        }
        for kind in rounding.KINDS
    }
)

# %% [markdown]
# ## Outliers, and the Hadamard rotation
#
# One loud value sets the scale for all 32, and most others become 0. Multiplying by a Hadamard
# matrix first spreads it over all channels. The matrix is orthogonal, so that q.k stays what it was
# when both are rotated: V4 does so with the indexer's query and key, and with nothing else. Data
# without outliers gain nothing; uniform ones lose, as a rotation makes them Gaussian.

# %%
loud = np.asarray(x[0]).copy()
loud[5] = 40
k = jnp.asarray(rounding.samples("Gaussian", rows=1, width=32, seed=1))
assert np.isclose(hadamard(x)[0] @ hadamard(k)[0], x[0] @ k[0], atol=1e-5)
rounding.draw_block(loud)

# %% [markdown]
# ## The switch, on a toy
#
# Rounding has no useful derivative, so the straight-through estimator takes 1 (5.2.1): the forward
# pass uses rounded weights, the gradient goes to the float32 masters as it is.

# %%
w = x[0]
gradient = jax.grad(lambda w: jnp.sum(fake_quantize(w, MXFP4) ** 2))(w)
assert (gradient == 2 * fake_quantize(w, MXFP4)).all()  # not 2 w, and not 0

# %% [markdown]
# A linear map is learned from inputs that are loud in 4 of 64 directions. Half way, one arm goes on
# in float32, the other with its weights in MXFP4; the learning rate falls from there on. PTQ is the
# float32 arm's end, rounded.

# %%
toy = Toy()
control, qat = train(toy, None), train(toy, MXFP4)
rounding.draw_switch(
    {"float32": control.losses, "QAT, MXFP4": qat.losses[toy.switch :]},
    toy.switch,
    {"PTQ": control.rounded_loss},
)

# %% [markdown]
# QAT ends below PTQ: it finds roundings whose errors cancel in the loud directions, where rounding
# to the nearest does not look. It is no law. Where all directions are equally loud, errors cannot
# cancel, and weights that flip between two neighbours only add to them: QAT loses.

# %%
for loudness in (0.0, 1.0, 2.0):
    toy = Toy(loudness=loudness)
    ptq, trained = train(toy, None).rounded_loss, train(toy, MXFP4).rounded_loss
    print(f"loudness {loudness}: PTQ {ptq:.4f}   QAT {trained:.4f}   ratio {trained / ptq:.2f}")

# %% [markdown]
# The experiment `bf16_to_fp4` asks the same of a V4 in training; `compare_runs.py` sweeps this toy.
