"""Parts of `federated_experiments.py`: one module an experiment, and the figures that the documentation draws."""
