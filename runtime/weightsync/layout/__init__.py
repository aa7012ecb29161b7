"""What a trainer rank holds and what an engine wants, as records that travel between them.

`records`, `strides`, `table` and `coverage` import numpy at most, so that a plan needs no torch; `trace` and `shards`
import torch. Nothing here imports nixl, modelexpress, redis or vllm. Importing the package itself imports nothing.
"""
