# %% [markdown]
# # Look inside a V4
#
# What a trained model does at each of the three places that set DeepSeek-V4 apart from a plain
# transformer: the lightning indexer (report 2.3.1), expert routing (2.1) and hyper-connections
# (2.2). About a minute on two CPU cores, most of it compiling.

# %%
import asyncio
import dataclasses
import pathlib

from v4jax import presets
from v4jax.analysis import inside
from v4jax.config import CSA, HCA, CompressRates
from v4jax.training import command
from v4jax.training.corpus import load_corpus, split
from v4jax.training.data import Dataset
from v4jax.training.optimizer import OptimizerConfig
from v4jax.training.run import RunConfig, Trainer, load_run, train
from v4jax.training.schedule import ScheduleConfig
from v4jax.training.step import Objective
from v4jax.training.tokenizer import get_tokenizer

command.cache_compilations()  # the second time, nothing compiles
RUN = pathlib.Path("../../runs/demo/control")  # any run's folder; if there is none, one is trained

# %% [markdown]
# ## A model
#
# `make demo` leaves runs to look at. Without one, this trains the smallest V4 that has all the
# parts: a CSA layer whose router is a fixed hash of the token, an HCA and a CSA layer whose routers
# learn. Its text is Python's own `asyncio`. A few dozen steps are enough to leave the random start;
# for structure worth a claim, take the demo's.

# %%
corpus = load_corpus(str(pathlib.Path(asyncio.__file__).parent))
training, held_out = split(corpus, held_out=0.2)


def small_run(folder: pathlib.Path, steps: int = 40) -> None:
    tokenizer = get_tokenizer("bpe", training, 512, folder / "cache")
    data = Dataset.build(training.documents, tokenizer)
    model = dataclasses.replace(
        presets.nano(tokenizer.vocab_size),
        hidden_size=64,
        layer_types=(CSA, HCA, CSA),
        mlp_layer_types=("hash_moe", "moe", "moe"),
        compress_rates=CompressRates(4, 16),
        sliding_window=16,
        index_topk=8,
        num_nextn_predict_layers=0,
    )
    config = RunConfig(
        model=model,
        schedule=ScheduleConfig(total_steps=steps, dense_until=0.25),
        optimizer=OptimizerConfig(learning_rate=4e-3, ns_dtype="float32"),
        objective=Objective(bias_speed=0.02),
        sequence_length=128,
        batch_size=4,
        seed=0,
        data=data.hash,
    )
    trainer = Trainer(config, data.batches(128, 4, 0), data.token_counts(), tokenizer)
    train(trainer, folder, stop=steps)


if not RUN.exists():
    RUN = pathlib.Path("small_run")
    small_run(RUN)
run = load_run(RUN)
print(f"{RUN}: step {run.step}, loss {run.metrics[0]['loss']:.2f} -> {run.metrics[-1]['loss']:.2f}")

# %% [markdown]
# One forward pass over held-out text, keeping what it computes on the way.

# %%
length = run.config.sequence_length
text = max((text for _, text in held_out.documents), key=len)
ids = run.tokenizer.encode(text)[2 * length :]  # not the imports
rows = min(8, len(ids) // length)
tokens = ids[: rows * length].reshape(rows, length)
layers = inside.look_inside(run.model, tokens)

# %% [markdown]
# ## What the indexer selects
#
# A CSA layer compresses the past into entries of four tokens, and each query attends to the
# `index_topk` entries that its indexer scores highest (2.3.1, eqs. 13-17). Below, a row is a query.
# White is not visible yet: an entry is there from the token that closes it. Grey was visible and
# left out. As long as no more than k are visible, all are taken; only below that does the indexer
# choose. Columns that stay blue are entries which many queries want. On the right, how far back the
# choice reaches: where the lines coincide, distance plays no part in it.

# %%
inside.draw_selections(layers)

# %% [markdown]
# The entries that one token chose, the best first. The share is of the softmax over its index
# scores, which the indexer's loss pulls towards the attention that its layer pays.

# %%
selecting = [layer for layer in layers if layer.selection is not None]
query = length - 1
print("query:", repr(run.tokenizer.decode(tokens[0, query - 8 : query + 1])))
for first, share, text in inside.selected_text(
    selecting[-1], query, list(tokens[0]), run.tokenizer.decode
):
    print(f"{query - first:4} tokens back  {share:.3f}  {text!r}")

# %% [markdown]
# ## Where tokens go
#
# Load of each expert as a multiple of an even share (2.1). A hash layer sends a token id to fixed
# experts, dealt so that the *training* text's counts come out even: on other text they do not
# quite. A learned router is kept even by a selection bias that moves against the load after each
# step, outside the gradient; on a few hundred tokens of one document it is less even than on a
# batch.

# %%
inside.draw_loads(layers)

# %% [markdown]
# ## How streams mix
#
# The residual is four streams. Before a sublayer, A reads its input from them; after it, B mixes
# the streams and C adds the output to each (2.2, eqs. 1-8):
#
#     x = sum_j A_j X_j        X_k <- sum_j B_kj X_j + C_k F(x)
#
# B is doubly stochastic: all entries positive, rows and columns sum to 1, so that mixing neither
# grows nor loses what the streams hold. Twenty Sinkhorn iterations make it so; they end with the
# rows, and columns are as close as the iterations got. After a few dozen steps all three are still
# near their start; in the demo's run, sublayers read one stream and write to another.

# %%
inside.draw_hyper_connections(layers)
