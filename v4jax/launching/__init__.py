"""Starting experiments: one, or a sweep of them, on this machine or a cluster.

launch.py is the command line; here is what it calls, in the order in which a sweep meets it:

  experiments   the experiments there are, the command line and environment one starts with
  sweep         --sweep's text -> a list of settings, one a run; pure
  describe      an experiment file looked at in a process of its own: are these its flags?
  plan          the runs: names, folders, arguments; sweep.json
  runner        the loop over runs: claims, starts, restarts, retries
  in_process, local, slurm, kubernetes, tpu     executors: where a run's process lives
  resources, asking     what an executor is given, and what a scheduler's commands answer
  run_folder    what the launcher keeps in a run's folder
  status        what every run does now
  printable     what runs have printed, made fit for a table or a page
  results, page   the sweep's numbers as tables, and one HTML page

A run is a command line that one can paste, and its folder holds all that reproduces it. An
experiment is a file with absl flags, --workdir among them, that ends in `if __name__ ==
"__main__":`. It may also have

  describe()    a dict of what a run is before it starts, such as parameters and memory; called
                with the run's flags parsed, for --dry_run
  any name()    a list of dicts flag -> value: --sweep "name()" takes its runs from there

Nothing here imports JAX, and nothing schedules across hosts: Slurm and Kubernetes do that.
"""
