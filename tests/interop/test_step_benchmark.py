"""The step benchmark's other side is the same model, and takes steps."""

from __future__ import annotations

import transformers

from v4jax.analysis import step_cases, transformers_step
from v4jax.model import parameter_counts


def test_both_sides_have_the_same_parameters():
    config = transformers.DeepseekV4Config(
        **transformers_step.hugging_face_fields(step_cases.CONFIG)
    )
    theirs = transformers.DeepseekV4ForCausalLM._from_config(config, attn_implementation="eager")
    ours = parameter_counts(step_cases.CONFIG)["total without MTP"]
    assert sum(p.numel() for p in theirs.parameters()) == ours


def test_a_process_of_transformers_takes_steps():
    with transformers_step.started(step_cases.CONFIG, 1, 16, threads=1) as child:
        wall, cpu = child.run(1)
    assert wall > 0 and cpu > 0
