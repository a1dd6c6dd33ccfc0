"""Scores of trained models: held-out retrieval, MTEB, ablations, reports and search.

retrieval   a build's held-out queries: held_out reads them, systems names the models, metrics and intervals score,
            thresholds turns cosines into probabilities, pages shows the queries won and lost
search      one question to a model
run_mteb    mteb's tasks: local_tasks reads copies of their data, cost estimates; frozen runs models without training
report      a page of both, by leaderboard, figures and run_files
ablate      variants of a recipe: ablation_recipe reads them, ablation_runs trains them, ablation_table shows the rows
evidence    what a run's folder says about its model, for its card; model_meta writes the file that mteb needs
"""
