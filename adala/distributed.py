"""Ranks, devices and the few collectives that the project needs; one process without a launcher is a world of one."""

import datetime
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from adala.resident import resident_mib

Result = TypeVar("Result")

# How long ranks wait for what rank 0 does by itself: a head is fitted, models are scored. A rank 0 that has died is
# noticed at once, by its connection.
RANK_0_WORKS = datetime.timedelta(days=1)
_waiting_for_rank_0: dist.ProcessGroup | None = None
_timeout: datetime.timedelta | None = None

SHARED_MEMORY = Path("/dev/shm")
# DeepSpeed's CPU all-reduce creates one such file of 66 MB for each rank and never removes it.
ALLREDUCE_BUFFERS = "deepspeed_allreduce_buffer_*"
# A file so young may belong to a process that has created it and not yet mapped it.
YOUNG_S = 60
CLOSING_S = 0.1
# Where programs that start processes, and know nothing of torch, say how many there are, and which one this is.
STARTED_BY = {
    "SLURM_STEP_NUM_TASKS": "SLURM_PROCID",
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",
    "PMI_SIZE": "PMI_RANK",
    "MV2_COMM_WORLD_SIZE": "MV2_COMM_WORLD_RANK",
    "JSM_NAMESPACE_SIZE": "JSM_NAMESPACE_RANK",
    "FLUX_JOB_SIZE": "FLUX_TASK_RANK",
}


def init_distributed(timeout_minutes: float = 30.0) -> None:
    """Joins the process group that the launcher describes in the environment (RANK, WORLD_SIZE, MASTER_ADDR, ...).

    NCCL where GPUs are used, gloo on CPUs, where each local rank also gets its share of the cores as threads: two
    ranks that each start a thread per core slow each other down several times. OMP_NUM_THREADS overrides that.

    Raises:
        ValueError: The environment is not a launcher's, there are more ranks on this machine than GPUs, or the ranks do
            not come together.
    """
    if dist.is_initialized():
        return
    if "RANK" in os.environ:
        _check_launched()
    else:
        _check_alone()
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=_free_port())
    if uses_gpu():
        if local_rank() >= torch.cuda.device_count():
            raise ValueError(
                f"{local_world_size()} ranks on this machine, which has {torch.cuda.device_count()} GPUs: start as "
                "many ranks as GPUs (--num_gpus), or set DS_ACCELERATOR=cpu to train on the CPU"
            )
        torch.cuda.set_device(local_rank())
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, _available_cores() // local_world_size()))
    if local_rank() == 0:
        remove_orphaned_buffers()
    _meet("nccl" if uses_gpu() else "gloo", timeout_minutes)


def _meet(backend: str, timeout_minutes: float) -> None:
    global _waiting_for_rank_0, _timeout
    timeout = datetime.timedelta(minutes=timeout_minutes)
    try:
        dist.init_process_group(backend, timeout=timeout)
    except RuntimeError as error:
        raise ValueError(_meeting_failure(error, timeout_minutes)) from error
    # Not before: what this process, or one forked from it, joins after a meeting that failed has a time-out of its own.
    _timeout = timeout
    # Of its own, on the CPU: NCCL ends a process that waits longer than the collectives of a step may take.
    _waiting_for_rank_0 = dist.new_group(backend="gloo", timeout=RANK_0_WORKS)


def set_timeouts() -> None:
    """Gives groups that others have made since the time-out of :func:`init_distributed`: what they name none for gets
    NCCL's own, which is shorter."""
    if _timeout is None:
        return
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
    for group in dist.distributed_c10d._world.pg_map:
        if group is not _waiting_for_rank_0:
            set_timeout(_timeout, group)


def _check_alone() -> None:
    """Refuses to be one of several processes that do not know of each other.

    Raises:
        SharedError: Something says that there are several.
    """
    for variable in (*STARTED_BY, "WORLD_SIZE"):
        count = os.environ.get(variable, "")
        if count.isdecimal() and int(count) > 1:
            raise SharedError(
                f"{count} processes were started ({variable}), and none was told its rank (RANK), so that each would "
                "train the whole run: start one process a machine that starts the ranks, deepspeed or torchrun "
                "(under Slurm: sbatch launchers/slurm/stage1.sbatch)"
            )


def _check_launched() -> None:
    """Refuses half a launcher's environment.

    Raises:
        ValueError: A variable is missing, or is not what it must be.
    """
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if not os.environ.get(name)]
    if missing:
        raise ValueError(
            f"RANK is {os.environ['RANK']!r}, and {', '.join(missing)} not set: start through deepspeed or torchrun, "
            f"which set {', '.join(names)} and LOCAL_RANK, or unset RANK to train in one process"
        )
    world_size = os.environ["WORLD_SIZE"]
    limits = {"WORLD_SIZE": 2**31, "RANK": 2**31, "LOCAL_RANK": 2**31, "MASTER_PORT": 65536}
    if world_size.isdecimal():
        limits |= {"RANK": int(world_size), "LOCAL_RANK": int(world_size)}
    for name, limit in limits.items():
        value = os.environ.get(name, "0")
        least = 1 if name in ("WORLD_SIZE", "MASTER_PORT") else 0
        if not value.isdecimal() or not least <= int(value) < limit:
            raise ValueError(
                f"{name} is {value!r} in the environment: it must be a whole number, {least} or more and below {limit} "
                f"(WORLD_SIZE is {world_size!r})"
            )


def _meeting_failure(error: RuntimeError, timeout_minutes: float) -> str:
    port = os.environ["MASTER_PORT"]
    if "EADDRINUSE" in str(error):
        return (
            f"port {port} of this machine, at which the ranks meet, is in use by another program: give the launcher "
            "another one (deepspeed --master_port N, torchrun --master_port N)"
        )
    return (
        f"the {os.environ['WORLD_SIZE']} ranks did not all meet at {os.environ['MASTER_ADDR']}, port {port}, within "
        f"{timeout_minutes:g} minutes: look whether all were started, what those say that are missing, and whether "
        f"their machines reach that address ({first_line(error)})"
    )


