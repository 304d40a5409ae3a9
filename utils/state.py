"""Where a run stands: latest.pth, a log that agrees with it, and a lock, so that no two processes write them."""

import dataclasses

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from distillers import with_defaults
from utils import checkpoint, distributed
from utils.config import flatten, yaml_text
from utils.errors import InputError
from utils.log import environment, read_log, write_log

STATE = ["config", "distiller", "optimizers", "scaler", "table", "epoch", "step", "best", "clock"]  # of latest.pth


def lock(path):
    """The file `path`, open and locked until it is closed or this process ends; None where another process has it.

    Not locked where the platform or the file system has no locks. Raises InputError where the disk refuses the file.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "w")
    except OSError as error:
        raise InputError("runs", f"cannot write {path}: {error.strerror}") from None
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the process's own: forked workers do not keep it
    except (BlockingIOError, PermissionError):
        file.close()
        return None
    except OSError:
        pass
    return file


def with_distiller_defaults(settings):
    """Settings as saved; an old file lacks what its distiller had by default."""
    return settings | {"distiller": with_defaults(settings.get("distiller", {}))}


def differences(ours, theirs, ignored):
    """[(key, our value, their value)] in which the settings of two runs differ, but for the keys in `ignored`.

    A setting that one of the two does not know says nothing, but for those of the distiller.
    """
    ours, theirs = (flatten(with_distiller_defaults(settings)) for settings in (ours, theirs))
    keys = ours.keys() & theirs.keys() | {key for key in ours.keys() | theirs.keys() if key.startswith("distiller.")}
    return [(key, ours.get(key), theirs.get(key)) for key in sorted(keys - ignored) if ours.get(key) != theirs.get(key)]


def load_state(cfg, folder, ignored):
    """The content of latest.pth, or None where there is none.

    Raises InputError where the file is corrupt, where its settings differ from cfg in a key (such as "optimizer.lr")
    that both have and that is not in `ignored`, and where there are results but no latest.pth.
    """
    path = folder / "latest.pth"
    if not path.exists():
        if (folder / "student.pth").exists() or read_log(folder / "log.jsonl")[1:]:  # they would be written over
            raise InputError("name", f"{folder} has results but no latest.pth to go on from; give another name=..., "
                             "or move the folder away")
        return None
    try:
        state = checkpoint.load(path, "name")
        missing = [key for key in STATE if key not in state]
        if missing:
            raise KeyError(f"no {missing[0]} in it")
        differing = differences(dataclasses.asdict(cfg), state["config"], ignored)
    except (InputError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise InputError("name", f"{path} is corrupt or unreadable, and was left as it is ({error}); to start "
                         "this run again move the folder away, or give another name=...") from None
    for key, ours, theirs in differing:
        raise InputError(key, f"{ours!r} now, {theirs!r} in {path}; to start another run give another name=..., to go "
                         "on with that one set this back")
    return state


def save_state(cfg, run, folder, table, **where):
    """Write latest.pth with the epoch's `table` so far; `where`: epoch, step, best, clock."""
    distributed.sum_over_processes(table.rows)  # rank 0 keeps the rows of all; the others go on from zeros
    if distributed.is_main():
        checkpoint.save(folder / "latest.pth", where | {
            "config": dataclasses.asdict(cfg), "distiller": run.distiller.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in run.optimizers.items()},
            "scaler": run.scaler.state_dict(), "images": run.images_checksum, "teacher": run.teacher_checksum,
            "table": {"names": table.names, "losses": table.num_losses, "rows": table.rows}})
    else:
        table.clear()


def restore(run, state):
    """Weights, optimizers and scaler of a load_state."""
    run.distiller.load_state_dict(state["distiller"])
    run.scaler.load_state_dict(state["scaler"])
    for name, optimizer in run.optimizers.items():
        optimizer.load_state_dict(state["optimizers"][name])


def open_log(cfg, folder, state, world, device):
    """Write the settings and the log's header, or cut a log that ran ahead of its checkpoint back to it.

    A run that goes on with other hardware, versions or code than it had says so in the header's list "resumed".
    """
    now = environment(device, world)
    lines = (read_log(folder / "log.jsonl", state["epoch"]) if state else []) or [{"run": cfg.name} | now]
    before = dict(lines[0])
    for change in lines[0].get("resumed", []):
        before |= change
    changed = {key: value for key, value in now.items() if key != "command" and before.get(key) != value}
    if changed:
        lines[0].setdefault("resumed", []).append({"after_epoch": lines[-1].get("epoch", 0)} | changed)
    write_log(folder / "log.jsonl", lines)
    checkpoint.write(folder / "config.yaml", yaml_text(cfg))
