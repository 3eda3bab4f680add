"""A script that stands for a process which a server forks (support.forked), and costs 20 ms.

Arguments: the server's name, a module, then those for its `main`. The server gets them with this process's folder,
environment and standard streams; signals are handed on, and how the forked process ends is how this one ends.
"""

import json
import os
import signal
import socket
import sys

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


if __name__ == "__main__":
    streams = [number for number in range(3) if is_open(number)]
    ignored = [number for number in FORWARDED if signal.getsignal(number) is signal.SIG_IGN]
    settings = {os.fsdecode(key): os.fsdecode(value) for key, value in os.environb.items()}
    asked = json.dumps([sys.argv[2:], os.getcwd(), settings, streams, ignored]).encode()
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server.connect(f"\0{sys.argv[1]}")
    socket.send_fds(server, [asked], streams)
    for each in FORWARDED:
        signal.signal(each, lambda number, frame: server.send(bytes([number])))
    code = os.waitstatus_to_exitcode(int.from_bytes(server.recv(4), "little"))
    if code < 0:
        if -code in FORWARDED:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)
