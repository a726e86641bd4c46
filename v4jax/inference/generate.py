"""Sampling text, without a cache: one fixed window, refilled for each token."""

import jax
import jax.numpy as jnp
import numpy as np

from v4jax.model import Transformer


def generate(
    model: Transformer,
    prompt: np.ndarray,
    max_tokens: int,
    *,
    length: int,
    temperature: float = 0.0,
    seed: int = 0,
    forbid: tuple[int, ...] = (),
) -> np.ndarray:
    """Continues `prompt` int32 [n] by max_tokens ids; int32 [max_tokens].

    length: tokens of context that the model sees at a time; when they are full, the older half
    is dropped. temperature 0 takes the likeliest token. forbid: ids that are never produced.
    Raises ValueError for an empty prompt or a length below 2.
    """
    if length < 2:
        raise ValueError(f"generate: length is {length}, allowed: 2 or more")
    if not len(prompt):
        raise ValueError("generate: the prompt is empty; give at least one token")
    banned = np.zeros(model.config.vocab_size, np.float32)
    banned[list(forbid)] = -np.inf

    @jax.jit
    def draw(model, tokens, last, key):
        logits = model(tokens[None]).logits[0, last] + banned
        if temperature == 0:
            return jnp.argmax(logits)
        return jax.random.categorical(key, logits / temperature)

    context = list(prompt[-length:])
    key, produced = jax.random.key(seed), []
    for i in range(max_tokens):
        if len(context) == length:
            context = context[length // 2 :]
        tokens = np.zeros(length, np.int32)  # what follows `last` is not seen: attention is causal
        tokens[: len(context)] = context
        token = int(draw(model, tokens, len(context) - 1, jax.random.fold_in(key, i)))
        context.append(token)
        produced.append(token)
    return np.array(produced, np.int32)
