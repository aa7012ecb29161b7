"""The lab: a Kubernetes cluster with WeightSync's images on it, made on a bare machine by `python -m e2e.lab up`.

It serves the demo, the cluster tests and (through `bareapi`) the operator tests. It imports the standard library, rich and
PyYAML alone, so that it runs before any image, torch or vLLM exists.
"""
