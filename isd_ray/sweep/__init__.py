"""Which settings matter, and which are good? A search over a file of `tune_spaces/`, with Ray Tune and Optuna."""
