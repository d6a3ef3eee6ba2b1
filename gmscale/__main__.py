"""`python -m gmscale`, which torchrun starts."""

from gmscale.cli import main

if __name__ == "__main__":
    main()
