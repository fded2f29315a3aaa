#!/usr/bin/env python3
"""The doctor without an installation: python tools/doctor.py [--json]. With one: spin-megatron doctor."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from spin_megatron.report.doctor import main

    sys.exit(main())
