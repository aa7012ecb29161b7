"""Cluster tests: the example in the lab's cluster, and whatever may be done to it. They take the cluster that `lab-up` made."""
