"""`python -m fabrictune` is the `fabrictune` command."""

from fabrictune.cli import main

if __name__ == "__main__":
    main()
