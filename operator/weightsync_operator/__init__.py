"""The WeightSync operator: turns a `WeightSync` into Redis, ModelExpress, a trainer and vLLM pods, and shows weight versions.

`api` describes the resource, `plan` decides what should exist (pure), everything else does the talking.
"""
