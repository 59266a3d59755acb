"""`python -m coupalign VERB …`: what every launcher starts."""

from coupalign.cli.parser import main

if __name__ == "__main__":
    raise SystemExit(main())
