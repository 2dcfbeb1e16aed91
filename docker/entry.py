#!/opt/trainer/bin/python3
"""The command `trainer` in the images: process 1 of a container, which hears no signal before it has a handler for it."""

if __name__ == "__main__":  # prepare's worker processes import this file again
    import _signal  # what the module `signal` is made of, there in a third of the time

    early: list[int] = []
    for _number in (_signal.SIGTERM, _signal.SIGINT):
        _signal.signal(_number, lambda number, frame: early.append(number))

    import os
    import sys

    from trainer.startup import answer_early_stops

    answer_early_stops(sys.argv)
    for _number in early:
        os.kill(os.getpid(), _number)  # it has an answer now

    from trainer.__main__ import main

    main()
