"""`python -m sparsekit`."""

from sparsekit.cli import main

if __name__ == "__main__":
    main()
