"""`python -m fwasync` is `fwasync`."""

from fwasync.cli import main

if __name__ == "__main__":
    main()
