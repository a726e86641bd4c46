"""DeepSeek-V4's forward pass in plain numpy float64: the independent reference of the JAX model.

Written from the equations alone (technical report arXiv 2606.19348, sections 2.1 to 2.3, and the
released inference code where the report is silent), one token at a time where that reads like the
equation, and sharing no code with v4jax. It is slow and meant to be read.

Names of parameters are those of transformers' `DeepseekV4ForCausalLM.state_dict()`. The MTP module,
which transformers lacks, has its block under `model.layers.{L}` (L = number of main layers) and the
rest under `mtp.0`. A config is any object with v4jax.ModelConfig's attribute names.

Shapes: S tokens of one sequence, C compressed entries, D model, N heads, H head dim, M residual
streams, E experts, K experts per token, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

SLIDING = "sliding_attention"
CSA = "compressed_sparse_attention"
HCA = "heavily_compressed_attention"


def _rows():
    return dataclasses.field(default_factory=lambda: np.zeros(0))


@dataclasses.dataclass
class Forward:
    """What one forward pass computed. Dicts are keyed by layer index; the MTP block's index is L.

    Rows of a token that has no next (MTP) or no target (losses) hold NaN. Without an MTP module
    its arrays are empty.
    """

    logits: np.ndarray = _rows()  # [S, V]
    streams: list = dataclasses.field(default_factory=list)  # one [S, M, D] after every main layer
    mtp_logits: np.ndarray = _rows()  # [S, V], row t predicts token t + 2
    mtp_streams: np.ndarray = _rows()  # [S, M, D] after the MTP block
    token_loss: np.ndarray = _rows()  # [S] cross-entropy in nats of logits[t] against token t + 1
    mtp_token_loss: np.ndarray = _rows()  # [S] of mtp_logits[t] against token t + 2
    router_scores: dict = dataclasses.field(default_factory=dict)  # [S, E], without the bias
    router_choices: dict = dataclasses.field(default_factory=dict)  # [S, K] expert indices
    router_weights: dict = dataclasses.field(default_factory=dict)  # [S, K]
    router_gaps: dict = dataclasses.field(default_factory=dict)  # [S] at the selection border
    balance: dict = dataclasses.field(default_factory=dict)  # sum_i f_i P_i, without its weight
    index_scores: dict = dataclasses.field(default_factory=dict)  # CSA: [S, C], -inf if invisible
    index_selected: dict = dataclasses.field(default_factory=dict)  # CSA: [S, C] bool, the top-k
    index_gaps: dict = dataclasses.field(default_factory=dict)  # CSA: [S] at the selection border
    index_teacher: dict = dataclasses.field(default_factory=dict)  # CSA: [S, C], rows sum to 1
    index_kl: dict = dataclasses.field(default_factory=dict)  # CSA: [S] in nats, NaN if no entry
    samples: tuple = ()  # of `packed`: every sample's own Forward

    @property
    def loss(self) -> float:
        """Mean next-token cross-entropy over the tokens that have a target."""
        return float(np.nanmean(self.token_loss))

    @property
    def mtp_loss(self) -> float:
        """Mean MTP cross-entropy over the tokens that have a target (V3 divides by S instead)."""
        return float(np.nanmean(self.mtp_token_loss))

    @property
    def kl(self) -> dict[int, float]:
        """For every CSA layer the indexer's KL, mean over the queries that have an entry."""
        return {
            layer: 0.0 if np.isnan(rows).all() else float(np.nanmean(rows))
            for layer, rows in self.index_kl.items()
        }

    @property
    def smallest_gap(self) -> float:
        """Smallest distance of a top-k decision to flipping: compare only runs far above it."""
        gaps = [*self.router_gaps.values(), *self.index_gaps.values()]
        return float(min((gap.min() for gap in gaps), default=math.inf))


class Weights:
    """The parameters under one name prefix, in float64 (integers stay integers)."""

    def __init__(self, params, prefix: str = ""):
        self.params, self.prefix = params, prefix

    def __getitem__(self, name: str) -> np.ndarray:
        value = np.asarray(self.params[self.prefix + name])
        return value if value.dtype.kind in "iu" else value.astype(np.float64)

    def at(self, name: str) -> Weights:
        return Weights(self.params, f"{self.prefix}{name}.")


# ---- elementary functions ----------------------------------------------------------------------


