"""A plan made and counted before anything runs: from a model's config and two meshes, with no weights and no GPU.

`checkpoint` says which tensors there are, `tracing` what an engine's ranks want of them (vLLM in a child process), `figures`
what a push would move. The command line is `weightsync.commands.inspect`.
"""
