"""The watchdog ends what takes too long, leaves alone what does not, and needs one thread for it all."""

import subprocess
import sys
import threading
import time

from tvm_compress.rpc.watchdog import Watchdog

FORKS = """
import os, threading
from tvm_compress.rpc.watchdog import Watchdog
watchdog = Watchdog()
with watchdog.after(60.0, lambda: None):
    pass
child = os.fork()
if child == 0:
    ended = threading.Event()
    with watchdog.after(0.05, ended.set):
        found = ended.wait(10)
    os._exit(0 if found else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_what_takes_too_long_is_ended_once():
    watchdog, ended = Watchdog(), []
    with watchdog.after(0.05, lambda: ended.append(time.monotonic())):
        begin = time.monotonic()
        while not ended and time.monotonic() - begin < 10:
            time.sleep(0.01)
    time.sleep(0.1)
    assert len(ended) == 1
    assert ended[0] - begin >= 0.04


def test_what_ends_in_time_is_left_alone():
    watchdog, ended = Watchdog(), []
    for _ in range(100):
        with watchdog.after(0.3, lambda: ended.append("late")):
            pass
    time.sleep(0.5)
    assert not ended


def test_a_shorter_limit_inside_of_a_longer_one_counts_first():
    watchdog, ended = Watchdog(), threading.Event()
    with watchdog.after(60.0, lambda: None):
        # The thread sleeps until the longer limit by now.
        time.sleep(0.05)
        with watchdog.after(0.05, ended.set):
            assert ended.wait(10)


def test_it_watches_several_threads_by_one():
    watchdog, ended = Watchdog(), []
    before = threading.active_count()

    def block(number):
        with watchdog.after(0.2, lambda: ended.append(number)):
            time.sleep(0.0 if number % 2 else 0.6)

    blocks = [threading.Thread(target=block, args=(number,)) for number in range(8)]
    for thread in blocks:
        thread.start()
    for thread in blocks:
        thread.join()
    assert sorted(ended) == [0, 2, 4, 6]
    assert threading.active_count() == before + 1


def test_it_watches_in_a_forked_process():
    # In a process of its own, which has no threads but the watchdog's.
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FORKS], timeout=60, check=False)
    assert done.returncode == 0
