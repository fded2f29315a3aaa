"""The SPIN loss and the per-token log-probabilities it is made of."""
