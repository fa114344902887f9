"""A rank that is stuck and deaf, as one in a collective whose other side has gone: SIGTERM does not end it."""

import os
import signal
import sys
import time

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print(f"rank {os.environ['RANK']} hangs", flush=True)
    time.sleep(600)
    sys.exit("nobody ended it")
