"""Names of checkpoints on the wire: a bare name, a whole path, or that of another trainer job. Pure."""

from __future__ import annotations

__all__ = ("cross_job_path", "is_path", "split_cross_job")

_CROSS_JOB = "cross_job://"


def is_path(name: str) -> bool:
    """Whether it is a whole path (`gs://…`, `tinker://…`, `cross_job://…`, `/…`) and not the name of a checkpoint."""
    return name.startswith("/") or "://" in name


def cross_job_path(job_id: str, name: str) -> str:
    """The path of a checkpoint of any trainer job of the account."""
    return f"{_CROSS_JOB}{job_id}/{name}"


def split_cross_job(path: str) -> tuple[str, str] | None:
    """Trainer job and name of such a path; `None` if it is another one."""
    if not path.startswith(_CROSS_JOB):
        return None
    job_id, _, name = path.removeprefix(_CROSS_JOB).partition("/")
    return job_id, name
