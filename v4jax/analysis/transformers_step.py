"""transformers' DeepSeek-V4 trained a step at a time, in a process of its own.

    echo 3 | python -m v4jax.analysis.transformers_step CONFIG.json

Reads numbers of steps from stdin and answers each with a line of JSON: wall and CPU seconds a step.
A process apart, because the idle threads of one framework would take the other's cores.
"""

import json
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata, util

from v4jax.config import ModelConfig


def versions() -> dict[str, str] | None:
    """Of torch and transformers; None where one of them is not installed."""
    names = ("torch", "transformers")
    if not all(util.find_spec(name) for name in names):
        return None
    return {name: metadata.version(name) for name in names}


def hugging_face_fields(cfg: ModelConfig) -> dict:
    """What `transformers.DeepseekV4Config` takes to build the model of `cfg`, without YaRN."""
    share = cfg.qk_rope_head_dim / cfg.head_dim
    same = (
        "vocab_size", "hidden_size", "moe_intermediate_size", "num_attention_heads", "head_dim",
        "q_lora_rank", "o_groups", "o_lora_rank", "sliding_window", "index_n_heads",
        "index_head_dim", "index_topk", "n_routed_experts", "num_experts_per_tok", "hc_mult",
        "hc_sinkhorn_iters", "hc_eps", "rms_norm_eps", "scoring_func", "routed_scaling_factor",
        "swiglu_limit", "num_hidden_layers",
    )  # fmt: skip
    rates = cfg.compress_rates
    tables = {"main": cfg.rope_theta, "compress": cfg.compress_rope_theta}
    return {name: getattr(cfg, name) for name in same} | {
        "layer_types": list(cfg.layer_types),
        "mlp_layer_types": list(cfg.mlp_layer_types),
        "compress_rates": {
            "compressed_sparse_attention": rates.compressed_sparse_attention,
            "heavily_compressed_attention": rates.heavily_compressed_attention,
        },
        "partial_rotary_factor": share,
        "rope_parameters": {
            name: {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": share}
            for name, theta in tables.items()
        },
    }


class Steps:
    """A running process: `run(n)` -> (wall, CPU) seconds a step."""

    def __init__(self, process: subprocess.Popen):
        self._process = process

    def run(self, steps: int) -> tuple[float, float]:
        """Raises ChildProcessError where the process has ended."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise ChildProcessError(f"transformers' process ended with {self._process.wait()}")
        answer = json.loads(line)
        return answer["wall"], answer["cpu"]


@contextmanager
def started(cfg: ModelConfig, batch: int, length: int, threads: int) -> Iterator[Steps]:
    """The process, ready to step; ended with the block."""
    what = {"config": hugging_face_fields(cfg), "batch": batch, "length": length}
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "config.json"
        path.write_text(json.dumps(what | {"threads": threads}), encoding="utf-8")
        command = [sys.executable, "-m", __name__, str(path)]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
            try:
                steps = Steps(process)
                steps.run(2)  # warm
                yield steps
            finally:
                process.kill()


def main(path: str) -> None:
    import torch
    import transformers

    what = json.loads(pathlib.Path(path).read_text("utf-8"))
    torch.set_num_threads(what["threads"])
    torch.manual_seed(0)
    config = transformers.DeepseekV4Config(**what["config"])
    model = transformers.DeepseekV4ForCausalLM._from_config(config, attn_implementation="eager")
    model.float().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.randint(0, config.vocab_size, (what["batch"], what["length"]))

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()

    for line in sys.stdin:
        steps = int(line)
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(steps):
            step()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(json.dumps({"wall": wall / steps, "cpu": cpu / steps}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
