"""Compares torch_sce with the real tf.keras; `--help` says how."""

import sys

try:
    from torch_sce.crosscheck.command import main
except ModuleNotFoundError as error:
    if error.name != "rich":
        raise
    print("The cross-check needs rich: pip install rich", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    sys.exit(main())
