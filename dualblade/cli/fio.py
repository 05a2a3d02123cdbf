"""dualblade-fio: measure a file or drive as fio does, through dualblade's own Device and stores."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from dualblade.cli import fio_report
from dualblade.cli.fio_jobs import Job, Result
from dualblade.cli.fio_options import Options, parse
from dualblade.cli.fio_progress import Progress
from dualblade.cli.fio_target import UsageError, open_device, prepare
from dualblade.cli.fio_verify import WrongDataError
from dualblade.cli.messages import for_fio
from dualblade.errors import DualbladeError


def main(arguments: Sequence[str] | None = None) -> int:
    """The command's entry point; returns its exit status."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        with ExitStack() as stack:
            output = _output(options, stack)
            if options.memory_limit is not None:
                from dualblade.cli.memory_cgroup import least_bytes, limited

                if options.memory_limit < (least := least_bytes()):
                    raise UsageError(
                        f"--memory-limit {options.memory_limit} is less than this process needs: "
                        f"give {least >> 20}m or more"
                    )
                stack.enter_context(limited(options.memory_limit))
            status, report = _measure(options)
            output.write(report)
            output.flush()
            return status
    except UsageError as error:
        return _fail(error, 2)
    except (DualbladeError, WrongDataError, MemoryError, OSError, ValueError) as error:
        return _fail(for_fio(error), 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 1)


def _fail(what: object, status: int) -> int:
    print(f"dualblade-fio: {what}", file=sys.stderr)
    return status


def _output(options: Options, stack: ExitStack) -> Any:
    """Opened first: a path that can't be written is said before anything is measured."""
    if options.output is None:
        return sys.stdout
    if os.path.exists(options.filename) and os.path.exists(options.output):
        if os.path.samefile(options.filename, options.output):
            raise UsageError(f"--output and --filename are both {options.output}")
    elif os.path.abspath(options.filename) == os.path.abspath(options.output):
        raise UsageError(f"--output and --filename are both {options.output}")
    return stack.enter_context(open(options.output, "w", encoding="utf-8"))


def _measure(options: Options) -> tuple[int, str]:
    """Exit status and report."""
    if options.workload is not None:
        from dualblade.cli.kv_workload import measure

        return measure(options)
    if options.compare:
        from dualblade.cli.fio_compare import measure

        return measure(options)
    save_plot = _plotter(options)
    result = run_job(options)
    if save_plot is not None:
        save_plot(options, result)
    if options.output_format == "normal":
        return int(result.interrupted), fio_report.text(options, result)
    described = fio_report.job(options, result)
    whole = fio_report.document(options, [described], result.started_unix)
    return int(result.interrupted), json.dumps(whole, indent=2) + "\n"


def _plotter(options: Options) -> Any:
    """The function that draws, looked for before the run rather than after it."""
    if options.plot is None:
        return None
    from dualblade.cli.fio_plot import plotter

    return plotter(options.plot)


def run_job(options: Options, title: str | None = None) -> Result:
    """Makes the target ready and runs the job once."""
    region = prepare(options)
    with open_device(options, region) as device, Progress() as progress:

        def report(job: Job, elapsed_s: float) -> None:
            progress.moved(title or options.name, elapsed_s, job.moved_bytes())

        return Job(options, region, device).run(report)


if __name__ == "__main__":
    sys.exit(main())
