"""Starts the cross-check, `python -m torch_sce.crosscheck`; `--help` says what it does."""

import sys

if __name__ == "__main__":  # each process of --workers imports this file
    try:
        from torch_sce.crosscheck.command import main
    except ModuleNotFoundError as error:
        if error.name != "rich":
            raise
        print("The cross-check needs rich: pip install rich", file=sys.stderr)
        sys.exit(2)
    sys.exit(main())
