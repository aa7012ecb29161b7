"""The children of a WeightSync, one module a child: plain manifests from a `Context`. Pure."""
