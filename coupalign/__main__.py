"""`python -m coupalign VERB …`: the command line; launchers start it on every rank."""

from coupalign.cli.parser import main

if __name__ == "__main__":
    raise SystemExit(main())
