"""The command line: a verb's flags and its body live in one file."""
