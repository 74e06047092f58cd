"""The command line: `scaling COMMAND`. The rooms are imported when a command needs them."""
