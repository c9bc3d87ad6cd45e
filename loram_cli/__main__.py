"""``python -m loram_cli`` is the same as ``loram``."""

from loram_cli.cli.app import main

if __name__ == "__main__":
    main()
