"""What `fork_server.python()` executes: `python -IS fork_client.py SOCKET STATE_JSON [arguments of python]`.

Only the smallest modules are imported, since this starts once for each process.
"""

import json
import os
import signal
import socket
import sys


def request(words):
    """What to run, from the arguments of `python`; None where the server cannot do the same."""
    found = {"unbuffered": False, "warnings": [], "environment": dict(os.environ), "folder": os.getcwd()}
    words = list(words)
    while words:
        word = words.pop(0)
        if word == "-u":
            found["unbuffered"] = True
        elif word == "-W" and words and ":" not in words[0]:
            found["warnings"].append(words.pop(0))
        elif word in ("-m", "-c") and words:
            kind = "module" if word == "-m" else "code"
            return {**found, "kind": kind, "what": words[0], "arguments": words[1:]}
        elif word.startswith("-"):
            return None
        else:
            return {**found, "kind": "script", "what": word, "arguments": words}
    return None


def main():
    """Have the process forked, pass signals on, and end as it ends."""
    path, state, words = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3:]
    found = request(words)
    if found is None or any(os.environ.get(name) != value for name, value in state.items()):
        os.execv(sys.executable, [sys.executable, *words])
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    socket.send_fds(connection, [b"f"], [0, 1, 2])
    connection.sendall(json.dumps(found).encode() + b"\n")
    answers = connection.makefile()
    pid = int(answers.readline())
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda got, _: os.kill(pid, got))
    code = int(answers.readline())
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


if __name__ == "__main__":
    main()
