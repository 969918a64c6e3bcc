"""`python -m softpref` is `softpref`."""

from softpref.cli import main

if __name__ == "__main__":
    main()
