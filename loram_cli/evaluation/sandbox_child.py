"""The sandbox's inside: confines its own process, then runs the program. See :mod:`.sandbox`.

Started as a script by ``python -I``, it imports only the standard library. It reads one JSON
object from standard input (``source``, ``token``, ``directory``, ``report_fd``, limits), closes
every door that the kernel lets it close, reports which, runs the source, and writes the token
only when the last line of the source has run.
"""

import ctypes
import json
import os
import platform
import resource
import struct
import sys
from typing import Any

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWNET = 0x20000, 0x8000000, 0x10000000, 0x40000000
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
SYS_MOUNT_SETATTR = 442
SYS_LANDLOCK_CREATE, SYS_LANDLOCK_ADD, SYS_LANDLOCK_RESTRICT = 444, 445, 446
SCRATCH_MIB = 16

# Calls refused with EPERM: new processes and programs, sockets, signals to others, other
# processes' memory, mounts and namespaces, and ways around a filter (io_uring) or a limit (memfd).
# Value: the numbers on x86-64 and on arm64; None where the architecture lacks the call.
REFUSED_CALLS = {
    "clone": (56, 220),
    "fork": (57, None),
    "vfork": (58, None),
    "clone3": (435, 435),
    "execve": (59, 221),
    "execveat": (322, 281),
    "socket": (41, 198),
    "io_uring_setup": (425, 425),
    "kill": (62, 129),
    "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "setsid": (112, 157),
    "setpgid": (109, 154),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "mount_setattr": (442, 442),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "memfd_create": (319, 279),
    "bpf": (321, 280),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "setpriority": (141, 140),
}
# Refused unless the first argument is this process: abort and raise, and its own limits.
OWN_PROCESS_ONLY_CALLS = {"tgkill": (234, 131), "prlimit64": (302, 261)}
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}


def set_limits(timeout_seconds: float, memory_bytes: int) -> None:
    """Lower the process's limits for good (soft and hard)."""
    cpu_seconds = int(timeout_seconds) + 1
    limits = {
        "RLIMIT_CPU": cpu_seconds,
        "RLIMIT_AS": memory_bytes,
        "RLIMIT_FSIZE": SCRATCH_MIB * 2**20,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_NPROC": 0,
        "RLIMIT_CORE": 0,
    }
    for name, limit in limits.items():
        try:
            resource.setrlimit(getattr(resource, name), (limit, limit))
        except (AttributeError, ValueError, OSError):
            continue  # macOS has no working RLIMIT_AS; the wall clock still ends the program.


def enter_namespaces(libc: Any, directory: str) -> tuple[bool, bool]:
    """Leave the network, and see all files but a small scratch disk at ``directory`` read-only.

    Returns:
        Whether there is no network any more, and whether the files are read-only.
    """
    uid, gid = os.geteuid(), os.getegid()
    base = CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWIPC
    if libc.unshare(base | CLONE_NEWNS) != 0:
        return libc.unshare(base) == 0, False
    for path, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{uid} {uid} 1"),
        ("gid_map", f"{gid} {gid} 1"),
    ):
        try:
            with open(f"/proc/self/{path}", "w") as file:  # noqa: PTH123 - keep start-up short
                file.write(text)
        except OSError:
            return True, False
    here = directory.encode()
    private_recursive, no_suid_no_dev = 0x40000 | 0x4000, 0x2 | 0x4
    read_only = struct.pack("<QQQQ", 1, 0, 0, 0)
    writable = struct.pack("<QQQQ", 0, 1, 0, 0)
    options = f"size={SCRATCH_MIB}m,nr_inodes=4096,mode=700".encode()
    done = (
        libc.mount(None, b"/", None, private_recursive, None) == 0
        and libc.mount(b"tmpfs", here, b"tmpfs", no_suid_no_dev, options) == 0
        and libc.syscall(SYS_MOUNT_SETATTR, -100, b"/", 0x8000, read_only, 32) == 0
        and libc.syscall(SYS_MOUNT_SETATTR, -100, here, 0, writable, 32) == 0
    )
    return True, done


def restrict_writes(libc: Any, directory: str) -> bool:
    """Landlock: write, create and delete only below ``directory``, execute nothing."""
    abi = libc.syscall(SYS_LANDLOCK_CREATE, None, 0, 1)
    if abi < 1:
        return False
    # Bits: execute 0, write 1, remove and make 4..12, refer 13 (ABI 2), truncate 14 (ABI 3).
    last_bit = 12 + (abi >= 2) + (abi >= 3)
    writes = 0b10 | sum(1 << bit for bit in range(4, last_bit + 1))
    attributes = struct.pack("<Q", writes | 1)
    if abi >= 4:
        attributes += struct.pack("<Q", 0b11)  # bind and connect TCP
    if abi >= 6:
        attributes += struct.pack("<Q", 0b11)  # abstract sockets, signals to other processes
    ruleset = libc.syscall(SYS_LANDLOCK_CREATE, attributes, len(attributes), 0)
    if ruleset < 0:
        return False
    for path, rights in ((directory, writes), ("/dev/null", 0b10)):
        # O_PATH: a name, not an open file.
        beneath = os.open(path, getattr(os, "O_PATH", 0))
        rule = struct.pack("<Qi", rights, beneath)
        added = libc.syscall(SYS_LANDLOCK_ADD, ruleset, 1, rule, 0)
        os.close(beneath)
        if added != 0:
            return False
    restricted = libc.syscall(SYS_LANDLOCK_RESTRICT, ruleset, 0) == 0
    os.close(ruleset)
    return restricted


