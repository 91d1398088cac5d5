"""Compares torch_sce with the real tf.keras; `--help` says how."""

import runpy

if __name__ == "__main__":
    runpy.run_module("torch_sce.crosscheck", run_name="__main__")
