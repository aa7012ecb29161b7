"""`kubectl weightsync`: parts of a WeightSync, its versions, and why it is not in sync, from the Kubernetes API alone."""
