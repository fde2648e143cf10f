"""Several processes meet, agree and end together. They do not start JAX here, so that each is over in no time."""

import concurrent.futures
import re
import signal
import socket
import time

import pytest

from common import roll_call
from common.errors import UserError
from tests import processes

PROGRAM = """
import os, pathlib, sys, time
from common import command, hosts, roll_call
me = int(os.environ["JAX_PROCESS_ID"])
place = roll_call.Place(os.environ["JAX_COORDINATOR_ADDRESS"], int(os.environ["JAX_NUM_PROCESSES"]), me)
hosts.SEEN = 0.3
def main(arguments):
    hosts.meet(place, SECONDS)
    print("met", flush=True)
    BODY
command.run(main)
"""


def program(body, seconds=60):
    """Processes that meet, for so many seconds: a crowded machine starts them some seconds apart."""
    lines = body.replace("\n", "\n    ")
    return ["-c", PROGRAM.replace("BODY", lines).replace("SECONDS", str(seconds))]


def run(body, count=3, **options):
    return processes.run([program(body)] * count, **options)


def statuses(ends):
    return [end.status for end in ends]


def test_they_agree_and_part():
    """What each says is heard by all; a shared folder is one; and nobody misses those that have left."""
    ends = run(
        "hosts.agree('data', {'fingerprint': 'abc'}); hosts.wait('first'); hosts.wait('first')\n"
        "print(hosts._group.exchange('number', me, 5)); hosts.share(pathlib.Path('/tmp'))\n"
        "hosts.leave(); time.sleep(0.3 * me); print('last')"
    )
    assert statuses(ends) == [0, 0, 0], ends
    assert all(end.out == "met\n[0, 1, 2]\nlast\n" and not end.err for end in ends), ends


@pytest.mark.parametrize("failing", [0, 1])
def test_a_traceback_ends_all(failing):
    """It is whole where it happened and at process 0; the others, which wait for it, have one line."""
    ends = run(f"if me == {failing}: raise KeyError('corpus')\nhosts.wait('the others')")
    assert statuses(ends) == [1, 1, 1], ends
    assert ends[failing].err.startswith("Traceback") and ends[failing].err.endswith("KeyError: 'corpus'\n")
    assert "Traceback" in ends[0].err
    assert ends[2].err == f"process {failing} on {socket.gethostname()} has ended, and so do all: KeyError: 'corpus'\n"


def test_an_error_of_the_user_is_one_message():
    body = "from common.errors import UserError\nraise UserError('too few rows')"
    ends = run(body)
    assert statuses(ends) == [1, 1, 1]
    whole = [end.err for end in ends if end.err == "error: too few rows\n"]
    assert len(whole) == 1 and all("too few rows" in end.err and "Traceback" not in end.err for end in ends), ends


@pytest.mark.parametrize("killed", [0, 2])
def test_a_killed_process_ends_all(killed):
    """Those that wait for it say which one it was, in one sentence, and are to be run again."""
    ends = run(f"if me == {killed}: os.kill(os.getpid(), {signal.SIGKILL})\nhosts.wait('the others')")
    assert statuses(ends) == [-9 if i == killed else 75 for i in range(3)], ends
    for i, end in enumerate(ends):
        assert i == killed or (end.err.startswith(f"process {killed} on ") and end.err.count("\n") == 1), ends


def test_what_differs_is_named(tmp_path):
    """By its name, with both values and who has them; and so are disks that are not shared."""
    ends = run("hosts.agree('data', {'corpus': 'shakespeare' if me != 1 else 'stdlib', 'length': '24'})")
    host = socket.gethostname()
    line = f"corpus: shakespeare (process 0 on {host} and process 2 on {host}); stdlib (process 1 on {host})"
    assert statuses(ends) == [1, 1, 1] and line in ends[0].err and "length" not in ends[0].err, ends
    for i in range(2):
        (tmp_path / str(i)).mkdir()
    ends = run(f"hosts.share(pathlib.Path('{tmp_path}', str(min(me, 1))))")
    assert statuses(ends) == [1, 1, 1] and f"process 1 on {host} and process 2 on {host}" in ends[0].err, ends
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_a_process_that_makes_no_step_is_named():
    """It says where it is, the others who it is."""
    body = (
        "def stuck(): time.sleep(60)\n"
        "with hosts.watch(0.05):\n"
        "    for step in range(1000):\n"
        "        hosts.progress(step)\n"
        "        if step == 5 + (me != 1): stuck()"
    )
    ends = run(body)
    assert statuses(ends) == [75, 75, 75], ends
    said = f"process 1 on {socket.gethostname()} made no step for 0.05 minutes (train.watchdog_minutes) after step 5, and others "
    assert all(said in end.err for end in ends), ends
    assert "in stuck" in ends[1].err and "in stuck" not in ends[0].err + ends[2].err
    (alone,) = run(body, count=1)
    assert alone.status == 75 and "made no step" in alone.err and "in stuck" in alone.err


