"""One module a command of `weightsync`; `weightsync.cli` imports the one that is asked for."""
