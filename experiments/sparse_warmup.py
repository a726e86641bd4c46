"""From dense to sparse attention, with and without the indexer's warm-up and its KL.

On real text and on a generated task in which a key is asked for whose value stood far above: there
an indexer that selects the wrong entries costs everything. "no KL" goes on from "dense", each other
arm is a whole run.

    python launch.py --experiment=sparse_warmup --workdir=runs/sparse_warmup

    dense       attends to every visible entry in training, and is measured so; no KL
    warm-up     dense, then a stage in which only the indexer learns, then sparse with its KL
    joint       dense with the KL from the first step on, then sparse with it
    no KL       goes on sparse where the others do; the indexer is as it was drawn
    from start  sparse with the KL from the first step on

The model is a sliding and a CSA layer of nano's width: with HCA, recall would find another way. The
dense part is long enough for a dense model to learn the task, whose answers are right all at once.
"""

import dataclasses

from absl import flags

from v4jax.config import CSA, SLIDING
from v4jax.training import command, recipe

ARMS = ("no KL", "warm-up", "joint", "from start")
DENSE = 0.8  # of the steps
recipe.define_study(
    steps=450, tokenizer="bytes", vocab_size=257, eval_windows=384, decay_start=0.88
)
TEXT = flags.DEFINE_enum("text", "code", ("code", "task"), "[data] --data, or --task.")
TASK = flags.DEFINE_string("task", "task:recall", "[data] The generated task.")
TOP_K = flags.DEFINE_integer("index_topk", 4, "[model] Entries that a query selects.", 1)
CHOSEN = flags.DEFINE_list("arms", list(ARMS), f"[run] Beside dense: {', '.join(ARMS)}.")
SMALL = recipe.TINY | {"seeds": 1, "arms": ["warm-up"], "steps": 12}
SMALL |= {"task": "task:recall:length=64,keys=4,letters=4", "index_topk": 2}
SWEEP = "runs()"
GROWING = ("seeds",)


def runs():
    recipe.shrink(SMALL)
    texts = ("task",) if flags.FLAGS.quick else ("code", "task")
    return recipe.each_seed(*({"text": text} for text in texts))


def configured(config, arm: str, dense: int):
    """The configuration of an arm. dense: steps before the others are sparse."""
    steps = config.schedule.total_steps
    short = max(1, round(0.06 * steps))
    layers: dict = {"layer_types": (SLIDING, CSA), "mlp_layer_types": ("hash_moe", "moe")}
    layers |= {"num_nextn_predict_layers": 0, "index_topk": TOP_K.value}
    phases = {
        "dense": {"dense_until": steps},
        "warm-up": {"dense_until": dense, "index_start": dense, "indexer_warmup": short},
        "joint": {"dense_until": dense},
        "no KL": {"dense_until": dense},
        "from start": {"dense_until": 0},
    }[arm]
    weight, of = config.objective.index * (arm not in ("dense", "no KL")), dataclasses.replace
    return of(
        config,
        model=of(config.model, **layers),
        schedule=of(config.schedule, **phases),
        optimizer=of(config.optimizer, train_indexer=weight > 0),
        objective=of(config.objective, index=weight),
    )


def main():
    from v4jax.analysis import recall_task, study_run
    from v4jax.analysis.evaluation import Evaluator
    from v4jax.training.run import Branch, train

    command.check_among("arms", ARMS)
    if TEXT.value == "task":
        flags.FLAGS["data"].value = TASK.value
    workdir, setup = recipe.start(), recipe.prepare()
    config, arms = setup.configure(flags.FLAGS.seed), {}
    end, at = flags.FLAGS.steps, round(DENSE * flags.FLAGS.steps)
    pace = dataclasses.replace(recipe.pace(), keep=(at,))
    for name in ("dense", *CHOSEN.value):
        trainer = setup.trainer(configured(config, name, at))
        folder, dense = workdir / name.replace(" ", "_"), name == "dense"
        branch = Branch(workdir / "dense", at) if name == "no KL" else None
        state = train(trainer, folder, stop=end, branch=branch, pace=pace)
        numbers = study_run.last_metrics(folder, "", ("index_kept_mass",))
        if TEXT.value == "task":
            evaluator = Evaluator(trainer.program, setup.windows, 2 * config.batch_size)
            asked = setup.held_out.documents, state.params, state.variables
            told = recall_task.summary(recall_task.recalled(evaluator, *asked, dense_index=dense))
            numbers |= {"accuracy": told["accuracy"], "nats an answer": told["nats"]}
        arms[name] = study_run.Arm(state, numbers=numbers, dense_index=dense)
    study_run.finish(workdir, setup, trainer, arms, text=TEXT.value)


def report(workdir):
    from v4jax.analysis.study import Claim, make_report, read, write_report

    losses = read(workdir, lambda what: what["text"])
    texts = list(dict.fromkeys(arm.split()[0] for arm in losses.arms))
    sections = {f"Minus dense, {t}": [(f"{t} {a}", f"{t} dense") for a in ARMS] for t in texts}
    claims = []
    for t in texts:
        claims += [
            Claim(f"Sparse costs against dense ({t})", f"{t} warm-up", f"{t} dense", higher=True),
            Claim(f"The KL pays ({t})", f"{t} joint", f"{t} no KL"),
            Claim(f"A warm-up beats the KL from the start ({t})", f"{t} warm-up", f"{t} joint"),
            Claim(f"Dense first pays ({t})", f"{t} joint", f"{t} from start"),
        ]
    title = "From dense to sparse attention"
    write_report(workdir, make_report(losses, title, sections, claims))


if __name__ == "__main__":
    command.run(main, quick=SMALL)