def test_who_does_not_come_is_named():
    """All that have come say so; one that reaches nobody says where it looked."""
    ends = processes.run([program("pass", 4)] * 2, count=4)
    assert statuses(ends) == [1, 1] and all("processes 2, 3 of 4 did not come" in end.err for end in ends), ends
    (alone,) = processes.run([program("pass", 2)], [{"JAX_PROCESS_ID": "1", "JAX_NUM_PROCESSES": "2"}])
    assert alone.status == 1 and "did not reach process 0 at 127.0.0.1:" in alone.err, alone


@pytest.mark.parametrize(
    "other, message",
    [
        ({"JAX_PROCESS_ID": "0", "JAX_NUM_PROCESSES": "2"}, "cannot listen at port|give each process an id"),
        ({"JAX_NUM_PROCESSES": "3"}, "was told of 3 processes, and process 0"),
    ],
)
def test_numbers_that_do_not_fit(other, message):
    ends = processes.run([program("pass", 4)] * 2, [{}, other])
    assert statuses(ends) == [1, 1]
    assert any(re.search(message, end.err) for end in ends), ends


def test_other_programs_are_refused():
    ends = processes.run([[*program("pass"), f"--config.train.steps={i}"] for i in range(2)])
    assert statuses(ends) == [1, 1]
    assert "command line: -c --config.train.steps=0 (process 0" in ends[0].err, ends


def test_a_host_that_is_slow_to_read_its_sources(monkeypatch):
    """It greets process 0 when it has read them."""
    monkeypatch.setattr(roll_call, "GREETING", 0.2)
    monkeypatch.setattr(roll_call, "program", lambda: time.sleep(0.5) or {"code": "abc"})
    address = f"127.0.0.1:{processes.free_port()}"
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        places = [roll_call.Place(address, 2, i) for i in range(2)]
        found = [answer.result()[0] for answer in [pool.submit(roll_call.call, place, 5) for place in places]]
    assert found == [[socket.gethostname()] * 2] * 2


def test_places(monkeypatch):
    """Flags before the environment; a part of it, and what is no number, is one message."""
    for name in roll_call.NAMES.values():
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=r"JAX_COORDINATOR_ADDRESS .* and JAX_NUM_PROCESSES .* and JAX_PROCESS_ID"):
        roll_call.find()
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "10.0.0.1:8476")
    with pytest.raises(
        UserError, match=r"told JAX_NUM_PROCESSES .* and JAX_PROCESS_ID .*; there is JAX_COORDINATOR_ADDRESS="
    ):
        roll_call.find()
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "one")
    with pytest.raises(UserError, match="must be a whole number, got 'one'"):
        roll_call.find()
    monkeypatch.setenv("JAX_LOCAL_DEVICE_IDS", "0,1")
    assert roll_call.find({"process_id": "1"}) == roll_call.Place("10.0.0.1:8476", 2, 1, [0, 1])
    for key, value, message in [
        ("process_id", "2", "JAX_PROCESS_ID must be from 0 to 1, got 2"),
        ("coordinator_address", "10.0.0.1", "must be host:port"),
        ("coordinator_address", ":8476", "must be host:port"),
        ("num_processes", "0", "JAX_NUM_PROCESSES must be from 1 to 65536, got 0"),
        ("num_processes", "99999999999", "JAX_NUM_PROCESSES must be from 1 to 65536"),
    ]:
        with pytest.raises(UserError, match=message):
            roll_call.find({"process_id": "1", key: value})
    for devices in ("all", "0,0", ""):
        monkeypatch.setenv("JAX_LOCAL_DEVICE_IDS", devices)
        with pytest.raises(UserError, match="takes different numbers of devices"):
            roll_call.find({"process_id": "1"})


def test_places_under_slurm(monkeypatch):
    """As `srun` says; one task drives one device of its node unless it is told which."""
    for name in (*roll_call.NAMES.values(), "JAX_LOCAL_DEVICE_IDS", "JAX_COORDINATOR_PORT"):
        monkeypatch.delenv(name, raising=False)
    variables = {"JOB_ID": "7", "STEP_NODELIST": "node[003-004]", "NTASKS": "4", "PROCID": "2", "LOCALID": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    place = roll_call.find()
    assert (place.address.partition(":")[0], place.processes, place.process) == ("node003", 4, 2)
    assert place.devices == [1]
    monkeypatch.setenv("JAX_LOCAL_DEVICE_IDS", "4,5,6,7")
    assert roll_call.find().devices == [4, 5, 6, 7]
