"""Parts of `gradients_to_accuracy.py`: problems with known moments, exact laws, methods, and the counting of gradients."""
