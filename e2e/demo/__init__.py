"""The demo: the lab, the chart, `examples/smollm2`, and a report of what was measured. `python -m e2e.demo`.

It goes the way a user goes (helm, kubectl, the service's OpenAI API) and imports neither the operator nor the runtime.
"""
