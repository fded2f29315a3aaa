"""What befalls a double on request, by variables of its environment: after so many answers it dies, or stands still."""

import os
import subprocess
from pathlib import Path

NEVER = "1000000"


def stands_still(num_answers: int) -> bool:
    """Dies behind DOUBLE_CRASH_AFTER answers, and leaves a process whose id is in the file DOUBLE_ORPHAN.

    Holds from DOUBLE_HANG_AFTER on, and makes the file DOUBLE_HUNG then.
    """
    if num_answers > int(os.environ.get("DOUBLE_CRASH_AFTER", NEVER)):
        if "DOUBLE_ORPHAN" in os.environ:
            Path(os.environ["DOUBLE_ORPHAN"]).write_text(str(subprocess.Popen(["sleep", "600"]).pid))
        os._exit(9)
    still = num_answers >= int(os.environ.get("DOUBLE_HANG_AFTER", NEVER))
    if still:
        Path(os.environ["DOUBLE_HUNG"]).touch()
    return still
