# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Completes an export: report, manifest, verification, and then its name."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nemo_ptq.checkpoint.staging import Staging, publish
from nemo_ptq.console.reporter import Reporter
from nemo_ptq.errors import RecoveryError, VerificationError
from nemo_ptq.export.manifest_writer import write_manifest
from nemo_ptq.export.rounded_weights import place
from nemo_ptq.job import Job
from nemo_ptq.quantization.state import CalibrationState, save_state
from nemo_ptq.quantization.state_header import WEIGHTS_IN_EXPORT, weights_file
from nemo_ptq.report.compose import conclude
from nemo_ptq.report.records import Report
from nemo_ptq.report.write import write_report
from nemo_ptq.verify.checks import verify
from nemo_ptq.versions import producer

# A judgement of what weights usually are: worth a warning, no reason to throw a calibration away.
_DOUBTS = ("ranges",)

# Checksums of files that have been read already, by relative path.
Checksums = Mapping[str, str]


def finish(
    job: Job,
    staging: Staging,
    checksums: Mapping[str, Checksums],
    report_of: Callable[[str, Path, Checksums], Report],
    reporter: Reporter,
) -> Report:
    """Completes the directories of a job's formats where they were staged, verifies them, and gives them their name.

    Args:
        job: The job.
        staging: The job's staging directory.
        checksums: Known checksums, by format.
        report_of: Returns the report of one format, given its directory, which is complete but for report and manifest.
        reporter: Told of the verification.

    Returns:
        The report of the first format: what was measured is the same for all.

    Raises:
        VerificationError: If the files do not pass verification.
        RecoveryError: If the recovery is below the user's limit, and the model is not to be kept.
        PtqError: If the output has been changed by somebody else.
    """
    reports = []
    for name, directory in job.directories(staging.files).items():
        reports.append(report_of(name, directory, checksums[name]))
        write_report(directory, reports[-1])
        write_manifest(directory, checksums[name], _about(name, job))
        _verify(directory, reporter)
    if not job.export.keep_failed and (shortfall := _shortfall(job, reports[0])):
        raise RecoveryError(
            f"{shortfall}: {job.output} was not made; export_config.keep_failed=true makes it all the same"
        )
    publish(staging)
    return reports[0]


def say_conclusion(job: Job, report: Report | None, reporter: Reporter) -> None:
    """Prints the verdict of a job's report.

    Args:
        job: The job.
        report: The job's report; None on all ranks but the first.
        reporter: Prints it.

    Raises:
        RecoveryError: If the recovery is below the user's limit; the directory is kept.
    """
    if report is None:
        return
    reporter.say(f"{job.output} is ready")
    line, is_bad = conclude(report)
    reporter.judge(line, is_bad)
    if shortfall := _shortfall(job, report):
        raise RecoveryError(f"{shortfall}: {job.output} is kept, as export_config.keep_failed=true says")


def _shortfall(job: Job, report: Report) -> str | None:
    """Returns why a model misses the recovery that the user requires; None if it does not."""
    if job.export.min_recovery is None or report.summary.passed:
        return None
    if report.summary.recovery is None:
        why = report.missing.get("quality", "no text was compared on")
        return f"export_config.min_recovery={job.export.min_recovery} was not measured: {why}"
    return f"export_config.min_recovery={job.export.min_recovery}: {conclude(report)[0]}"


def _about(name: str, job: Job) -> dict[str, Any]:
    """Entries of the manifest other than the files."""
    return {"format": name, "producer": producer(), "arguments": job.arguments}


def _verify(directory: Path, reporter: Reporter) -> None:
    checks = verify(directory, checksums=False)
    failed = [check for check in checks if not check.ok]
    doubts = [check for check in failed if check.name in _DOUBTS]
    for check in doubts:
        reporter.warn(f"verify: {check.name}: {check.detail}")
    if len(failed) > len(doubts):
        reasons = "\n".join(f"{check.name}: {check.detail}" for check in failed if check not in doubts)
        raise VerificationError(f"the export does not pass its own verification, and was removed:\n{reasons}")
    reporter.say(f"verify: {len(checks) - len(failed)} checks passed")


@contextmanager
def calibration_kept(job: Job, state: CalibrationState | None, export: Path, reporter: Reporter) -> Iterator[None]:
    """Keeps a fresh calibration in a file beside the output until the ``with`` block ends without an error.

    The file is named ``OUT.calibration.safetensors``, with rounded weights in another one beside it. A process that is
    killed leaves them as well.

    Args:
        job: The job.
        state: The calibration; None if nothing is quantized. One without entries is not kept.
        export: The directory of one of the job's formats, which holds the rounded weights.
        reporter: Told where it is kept. Only the first rank keeps it.
    """
    if not reporter.enabled or state is None or not state.tensors or job.calibration_state is not None:
        yield
        return
    kept = job.output.with_name(f"{job.output.name}.calibration.safetensors")
    try:
        save_state(kept, state)
        if job.quantization.is_balanced:
            place(export / WEIGHTS_IN_EXPORT, weights_file(kept))
    except OSError as error:
        reporter.warn(f"the calibration cannot be kept in {kept}: {error.strerror}")
    try:
        yield
    except BaseException:
        if kept.exists():
            reporter.warn(
                f"the calibration is kept in {kept}: `nemo-ptq export {kept} {job.output}` exports it without "
                f"calibrating again, and so does calibration_state={kept} on several ranks"
            )
        raise
    kept.unlink(missing_ok=True)
    weights_file(kept).unlink(missing_ok=True)
