"""``python -m flexsparse``: the command line."""

from flexsparse.cli import main

if __name__ == "__main__":
    main(prog_name="flexsparse")
