"""Ports of loopback that are kept from everybody else until their program has them."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

LOOPBACK = "127.0.0.1"


def hold() -> socket.socket:
    """Keep a port from everybody who asks for any port; who names this one, and allows reuse, gets it.

    Linux lets two sockets have an address as long as both allow reuse and at most one of them listens. gRPC's servers allow it,
    and so does the meeting before them.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind((LOOPBACK, 0))
    return held


@contextmanager
def held_ports(count: int) -> Iterator[list[int]]:
    """Ports that nobody else is given until the block ends."""
    sockets = [hold() for _ in range(count)]
    try:
        yield [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


@contextmanager
def taken(port: int) -> Iterator[socket.socket]:
    """Listen on a port that is held, as a program of somebody else would."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((LOOPBACK, port))
        listener.listen()
        yield listener