def rmsnorm(v, eps):
    return v / np.sqrt(np.mean(v * v, axis=-1, keepdims=True) + eps)


def sigmoid(z):
    return np.exp(-np.logaddexp(0.0, -z))


def softmax(z, axis=-1):
    e = np.exp(z - z.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def top_k(scores, k) -> list[int]:
    """Indices of the k largest, largest first; equal scores (-0 equals +0): lowest index first."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k]


def selection_gap(scores, k) -> float:
    """Distance between the last chosen and the first rejected score; inf if none is rejected.

    Two exact zeros (the indexer's ReLU makes them) are ordered by index in any precision: inf.
    """
    order = sorted(scores, reverse=True)
    if len(order) <= k or order[k - 1] == order[k] == 0.0:
        return math.inf
    return order[k - 1] - order[k]


def cross_entropy(logits, targets) -> np.ndarray:
    """[T, V], [T] -> [T] in nats."""
    losses = np.zeros(len(targets))
    for t, target in enumerate(targets):
        losses[t] = -np.log(softmax(logits[t])[target])
    return losses


# ---- hyper-connections (report 2.2) ------------------------------------------------------------


def sinkhorn(z, iterations, eps):
    """[M, M] raw numbers -> mixing matrix: softmax over rows, columns first, then row/column."""
    mix = softmax(z, axis=1) + eps
    mix = mix / (mix.sum(axis=0, keepdims=True) + eps)
    for _ in range(iterations - 1):
        mix = mix / (mix.sum(axis=1, keepdims=True) + eps)
        mix = mix / (mix.sum(axis=0, keepdims=True) + eps)
    return mix


def input_weights(z, eps):
    return sigmoid(z) + eps


def output_weights(z):
    return 2.0 * sigmoid(z)


def hyper_connection(cfg, w, x):
    """Streams [M, D] of one token -> sublayer input [D], output weights [M], mixing [M, M]."""
    m, scale, base = cfg.hc_mult, w["scale"], w["base"]
    z = w["fn"] @ rmsnorm(x.reshape(-1), cfg.rms_norm_eps)
    pre = input_weights(z[:m] * scale[0] + base[:m], cfg.hc_eps)
    post = output_weights(z[m : 2 * m] * scale[1] + base[m : 2 * m])
    raw = (z[2 * m :] * scale[2] + base[2 * m :]).reshape(m, m)
    return pre @ x, post, sinkhorn(raw, cfg.hc_sinkhorn_iters, cfg.hc_eps)


def update_streams(x, post, mix, y):
    """X[k] <- post[k] y + sum_j mix[j, k] X[j]: the sum runs over the FIRST index of mix."""
    new = np.zeros_like(x)
    for k in range(len(x)):
        new[k] = post[k] * y
        for j in range(len(x)):
            new[k] += mix[j, k] * x[j]
    return new


def stream_head(cfg, x, fn, base, scale):
    """Streams [M, D] of one token -> [D]."""
    z = fn @ rmsnorm(x.reshape(-1), cfg.rms_norm_eps)
    return input_weights(z * scale[0] + base, cfg.hc_eps) @ x


# ---- rotary embedding --------------------------------------------------------------------------


def yarn(frequencies, theta, scaling):
    """Slow rotations divided by the factor, fast ones kept, a linear ramp between; no mscale."""
    r = 2 * len(frequencies)

    def dimension(rotations):
        length = scaling.original_max_position_embeddings
        return r * math.log(length / (2 * math.pi * rotations)) / (2 * math.log(theta))

    low = max(math.floor(dimension(scaling.beta_fast)), 0)
    high = min(math.ceil(dimension(scaling.beta_slow)), r - 1)
    if low == high:
        high += 0.001
    ramp = [min(max((i - low) / (high - low), 0.0), 1.0) for i in range(r // 2)]
    return [f * (1 - p) + f / scaling.factor * p for f, p in zip(frequencies, ramp, strict=True)]


def rope_frequencies(cfg, kind) -> np.ndarray:
    """[r/2]. Sliding layers: plain. Compressed layers: their own theta, and YaRN if configured."""
    r = cfg.qk_rope_head_dim
    theta = cfg.rope_theta if kind == SLIDING else cfg.compress_rope_theta
    frequencies = [theta ** (-2 * i / r) for i in range(r // 2)]
    if kind != SLIDING and cfg.rope_scaling is not None:
        frequencies = yarn(frequencies, theta, cfg.rope_scaling)
    return np.array(frequencies)


def rope(x, position, frequencies):
    """Rotates the adjacent pairs of the last r dims of x [..., H]; the inverse is -position."""
    x = x.copy()
    start = x.shape[-1] - 2 * len(frequencies)
    for i, frequency in enumerate(frequencies):
        cos, sin = math.cos(position * frequency), math.sin(position * frequency)
        even, odd = x[..., start + 2 * i].copy(), x[..., start + 2 * i + 1].copy()
        x[..., start + 2 * i] = even * cos - odd * sin
        x[..., start + 2 * i + 1] = odd * cos + even * sin
    return x


# ---- compressors and indexer (report 2.3.1, 2.3.2) ---------------------------------------------


def token_visible(t, j, window) -> bool:
    return j <= t and t - j < window


def entry_visible(t, entry, rate) -> bool:
    return entry < (t + 1) // rate


def entry_position(entry, rate) -> int:
    return entry * rate


def previous_window_half(width) -> slice:
    """CSA channels by which a token enters the NEXT window's entry; the others its own's."""
    return slice(0, width)


def own_window_half(width) -> slice:
    return slice(width, 2 * width)


def compress(cfg, w, x, rate, width, overlap, frequencies):
    """[S, D] -> entries [C, width], one per complete window, normed and rotated.

    Every channel has its own softmax over the slots: the window's tokens, and with overlap (CSA)
    the tokens of the window before as well, through the other half of the channels.
    """
    values, gates, bias = x @ w["kv_proj.weight"].T, x @ w["gate_proj.weight"].T, w["position_bias"]
    own = own_window_half(width) if overlap else slice(0, width)
    before = previous_window_half(width)
    entries = np.zeros((len(x) // rate, width))
    for e in range(len(entries)):
        slots = []
        if overlap and e > 0:
            slots += [((e - 1) * rate + j, j, before) for j in range(rate)]
        slots += [(e * rate + j, j, own) for j in range(rate)]
        slot_values = np.array([values[t, half] for t, _, half in slots])
        slot_gates = np.array([gates[t, half] + bias[j, half] for t, j, half in slots])
        mean = np.sum(softmax(slot_gates, axis=0) * slot_values, axis=0)
        normed = rmsnorm(mean, cfg.rms_norm_eps) * w["kv_norm.weight"]
        entries[e] = rope(normed, entry_position(e, rate), frequencies)
    return entries


def index(cfg, w, x, q_low, rate, frequencies):
    """The lightning indexer: [S, D], [S, q_lora_rank] -> scores [S, C], -inf where invisible."""
    heads, dim = cfg.index_n_heads, cfg.index_head_dim
    keys = compress(cfg, w, x, rate, dim, True, frequencies)
    queries = (q_low @ w["q_b_proj.weight"].T).reshape(len(x), heads, dim)
    weights = x @ w["scorer.weights_proj.weight"].T * heads**-0.5
    scores = np.full((len(x), len(keys)), -math.inf)
    for t in range(len(x)):
        query = rope(queries[t], t, frequencies)
        for e in range(len(keys)):
            if entry_visible(t, e, rate):
                scores[t, e] = weights[t] @ np.maximum(query @ keys[e], 0.0) * dim**-0.5
    return scores


def index_kl(scores, support, mass):
    """KL of the indexer from its teacher, for one query.

    Args:
      scores: [C] index scores.
      support: [C] bool, S: the entries the attention saw.
      mass: [C] the main attention's probability of every entry, summed over heads, each head's
        softmax running jointly over window, entries and sink.
    Returns:
      teacher [C], which sums to 1 over S and is 0 elsewhere, and the KL in nats; zeros and NaN
      where S is empty.
    """
    teacher, kl = np.zeros(len(scores)), math.nan
    if support.any():
        teacher[support] = mass[support] / mass[support].sum()
        student, kl = softmax(scores[support]), 0.0
        for p, q in zip(teacher[support], student, strict=True):
            kl += p * (math.log(p) - math.log(q)) if p > 0 else 0.0
    return teacher, kl


def record_indexer(out, layer, scores, selected, support, mass, k):
    """Writes one CSA layer's scores, selection, border gaps, teacher and KL into out."""
    rows = [index_kl(scores[t], support[t], mass[t]) for t in range(len(scores))]
    out.index_scores[layer], out.index_selected[layer] = scores, selected
    out.index_gaps[layer] = np.array([selection_gap(s[np.isfinite(s)], k) for s in scores])
    out.index_teacher[layer] = np.array([teacher for teacher, _ in rows])
    out.index_kl[layer] = np.array([kl for _, kl in rows])


# ---- attention (report 2.3) --------------------------------------------------------------------


def sink_logits(w, head_dim):
    """[N]: used as they are, not scaled by head_dim**-0.5."""
    return w["sinks"]


def entries_of(cfg, w, kind, x, frequencies):
    """Compressed entries [C, H] of one layer and their rate; sliding layers have none."""
    if kind == SLIDING:
        return np.zeros((0, cfg.head_dim)), 1
    rate = getattr(cfg.compress_rates, kind)
    return compress(cfg, w, x, rate, cfg.head_dim, kind == CSA, frequencies), rate


def attention(cfg, w, kind, x, out, layer, dense):
    """[S, D] -> [S, D]. `dense` attends all visible entries in CSA layers (the warm-up stage)."""
    length, heads, dim, eps = len(x), cfg.num_attention_heads, cfg.head_dim, cfg.rms_norm_eps
    frequencies = rope_frequencies(cfg, kind)
    q_low = rmsnorm(x @ w["q_a_proj.weight"].T, eps) * w["q_a_norm.weight"]
    q = rmsnorm((q_low @ w["q_b_proj.weight"].T).reshape(length, heads, dim), eps)
    kv = rmsnorm(x @ w["kv_proj.weight"].T, eps) * w["kv_norm.weight"]
    q = np.array([rope(q[t], t, frequencies) for t in range(length)])
    kv = np.array([rope(kv[t], t, frequencies) for t in range(length)])

    entries, rate = entries_of(cfg, w.at("compressor"), kind, x, frequencies)
    visible = np.zeros((length, len(entries)), bool)
    for t in range(length):
        for e in range(len(entries)):
            visible[t, e] = entry_visible(t, e, rate)
    attended = visible
    if kind == CSA:
        scores = index(cfg, w.at("compressor.indexer"), x, q_low, rate, frequencies)
        selected = np.zeros_like(visible)
        for t in range(length):
            selected[t, top_k(scores[t], cfg.index_topk)] = True
        selected &= visible
        attended = visible if dense else selected

    mixed = np.zeros((length, heads, dim))
    entry_mass = np.zeros((length, len(entries)))
    for t in range(length):
        window = [j for j in range(length) if token_visible(t, j, cfg.sliding_window)]
        keys = np.concatenate([kv[window], entries[attended[t]]])
        logits = q[t] @ keys.T * dim**-0.5
        logits = np.concatenate([logits, sink_logits(w, dim)[:, None]], axis=1)
        probabilities = softmax(logits)[:, :-1]  # the sink takes its share and gives nothing
        mixed[t] = rope(probabilities @ keys, -t, frequencies)
        entry_mass[t, attended[t]] = probabilities[:, len(window) :].sum(axis=0)

    if kind == CSA:
        record_indexer(out, layer, scores, selected, attended, entry_mass, cfg.index_topk)
    return grouped_output(cfg, w, mixed)


def grouped_output(cfg, w, mixed):
    """[S, N, H] -> [S, D] through one low-rank map for each group of consecutive heads."""
    groups, rank = cfg.o_groups, cfg.o_lora_rank
    per_group = cfg.num_attention_heads // groups
    low = []
    for g in range(groups):
        group = mixed[:, g * per_group : (g + 1) * per_group].reshape(len(mixed), -1)
        low.append(group @ w["o_a_proj.weight"][g * rank : (g + 1) * rank].T)
    return np.concatenate(low, axis=1) @ w["o_b_proj.weight"].T


# ---- mixture of experts (report 2.1) -----------------------------------------------------------


def swiglu(gate, up, limit):
    """silu(gate) up, gate clamped from above only and up on both sides, before the SiLU."""
    if limit is not None:
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    return gate * sigmoid(gate) * up


def router_score(cfg, z):
    return sigmoid(z) if cfg.scoring_func == "sigmoid" else np.sqrt(np.logaddexp(0.0, z))


def routing_weights(cfg, scores, bias, choice):
    """[E], [E], [K] -> [K]: scores without the selection bias, normalised over the chosen."""
    chosen = scores[choice]
    return chosen / (chosen.sum() + 1e-20) * cfg.routed_scaling_factor


def balance_loss(scores, choices) -> float:
    """Sequence-wise balance term sum_i f_i P_i (V3 equations 17 to 20, without its weight).

    scores [S, E] without bias; choices [S, K] the experts counted in f.
    """
    length, experts = scores.shape
    load = np.zeros(experts)
    for choice in choices:
        for expert in choice:
            load[expert] += 1
    f = load * experts / (choices.shape[1] * length)
    p = np.mean(scores / scores.sum(axis=1, keepdims=True), axis=0)
    return float(f @ p)


def moe(cfg, w, kind, x, ids, out, layer):
    """[S, D] -> [S, D]: K routed experts for every token and the shared expert."""
    hashed, k, hidden = kind == "hash_moe", cfg.num_experts_per_tok, cfg.moe_intermediate_size
    scores = router_score(cfg, x @ w["gate.weight"].T)
    bias = np.zeros(scores.shape[1]) if hashed else w["gate.e_score_correction_bias"]
    gate_up, down = w["experts.gate_up_proj"], w["experts.down_proj"]
    shared = w.at("shared_experts")
    shared_limit = cfg.swiglu_limit if cfg.shared_expert_swiglu_limit else None

    y, choices, weights = np.zeros_like(x), [], []
    for t in range(len(x)):
        choice = list(w["gate.tid2eid"][ids[t]]) if hashed else top_k(scores[t] + bias, k)
        weight = routing_weights(cfg, scores[t], bias, choice)
        for expert, share in zip(choice, weight, strict=True):
            raw = gate_up[expert] @ x[t]
            y[t] += share * (down[expert] @ swiglu(raw[:hidden], raw[hidden:], cfg.swiglu_limit))
        gate, up = shared["gate_proj.weight"] @ x[t], shared["up_proj.weight"] @ x[t]
        y[t] += shared["down_proj.weight"] @ swiglu(gate, up, shared_limit)
        choices.append(choice)
        weights.append(weight)

    out.router_scores[layer], out.router_weights[layer] = scores, np.array(weights)
    out.router_choices[layer] = np.array(choices)
    if not hashed:
        out.router_gaps[layer] = np.array([selection_gap(s + bias, k) for s in scores])
        out.balance[layer] = balance_loss(scores, np.array([top_k(s, k) for s in scores]))
    return y


# ---- the whole model ---------------------------------------------------------------------------


def block(cfg, w, attention_kind, mlp_kind, streams, ids, out, layer, dense):
    """Streams [S, M, D] -> [S, M, D]: attention and experts, each inside its hyper-connection."""
    eps = cfg.rms_norm_eps

    def around(hc, norm, sublayer, streams):
        mixes = [hyper_connection(cfg, w.at(hc), token) for token in streams]
        x = np.array([pre for pre, _, _ in mixes])
        y = sublayer(rmsnorm(x, eps) * w[f"{norm}.weight"])
        return np.array(
            [
                update_streams(token, post, mix, row)
                for token, (_, post, mix), row in zip(streams, mixes, y, strict=True)
            ]
        )

    def attend(x):
        return attention(cfg, w.at("self_attn"), attention_kind, x, out, layer, dense)

    def experts(x):
        return moe(cfg, w.at("mlp"), mlp_kind, x, ids, out, layer)

    streams = around("attn_hc", "input_layernorm", attend, streams)
    return around("ffn_hc", "post_attention_layernorm", experts, streams)


def forward(cfg, params, ids, *, dense=False) -> Forward:
    """One sequence of token ids [S] through the model and, if configured, its MTP module.

    Args:
      cfg: an object with ModelConfig's attributes.
      params: dict of state_dict name -> array.
      ids: [S] integers, S >= 1.
      dense: CSA layers attend every visible entry, and the indexer's KL runs over all of them;
        otherwise both take the selected entries.
    """
    ids, w, out = [int(i) for i in ids], Weights(params), Forward()
    embedding, lm_head = w["model.embed_tokens.weight"], w["lm_head.weight"]
    streams = np.array([[embedding[i]] * cfg.hc_mult for i in ids])
    for layer, kinds in enumerate(zip(cfg.layer_types, cfg.mlp_layer_types, strict=True)):
        layer_weights = w.at(f"model.layers.{layer}")
        streams = block(cfg, layer_weights, *kinds, streams, ids, out, layer, dense)
        out.streams.append(streams)

    head = [w[f"model.hc_head.hc_{name}"] for name in ("fn", "base", "scale")]
    x = np.array([stream_head(cfg, token, *head) for token in streams])
    x = rmsnorm(x, cfg.rms_norm_eps) * w["model.norm.weight"]
    out.logits = x @ lm_head.T
    out.token_loss = np.full(len(ids), math.nan)
    out.token_loss[:-1] = cross_entropy(out.logits[:-1], ids[1:])
    if cfg.num_nextn_predict_layers:
        predict_second_next(cfg, w, ids, embedding, lm_head, out)
    return out


def predict_second_next(cfg, w, ids, embedding, lm_head, out):
    """The MTP module of depth 1: streams before the head, and the next token's embedding."""
    if cfg.num_nextn_predict_layers != 1:
        raise ValueError(f"num_nextn_predict_layers={cfg.num_nextn_predict_layers}; allowed: 0, 1")
    eps, m, layer = cfg.rms_norm_eps, w.at("mtp.0"), len(cfg.layer_types)
    following, main = ids[1:], out.streams[-1]
    out.mtp_streams = np.full(main.shape, math.nan)
    out.mtp_logits = np.full(out.logits.shape, math.nan)
    out.mtp_token_loss = np.full(len(ids), math.nan)
    if not following:
        return
    streams = np.zeros_like(main[:-1])
    for t, token in enumerate(following):
        e = m["e_proj.weight"] @ (rmsnorm(embedding[token], eps) * m["enorm.weight"])
        for i in range(cfg.hc_mult):
            h = m["h_proj.weight"] @ (rmsnorm(main[t, i], eps) * m["hnorm.weight"])
            streams[t, i] = e + h
    layer_weights = w.at(f"model.layers.{layer}")
    streams = block(cfg, layer_weights, SLIDING, "moe", streams, following, out, layer, False)
    head = [m[f"hc_head_{name}"] for name in ("fn", "base", "scale")]
    x = np.array([stream_head(cfg, token, *head) for token in streams])
    out.mtp_streams[:-1] = streams
    out.mtp_logits[:-1] = rmsnorm(x, eps) * m["norm.weight"] @ lm_head.T
    out.mtp_token_loss[:-2] = cross_entropy(out.mtp_logits[:-2], ids[2:])


# ---- packed samples ----------------------------------------------------------------------------


def packed(cfg, params, samples, *, dense=False) -> Forward:
    """Several samples in one row: every one on its own (positions from 0), then concatenated.

    Token arrays are joined along S; index arrays are block-diagonal in [S, C], the entries of all
    samples in order (between samples: -inf, False, 0); `balance` is the mean over samples, each
    divided by its own length. `samples` keeps the parts.
    """
    parts = [forward(cfg, params, ids, dense=dense) for ids in samples]
    out = Forward(samples=tuple(parts))

    for name in ("logits", "mtp_logits", "mtp_streams", "token_loss", "mtp_token_loss"):
        setattr(out, name, np.concatenate([getattr(part, name) for part in parts]))
    out.streams = [np.concatenate(layer) for layer in zip(*(p.streams for p in parts), strict=True)]
    by_token = ("router_scores", "router_choices", "router_weights", "router_gaps")
    for name in (*by_token, "index_gaps", "index_kl"):
        setattr(out, name, by_layer(parts, name, np.concatenate))
    out.balance = by_layer(parts, "balance", lambda values: float(np.mean(values)))
    fills = {"index_scores": -math.inf, "index_selected": False, "index_teacher": 0.0}
    for name, fill in fills.items():
        setattr(out, name, by_layer(parts, name, lambda v, fill=fill: block_diagonal(v, fill)))
    return out


def by_layer(parts, name, join) -> dict:
    """Joins every layer's values over the parts that have the layer (one token has no MTP)."""
    dicts = [getattr(part, name) for part in parts]
    layers = sorted({layer for values in dicts for layer in values})
    return {layer: join([d[layer] for d in dicts if layer in d]) for layer in layers}


def block_diagonal(blocks, fill) -> np.ndarray:
    rows, columns = (sum(b.shape[axis] for b in blocks) for axis in (0, 1))
    result = np.full((rows, columns), fill, blocks[0].dtype)
    row = column = 0
    for b in blocks:
        result[row : row + b.shape[0], column : column + b.shape[1]] = b
        row, column = row + b.shape[0], column + b.shape[1]
    return result
