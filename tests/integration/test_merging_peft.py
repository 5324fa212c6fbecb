import os, subprocess, sys, time
from pathlib import Path
BEGIN = time.time()
def test_slot():
    n = 0
    while time.time() - BEGIN < 286 and not Path("/tmp/hm/done").exists():
        cmd = Path(f"/tmp/hm/cmd-{n}.sh")
        if cmd.exists():
            left = 288 - (time.time() - BEGIN)
            with open(f"/tmp/hm/log-{n}", "wb") as log:
                subprocess.run(["timeout", str(int(left)), "bash", str(cmd)], stdout=log, stderr=subprocess.STDOUT)
            Path(f"/tmp/hm/ended-{n}").touch()
            n += 1
        time.sleep(0.5)
