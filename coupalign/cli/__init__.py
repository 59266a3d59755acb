"""The command line. The flags and the body of a verb are in one file, one below the other.

`parser.py` has `main`, `options.py` what the verbs share.
"""