def uses_gpu() -> bool:
    """Whether ranks compute on GPUs: where there are any, unless DeepSpeed's own switch DS_ACCELERATOR says ``cpu``."""
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"


def unlink_allreduce_buffers() -> None:
    """Takes the names off the buffers of this run that all ranks have mapped; every rank calls it.

    Nameless, they vanish with the last process that maps them, however it ends.
    """
    barrier()
    prefix = ALLREDUCE_BUFFERS.rstrip("*")
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    (SHARED_MEMORY / f"{prefix}{os.getuid()}_{address}_{port}_{rank()}").unlink(missing_ok=True)


def remove_orphaned_buffers() -> None:
    """Removes the buffers of this user that runs left which were killed before their names were taken off."""
    found = [path for path in SHARED_MEMORY.glob(ALLREDUCE_BUFFERS) if _is_old_and_ours(path)]
    if not found:
        return
    mapped = "".join(_memory_map(process) for process in Path("/proc").glob("[0-9]*"))
    for path in found:
        if str(path) not in mapped:
            path.unlink(missing_ok=True)


def _is_old_and_ours(path: Path) -> bool:
    try:
        status = path.stat()
    except FileNotFoundError:
        return False
    return status.st_uid == os.getuid() and time.time() - status.st_mtime > YOUNG_S


def _memory_map(process: Path) -> str:
    try:
        return (process / "maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        # Ended meanwhile, or another user's, which cannot map this user's buffers.
        return ""


def close_distributed() -> None:
    """Leaves the process group, in such a way that the process can end."""
    global _waiting_for_rank_0, _timeout
    if dist.is_initialized():
        dist.destroy_process_group()
        _waiting_for_rank_0 = _timeout = None
        # gloo's threads let go of the last collective's tensors only when they get the interpreter's lock; one that
        # still waits for it as the interpreter shuts down aborts the process, which then fails although all is done.
        time.sleep(CLOSING_S)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def local_world_size() -> int:
    """Ranks on this node: the DeepSpeed launcher says LOCAL_SIZE, torchrun LOCAL_WORLD_SIZE."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", 1)))


def device() -> torch.device:
    """This rank's GPU, or the CPU."""
    return torch.device("cuda", local_rank()) if uses_gpu() else torch.device("cpu")


def peak_memory_mib() -> float:
    """Highest memory of this rank so far, in MiB: what PyTorch allocated on its GPU, or the process's resident set."""
    if uses_gpu():
        return torch.cuda.max_memory_allocated() / 2**20
    return resident_mib("VmHWM")


def say(message: str) -> None:
    """Prints a line on rank 0."""
    if rank() == 0:
        print(message, flush=True)


# Whether rank 0 is alone with what it does.
_on_one_rank = False


def _check_collective() -> None:
    """What all ranks do together must not be asked of one, which would wait for ever. Told on a single rank, too."""
    assert not _on_one_rank, "a collective within from_rank_0"


def barrier() -> None:
    _check_collective()
    if dist.is_initialized():
        # NCCL would guess the GPU by the global rank.
        dist.barrier(device_ids=[local_rank()] if uses_gpu() else None)


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of ``tensor`` over ranks, in place."""
    _check_collective()
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def any_rank(flag: bool) -> bool:
    """Whether ``flag`` holds on at least one rank; every rank gets the same answer."""
    value = torch.tensor([float(flag)], device=device())
    return bool(all_reduce_sum(value).item() > 0)


def gather_objects(value: object, group: dist.ProcessGroup | None = None) -> list:
    """``value`` of every rank, in rank order, on every rank; ``group`` holds all of them."""
    _check_collective()
    if world_size() == 1:
        return [value]
    gathered = [None] * world_size()
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def broadcast_object(value: object) -> object:
    """Rank 0's ``value`` on every rank."""
    _check_collective()
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


class Interrupted(Exception):
    """What ends a command on all ranks without being a mistake."""


class SharedError(ValueError):
    """A mistake that every rank raises alike, so that one of them can tell it for all."""


def raise_together(error: Exception | None, group: dist.ProcessGroup | None = None) -> None:
    """Raises on every rank when at least one has an ``error``, so that none waits for a rank that is gone.

    Args:
        error: This rank's, or None.
        group: By which ranks tell each other; it holds all of them.

    Raises:
        SharedError: With the message of the first rank that has an error.
        Interrupted: With that of the first that was interrupted, where none has another error.
    """
    told = gather_objects(None if error is None else (isinstance(error, Interrupted), str(error)), group)
    told = sorted((each for each in told if each is not None), key=lambda each: each[0])
    if told:
        is_interrupted, message = told[0]
        raise (Interrupted if is_interrupted else SharedError)(message) from error


def from_rank_0(action: Callable[[], Result]) -> Result:
    """What ``action`` returns on rank 0, which alone carries it out; every rank calls this and gets it.

    One rank looks and decides, so that no two can come to different answers.

    Raises:
        SharedError: The action raised a ValueError or an OSError.
        Interrupted: It raised this.
    """
    global _on_one_rank
    _check_collective()
    result, error = None, None
    if rank() == 0:
        _on_one_rank = True
        try:
            result = action()
        except (ValueError, OSError, Interrupted) as raised:
            error = raised
        finally:
            _on_one_rank = False
    raise_together(error, _waiting_for_rank_0)
    return broadcast_object(result)


def first_line(error: BaseException) -> str:
    """What a long message of torch's begins with, where what follows is for those who debug torch."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


def _available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
