"""Run as a program: a clean process that forks workers on a store when asked to, one line of JSON each way.

It has imported what they need and nothing else, so that a worker starts within a millisecond and a thousand of them can
be killed in a minute. `workers.py` is the other end.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import planted_bugs
import storage_cases as cases
from power_loss import small_plan
from seam import SignalAt, watched

from storage.commit.claims import Claims
from storage.commit.records import COMMITS
from storage.errors import DistillError
from storage.faults import ENVIRONMENT_VARIABLE
from storage.files.local import LocalFiles
from storage.tools.gc import collect_garbage


def write(job: dict[str, Any]) -> dict[str, Any]:
    """Write and seal a store as the job says; tell which records this process has made.

    The job: `path`, `shards` and `longest` of the content; `claims` to take turns; `gather` to wait at the start for
    SIGCONT; `signal_at` [n-th call, signal, function or null]; `fault` name:n; `bug` to plant. With `collect`, remove
    the store's garbage instead.
    """
    if job.get("collect"):
        return {"removed": [item.name for item in collect_garbage(job["path"], apply=True)]}
    made: list[str] = []
    create = LocalFiles.create

    def noted(self: LocalFiles, name: str, data: bytes, *, point: str | None = None, durable: bool = True) -> bool:
        created = create(self, name, data, point=point, durable=durable)
        if created and name.startswith(f"{COMMITS}/"):
            made.append(name)
        return created

    LocalFiles.create = noted  # type: ignore[method-assign]
    if job.get("fault"):
        os.environ[ENVIRONMENT_VARIABLE] = job["fault"]
    if job.get("gather"):
        os.kill(os.getpid(), signal.SIGSTOP)
    plan, path = small_plan(job["shards"]), Path(job["path"])
    writer = cases.open_writer(path, plan)
    turns = Claims(path).turns(writer.missing(), writer.is_committed) if job.get("claims") else writer.missing()
    for shard in turns:
        writer.commit(shard, cases.make_batch(plan, shard, longest=job["longest"]))
    return {"digest": writer.seal(), "made": made}


def run(job: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Do a job; its exit code and what it tells."""
    try:
        with planted_bugs.planted(job.get("bug")):
            if job.get("signal_at"):
                number, which, function = job["signal_at"]
                with watched(SignalAt(number, signal.Signals(which), function)):
                    return 0, write(job)
            return 0, write(job)
    except DistillError as error:
        return error.exit_code, {"error": str(error)}
    except Exception:
        return 70, {"error": traceback.format_exc()}


def start(job: dict[str, Any]) -> tuple[int, int]:
    """Fork a worker; its process number, and where its result can be read."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)
    code, told = run(job)
    os.write(writing, json.dumps(told).encode())
    os._exit(code)


def wait(child: int, reading: int, kill_after: float | None) -> dict[str, Any]:
    """Wait until a worker stops or ends; kill it if that takes longer than so many seconds."""
    if kill_after is not None and not select.select([reading], [], [], kill_after)[0]:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, os.WUNTRACED)
    if os.WIFSTOPPED(status):
        return {"status": "stopped"}
    told = os.read(reading, 1 << 20) if os.WIFEXITED(status) else b""
    os.close(reading)
    return {"status": os.waitstatus_to_exitcode(status), "told": json.loads(told or b"{}")}


def main() -> None:
    """Answer requests until there are none."""
    workers: dict[int, int] = {}
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {}
        if request["do"] == "start":
            child, reading = start(request["job"])
            workers[child] = reading
            answer = {"child": child}
        elif request["do"] == "wait":
            answer = wait(request["child"], workers[request["child"]], request["kill_after"])
        elif request["do"] == "signal":
            os.kill(request["child"], request["signal"])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
