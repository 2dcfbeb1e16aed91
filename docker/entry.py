#!/opt/trainer/bin/python3
"""The command `trainer` in the images: process 1 of a container, which no signal ends before it has a handler for it."""

if __name__ == "__main__":  # prepare's worker processes import this file again
    import os
    import signal

    signal.signal(signal.SIGTERM, lambda *_: os._exit(143))  # until the command has its own

    from trainer.__main__ import main

    main()
