"""From dense to sparse attention, with and without the indexer's warm-up and its KL.

On real text and on a generated task in which a key is asked for whose value stood far above: there
an indexer that selects the wrong entries costs everything. Each arm is a whole run.

    python launch.py --experiment=sparse_warmup --workdir=runs/sparse_warmup

    dense       attends to every visible entry in training, and is measured so
    warm-up     dense, then a stage in which only the indexer learns, then sparse with its KL
    joint       dense with the KL from the first step on, then sparse with it
    no KL       dense, then sparse; the indexer is as it was drawn
    from start  sparse with the KL from the first step on
"""

import dataclasses

from absl import flags

from v4jax.training import command, recipe

ARMS = ("dense", "warm-up", "joint", "no KL", "from start")
TASK = "task:recall:length=128,keys=12,letters=12"
recipe.define(steps=400, sequence_length=128, tokenizer="bytes", vocab_size=257, eval_windows=384)
SEEDS = flags.DEFINE_integer("seeds", 3, "[run] The sweep is of so many seeds.", 1)
TEXTS = flags.DEFINE_list("texts", ["code", "task"], "[run] Of code, task: the sweep's data.")
SPEC = flags.DEFINE_string("task", TASK, "[data] The generated task.")
TOP_K = flags.DEFINE_integer("index_topk", 4, "[model] Entries that a query selects.", 1)
CHOSEN = flags.DEFINE_list("arms", list(ARMS), f"[run] Of {', '.join(ARMS)}.")
SMALL = recipe.TINY | {"seeds": 1, "arms": ["dense", "warm-up"], "steps": 12, "texts": ["task"]}
SMALL |= {"task": TASK.replace("128", "64").replace("12", "4"), "index_topk": 2}
SWEEP = "runs()"


def runs():
    recipe.shrink(SMALL)
    data = {"code": flags.FLAGS.data, "task": SPEC.value}
    return [
        {"seed": seed} | ({"data": data[text]} if data[text] else {})
        for text in TEXTS.value
        for seed in range(SEEDS.value)
    ]


def configured(config, arm: str):
    """The configuration of an arm: dense for 30% of the steps where it is dense first."""
    steps = config.schedule.total_steps
    dense, short = round(0.3 * steps), max(1, round(0.1 * steps))
    phases = {
        "dense": {"dense_until": steps},
        "warm-up": {"dense_until": dense, "index_start": dense, "indexer_warmup": short},
        "joint": {"dense_until": dense},
        "no KL": {"dense_until": dense},
        "from start": {"dense_until": 0},
    }[arm]
    weight = 0.0 if arm == "no KL" else config.objective.index
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, index_topk=TOP_K.value),
        schedule=dataclasses.replace(config.schedule, **phases),
        optimizer=dataclasses.replace(config.optimizer, train_indexer=weight > 0),
        objective=dataclasses.replace(config.objective, index=weight),
    )


def main():
    from v4jax.analysis import recall_task, study_run
    from v4jax.analysis.evaluation import Evaluator
    from v4jax.training import tasks
    from v4jax.training.run import train

    command.check_among("arms", ARMS)
    workdir, setup = recipe.start(), recipe.prepare()
    config, arms = setup.configure(flags.FLAGS.seed), {}
    for name in CHOSEN.value:
        trainer, folder = setup.trainer(configured(config, name)), workdir / name.replace(" ", "_")
        state = train(trainer, folder, stop=flags.FLAGS.steps, pace=recipe.pace())
        numbers = study_run.last_metrics(folder, "", ("index_kept_mass",))
        dense = name == "dense"
        if (flags.FLAGS.data or "").startswith(tasks.PREFIX):
            evaluator = Evaluator(trainer.program, setup.windows, 2 * config.batch_size)
            documents, weights = setup.held_out.documents, (state.params, state.variables)
            found = recall_task.recalled(evaluator, documents, *weights, dense_index=dense)
            told = recall_task.summary(found)
            numbers |= {"accuracy": told["accuracy"], "nats an answer": told["nats"]}
        arms[name] = study_run.Arm(state, numbers=numbers, dense_index=dense)
    study_run.finish(workdir, setup, trainer, arms, text=flags.FLAGS.data or "code")


def report(workdir):
    from v4jax.analysis.study import Claim, make_report, read, write_report

    label = lambda what: "task" if what["text"].startswith("task:") else "code"  # noqa: E731
    losses = read(workdir, label)
    texts = list(dict.fromkeys(arm.split()[0] for arm in losses.arms))
    others = [arm for arm in ARMS if arm != "dense"]
    sections = {f"Minus dense, {t}": [(f"{t} {a}", f"{t} dense") for a in others] for t in texts}
    claims = []
    for t in texts:
        claims += [
            Claim(f"Sparse costs against dense ({t})", f"{t} warm-up", f"{t} dense", higher=True),
            Claim(f"The KL pays ({t})", f"{t} joint", f"{t} no KL"),
            Claim(f"A warm-up beats the KL from the start ({t})", f"{t} warm-up", f"{t} joint"),
            Claim(
                f"Dense first beats sparse from the start ({t})", f"{t} joint", f"{t} from start"
            ),
        ]
    title = "From dense to sparse attention"
    write_report(workdir, make_report(losses, title, sections, claims))


if __name__ == "__main__":
    command.run(main, quick=SMALL)
