"""Ports of workers in tests: nobody is given one by chance, and who names one gets it, TensorFlow's server among them."""

import socket

import pytest

from tests.helpers.ports import LOOPBACK, hold, taken
from tests.helpers.processes import finish, start_program
from tests.helpers.workers import LISTENS, sockets_at

SERVES = """
import sys, tensorflow as tf
from tests.helpers.workers import LISTENS, sockets_at
port = int(sys.argv[1])
server = tf.distribute.Server({"worker": [f"127.0.0.1:{port}"]}, job_name="worker", task_index=0)
print(sockets_at(port, LISTENS) > 0)
"""


def test_a_held_port_is_nobodys_by_chance() -> None:
    """Of those who ask for any port, whether or not they would share one, and of connections on their way out."""
    with hold() as held, socket.create_server((LOOPBACK, 0)) as server:
        port, given = held.getsockname()[1], set()
        for number in range(2000):
            with socket.socket() as other:
                other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, number % 2)
                if number % 4 < 2:
                    other.bind((("", LOOPBACK)[number % 2], 0))
                else:
                    other.connect(server.getsockname())
                    server.accept()[0].close()
                given.add(other.getsockname()[1])
    assert len(given) > 500
    assert port not in given


def test_tensorflows_server_gets_a_held_port_and_two_listeners_never_do() -> None:
    with hold() as held:
        port = held.getsockname()[1]
        assert sockets_at(port, LISTENS) == 0
        done = finish(start_program(SERVES, str(port)))
        assert done.stdout == "True\n", done.stderr
        with taken(port), socket.socket() as second:
            second.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with pytest.raises(OSError, match="Address already in use"):
                second.bind((LOOPBACK, port))
