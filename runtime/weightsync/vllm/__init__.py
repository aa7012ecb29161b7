"""The plug-in for vLLM 0.32: the only package that imports vllm. Named in VLLM_PLUGINS as `weightsync`."""