def filter_calls(libc: Any) -> bool:
    """Seccomp: refuse the calls named above from here on."""
    architecture = ARCHITECTURES.get(platform.machine())
    if architecture is None:
        return False
    column, audit_arch = architecture

    def step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("<HBBI", code, if_true, if_false, value)

    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06
    allow, refuse, kill = step(give, 0x7FFF0000), step(give, 0x00050001), step(give, 0x80000000)
    # struct seccomp_data: call number at 0, architecture at 4, first argument's low half at 16.
    program = [step(load, 4), step(equal, audit_arch, 1, 0), kill, step(load, 0)]
    if column == 0:
        program += [step(at_least, 0x40000000, 0, 1), refuse]  # the x32 table
    for numbers in REFUSED_CALLS.values():
        number = numbers[column]
        if number is not None:
            program += [step(equal, number, 0, 1), refuse]
    for own in OWN_PROCESS_ONLY_CALLS.values():
        program += [
            step(equal, own[column], 0, 5),
            step(load, 16),
            step(equal, os.getpid(), 2, 0),
            step(equal, 0, 1, 0),
            refuse,
            step(load, 0),
        ]
    program.append(allow)
    code = ctypes.create_string_buffer(b"".join(program))
    header = struct.pack("@HP", len(program), ctypes.addressof(code))
    return libc.prctl(PR_SET_SECCOMP, 2, header, 0, 0) == 0


def guard_in_python(directory: str) -> None:
    """Where the kernel offers nothing: an audit hook, which stops accidents only."""
    inside = os.path.realpath(directory) + os.sep
    refused = (
        "socket.", "subprocess.", "os.fork", "os.exec", "os.posix_spawn", "os.kill", "os.system",
        "pty.", "ctypes.dlopen", "os.setxattr",
    )  # fmt: skip
    changes = (
        "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate",
        "os.chmod", "os.chown", "shutil.rmtree",
    )  # fmt: skip

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(refused):
            raise PermissionError(f"refused in the sandbox: {event}")
        if event == "open":
            path, _, flags = arguments
            writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
            paths = [path] if writes and not isinstance(path, int) else []
        else:
            paths = [value for value in arguments if isinstance(value, str | bytes)]
            paths = paths if event in changes else []
        for path in paths:
            where = os.path.realpath(os.fsdecode(path))
            if where != os.devnull and not where.startswith(inside):
                raise PermissionError(f"refused in the sandbox: {event} {where}")

    sys.addaudithook(hook)


def drop_root() -> bool:
    """Become an ordinary user, where the interpreter's own library stays readable to one."""
    nobody = 65534
    os.setgroups([])
    os.setegid(nobody)
    os.seteuid(nobody)
    if not os.access(os.__file__, os.R_OK, effective_ids=True):
        os.seteuid(0)
        os.setegid(0)
        return False
    os.seteuid(0)
    os.setresgid(nobody, nobody, nobody)
    os.setresuid(nobody, nobody, nobody)
    return True


def confine(directory: str, timeout_seconds: float, memory_bytes: int) -> dict[str, str]:
    """Close every door that can be closed; say which mechanism holds network and files."""
    network, files = "refused in Python", "refused in Python"
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(PR_SET_PDEATHSIG, 9, 0, 0, 0)
        offline, read_only = enter_namespaces(libc, directory)
        os.chdir(directory)
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        landlocked = restrict_writes(libc, directory)
        if not read_only and not landlocked and os.geteuid() == 0 and not drop_root():
            raise PermissionError("root's files cannot be protected here: run as an ordinary user")
        no_capabilities = struct.pack("<IIIIII", 0, 0, 0, 0, 0, 0)
        libc.capset(struct.pack("<Ii", 0x20080522, 0), no_capabilities)
        libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
        set_limits(timeout_seconds, memory_bytes)
        filtered = filter_calls(libc)
        network = "namespace" if offline else "seccomp" if filtered else network
        files = "read-only mounts" if read_only else "landlock" if landlocked else files
    else:
        set_limits(timeout_seconds, memory_bytes)
        filtered = False
    if not filtered or files == "refused in Python":
        guard_in_python(directory)
    return {"network": network, "files": files}


def main() -> None:
    """Read the order, confine, run, report."""
    order = json.load(sys.stdin)
    report_fd, token = order["report_fd"], order["token"]
    held = confine(order["directory"], order["timeout_seconds"], order["memory_bytes"])
    os.write(report_fd, json.dumps(held).encode() + b"\n")
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    sys.stdin = os.fdopen(0)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    # Bound here: the program may replace what the modules hold.
    write, leave, run = os.write, os._exit, exec
    try:
        run(compile(order["source"], "<program>", "exec"), {"__name__": "__main__"})
    except BaseException as error:
        write(report_fd, b"error " + describe(error))
        leave(1)
    else:
        write(report_fd, b"passed " + token.encode())
        leave(0)


def describe(error: BaseException) -> bytes:
    """Kind and text of what ended the program; its text is the program's own code."""
    try:
        name = type(error).__name__
        text = str(error)
        return (f"{name}: {text}" if text else name).encode(errors="replace")[:1000]
    except BaseException:
        return b"an exception that cannot be shown"


if __name__ == "__main__":
    main()
