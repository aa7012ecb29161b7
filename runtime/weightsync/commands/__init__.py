"""What the command line does, one module a command; each also runs as `python -m weightsync.commands.NAME`."""
