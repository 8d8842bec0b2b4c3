"""Tables of many models: a row measured in a process of its own, kept in one JSON file, and said where."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any


def run_apart(module: str, arguments: Sequence[str], limit: float) -> dict[str, Any]:
    """What ``python -m MODULE ARGUMENTS`` prints as its last line, one JSON object; or why it was "aborted".

    Args:
        module: whose main prints it.
        arguments: of the command line.
        limit: seconds after which it is ended.
    """
    command = [sys.executable, "-m", module, *arguments]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"aborted": f"not done after {limit / 60:.0f} minutes"}
    lines = run.stdout.strip().splitlines()
    if run.returncode or not lines:
        last = (run.stderr.strip().splitlines() or ["no output"])[-1]
        return {"aborted": f"exit code {run.returncode}: {last[:200]}"}
    return json.loads(lines[-1])


def run_forked(
    jobs: Mapping[str, Callable[[], dict[str, Any]]], workers: int, limit: float
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run each job in a fork of this process, and give its name and result as they end; or why one was "aborted".

    A fork has what is imported here and leaves nothing behind.

    Args:
        jobs: what to run, by name.
        workers: how many at once.
        limit: seconds after which one is ended.
    """
    context, waiting, running = multiprocessing.get_context("fork"), list(jobs), {}

    def run(job: Callable[[], dict[str, Any]], sender: Connection) -> None:
        sender.send(job())

    try:
        while waiting or running:
            while waiting and len(running) < workers:
                name = waiting.pop(0)
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=run, args=(jobs[name], sender), daemon=True)
                process.start()
                sender.close()
                running[receiver] = name, process, time.monotonic() + limit
            soonest = min(end for _, _, end in running.values()) - time.monotonic()
            ended = wait(list(running), timeout=max(0.0, soonest))
            for receiver, (name, process, end) in list(running.items()):
                if receiver not in ended and time.monotonic() < end:
                    continue
                del running[receiver]
                if receiver in ended:
                    try:
                        result = receiver.recv()
                    except EOFError:
                        process.join()
                        result = {"aborted": f"exit code {process.exitcode}"}
                else:
                    result = {"aborted": f"not done after {limit:.0f} seconds"}
                process.kill()
                process.join()
                yield name, result
    finally:
        for _, process, _ in running.values():
            process.kill()


def stored_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that :func:`page` wrote; none where there is no file."""
    return json.loads(path.read_text())["models"] if path.exists() else []


def page(rows: Sequence[dict[str, Any]]) -> str:
    """The results as JSON, a model a line."""
    models = ",\n".join(json.dumps(row) for row in rows)
    return f'{{"models": [\n{models}\n]}}\n'


def where_measured(what: str, measured: Sequence[dict[str, Any]]) -> list[str]:
    """One line for each machine, the models named of all but the one that most were measured on."""
    by_machine: dict[str, list[str]] = {}
    for one in measured:
        by_machine.setdefault(one["machine"], []).append(one["model"])
    most, *others = sorted(by_machine.items(), key=lambda item: len(item[1]), reverse=True) or [("", [])]
    lines = [f"- {what} on {most[0]}: {'all others' if others else 'all'}."] if most[1] else []
    return lines + [f"- {what} on {where}: {', '.join(f'`{name}`' for name in names)}." for where, names in others]


def one_line(error: BaseException, length: int = 240) -> str:
    """The first line of an error's message; its class where there is none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:length]
