"""Convert checkpoints: `python tools/convert_checkpoint.py hf-to-megatron|megatron-to-hf|inspect ...` (spin-megatron convert)."""

import sys

from spin_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
