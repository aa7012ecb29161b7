"""What should exist, and what to do next: pure functions of the spec and of what was seen.

Nothing in this package does I/O, reads a clock or imports kopf or a client; tests hold it against golden values.
"""
