"""``python -m semid``: the command line, where the script is not on the path."""

from semid.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    main()
