import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loram_cli.evaluation import sandbox
from loram_cli.evaluation.sandbox import run_program
from loram_cli.units import MIB

linux = pytest.mark.skipif(sys.platform != "linux", reason="kernel confinement is Linux's")


def run(source, timeout_seconds=5.0):
    return run_program(source, timeout_seconds=timeout_seconds, memory_bytes=256 * MIB)


def test_program_that_reaches_its_end_passes():
    result = run("assert sorted([3, 1]) == [1, 3]")
    assert (result.status, result.detail) == ("passed", "")


@pytest.mark.parametrize(
    ("source", "detail"),
    [
        ("assert 1 == 2, 'wrong sum'", "AssertionError: wrong sum"),
        ("def f(:", "SyntaxError"),
        ("import sys; sys.exit(0)\nassert False", "SystemExit: 0"),
        ("raise SystemExit\nassert False", "SystemExit"),
        ("import os; os._exit(0)\nassert False", "exited with status 0 before the tests"),
        ("def f(): return f()\nf()", "RecursionError"),
        ("import ctypes; ctypes.string_at(0)", "SIGSEGV"),
        ("class E(Exception):\n def __str__(self): raise E\nraise E", "cannot be shown"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("import os; os.closerange(0, 64)\nassert False", "exited"),
    ],
)
def test_failures_are_named(source, detail):
    result = run(source)
    assert result.status == "failed"
    assert detail in result.detail


@pytest.mark.parametrize(
    "source",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "while True: print('x' * 10000, flush=True)",
        "import sys\nwhile True: sys.stderr.write('x' * 10000)",
        # Every signal that a program may ignore, ignored.
        "import signal\nfor s in set(signal.Signals) - {9, 19}: signal.signal(s, signal.SIG_IGN)\n"
        "while True: pass",
        "import os\nwhile True:\n try: os.write(3, b'passed ')\n except OSError: pass\n",
    ],
)
def test_endless_programs_are_killed_in_time(source):
    start = time.monotonic()
    result = run(source, timeout_seconds=0.7)
    assert result.status == "timed_out"
    assert time.monotonic() - start < 4


@linux
def test_fork_bomb_and_children_leave_nothing_behind():
    nap = f"60.{os.getpid()}"
    for source in (
        "import os\nwhile True: os.fork()",
        "import os\ntry: os.fork()\nexcept OSError: pass\nwhile True: os.fork()",
        "import threading\nwhile True: threading.Thread(target=lambda: None).start()",
        "import subprocess; subprocess.Popen(['sleep', 'NAP'])",
        "import os; os.posix_spawn('/bin/sleep', ['sleep', 'NAP'], {})",
        "import os; os.execv('/bin/sleep', ['sleep', 'NAP'])",
        "import os; os.setsid()",
        "import multiprocessing; multiprocessing.Process(target=print).start()",
    ):
        assert run(source.replace("NAP", nap)).status == "failed", source
    assert _processes(str(sandbox._CHILD)) == []
    assert _processes(nap) == []


def _processes(marker):
    """Command lines of all processes that hold the marker."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue  # it has ended meanwhile
            found += [line] if marker in line else []
    return found


@linux
def test_memory_bomb_meets_the_limit():
    result = run("x = []\nwhile True: x.append(bytearray(10**7))", timeout_seconds=20)
    assert result.status == "failed"
    assert "MemoryError" in result.detail


@linux
@pytest.mark.parametrize(
    "source",
    [
        "import os, signal; os.kill(os.getppid(), signal.SIGTERM)",
        "import os, signal; os.kill(-1, signal.SIGTERM)",
        "import os, signal; os.killpg(0, signal.SIGTERM)",
        "import os, signal; signal.pidfd_send_signal(os.pidfd_open(os.getppid()), signal.SIGTERM)",
        "import os, resource; resource.prlimit(os.getppid(), resource.RLIMIT_CORE, (0, 0))",
    ],
)
def test_no_signal_and_no_limit_reaches_the_caller(source):
    received = []
    old = signal.signal(signal.SIGTERM, lambda *_: received.append(1))
    try:
        result = run(source)
        time.sleep(0.05)
    finally:
        signal.signal(signal.SIGTERM, old)
    assert result.status == "failed"
    assert "PermissionError" in result.detail
    assert received == []


@linux
@pytest.mark.parametrize(
    "action",
    [
        "os.remove(path)",
        "os.truncate(path, 0)",
        "open(path, 'w')",
        "open(path, 'a').write('more')",
        "os.rename(path, 'mine')",
        "os.symlink('/', path + '.link')",
        "os.mkdir(path + '.d')",
        "os.chmod(path, 0)",
        "os.link(path, 'mine')",
        "open(path + '.new', 'w')",
        "shutil.rmtree(os.path.dirname(path))",
        "os.utime(path, (0, 0))",
    ],
)
def test_files_outside_stay_as_they_are(tmp_path, action):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    before = victim.stat()
    result = run(f"import os, shutil\npath = {str(victim)!r}\n{action}")
    assert result.status == "failed", result
    assert victim.read_text() == "precious"
    after = victim.stat()
    assert (after.st_mode, after.st_mtime) == (before.st_mode, before.st_mtime)
    assert [entry.name for entry in tmp_path.iterdir()] == ["victim"]


@linux
def test_disk_use_is_bounded_and_own_directory_is_empty_then_gone(tmp_path):
    assert run("import os; assert os.listdir('.') == []").status == "passed"
    assert run("open('a', 'w').write('hi'); assert open('a').read() == 'hi'").status == "passed"
    assert "File too large" in run("open('a', 'wb').write(b'0' * 10**8)").detail
    result = run("import os; raise ValueError(os.getcwd())")
    assert not Path(result.detail.removeprefix("ValueError: ")).exists()


@linux
@pytest.mark.parametrize(
    "source",
    [
        "import socket; socket.socket()",
        "import socket; socket.socket(socket.AF_UNIX)",
        "import urllib.request; urllib.request.urlopen('http://127.0.0.1:1', timeout=1)",
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nassert libc.socket(2, 1, 0) >= 0",
    ],
)
def test_no_network(source):
    result = run(source)
    assert result.status == "failed"
    assert result.network in ("namespace", "seccomp")


def test_environment_is_scrubbed(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("PYTHONSTARTUP", "x")
    result = run("import os; assert 'hf_secret' not in str(os.environ), os.environ")
    assert result.status == "passed", result.detail
    result = run("import os, sys; assert sys.flags.isolated and 'PYTHONSTARTUP' not in os.environ")
    assert result.status == "passed", result.detail


@linux
def test_environment_of_the_caller_cannot_be_read():
    result = run("import os; open(f'/proc/{os.getppid()}/environ').read()")
    assert result.status == "failed"
    assert "PermissionError" in result.detail


def test_forged_report_is_no_pass():
    guesses = "b'passed ' + b'0' * 32"
    source = f"import os\nfor fd in range(3, 64):\n try: os.write(fd, {guesses})\n"
    result = run(source + " except OSError: pass\nos._exit(0)")
    assert result.status == "failed"


@pytest.mark.parametrize(
    "trick",
    [
        # The runner's own functions replaced, so that the report of a failure is lost.
        "import os\nos._exit = lambda *a: None",
        "import os\nos.write = lambda *a: None",
        "import os\nos.write = os._exit = lambda *a: None",
        "import builtins\nbuiltins.exec = builtins.compile = builtins.type = lambda *a: None",
        "import __main__\n__main__.main = __main__.describe = lambda *a: b''",
        "import json\njson.dumps = json.load = lambda *a, **k: None",
        # Verdicts of one's own, on every way out.
        "print('passed', flush=True)",
        "import os\nfor fd in range(64):\n try: os.write(fd, b'passed')\n except OSError: pass",
        "import os, atexit\natexit.register(lambda: os._exit(0))",
        "import sys, os\nsys.excepthook = lambda *a: os._exit(0)",
        "import sys, os\nsys.unraisablehook = lambda *a: os._exit(0)",
        "class D:\n def __del__(self): import os; os._exit(0)\nd = D()",
        # Leaving before the tests, or not noticing that they fail.
        "import os, signal\nsignal.signal(signal.SIGALRM, lambda *a: os._exit(0))\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.05)\nimport time; time.sleep(1)",
        "import sys\nsys.exit()",
        "import os\nos._exit(0)",
        "import os, signal\nsignal.raise_signal(signal.SIGKILL)",
        "import os\nos.abort()",
        "raise BaseException",
        "import builtins\nbuiltins.AssertionError = type('E', (Exception,), {})",
        "check = lambda candidate: None\n__debug = False",
        "import sys\nsys.flags = sys.modules.clear()",
    ],
)
def test_no_trick_before_failing_tests_counts_as_a_pass(trick):
    tests = "\ndef check(candidate):\n    assert candidate() == 1\ncheck(lambda: 2)\n"
    assert run(trick + tests, timeout_seconds=10).status != "passed"


@linux
def test_a_daemon_does_not_outlive_its_program(tmp_path):
    marker = f"loram-daemon-{os.getpid()}"
    source = (
        "import os, sys, time\n"
        "try:\n"
        "    if os.fork() == 0:\n"
        "        os.setsid()\n"
        "        if os.fork() == 0:\n"
        f"            os.execv(sys.executable, ['python', '-c', 'import time; time.sleep(60)', '{marker}'])\n"
        "        os._exit(0)\n"
        "except OSError: pass\n"
    )
    assert run(source).status == "passed"  # it was refused, and the program went on without it
    assert _processes(marker) == []


@linux
def test_limits_hold_and_cannot_be_raised():
    source = (
        "import resource as r\n"
        "for name, most in ({limits}):\n"
        "    assert r.getrlimit(getattr(r, name))[1] <= most, name\n"
        "    try: r.setrlimit(getattr(r, name), (most * 2, most * 2))\n"
        "    except (ValueError, OSError): continue\n"
        "    raise KeyError(name)\n"
    )
    limits = (
        "('RLIMIT_CPU', 6), ('RLIMIT_AS', 256 * 2**20), ('RLIMIT_FSIZE', 2**24), "
        "('RLIMIT_NOFILE', 64), ('RLIMIT_NPROC', 1), ('RLIMIT_CORE', 1)"
    )
    result = run(source.replace("{limits}", limits))
    assert result.status == "passed", result
    result = run("open_files = []\nwhile True: open_files.append(open('/dev/null'))")
    assert "Too many open files" in result.detail


def test_large_source_and_unicode():
    filler = "x = 'é'\n" * 100_000
    assert run(filler + "assert x == 'é'").status == "passed"


@linux
@pytest.mark.skipif(os.geteuid() != 0, reason="becoming an ordinary user needs root")
def test_ordinary_user_is_confined_too(tmp_path):
    """The same confinement without root, under a system interpreter that such a user can run."""
    interpreter = "/usr/bin/python3"
    if not Path(interpreter).exists():
        pytest.skip("no system Python")
    script = tmp_path / "child.py"
    script.write_text(sandbox._CHILD.read_text())
    for folder in (tmp_path, *tmp_path.parents[:3]):
        folder.chmod(0o755)
    read_end, write_end = os.pipe()
    home = tmp_path / "scratch"
    home.mkdir()
    home.chmod(0o777)
    order = {
        "source": "import socket\ntry: socket.socket()\nexcept OSError: pass\nelse: raise KeyError",
        "token": "T",
        "directory": str(home),
        "report_fd": write_end,
        "timeout_seconds": 5,
        "memory_bytes": 256 * MIB,
    }
    done = subprocess.run(
        [interpreter, "-I", str(script)],
        input=json.dumps(order).encode(),
        pass_fds=(write_end,),
        user=65534,
        group=65534,
        extra_groups=[],
        cwd=home,
        capture_output=True,
    )
    os.close(write_end)
    with os.fdopen(read_end, "rb") as report:
        held, _, verdict = report.read().partition(b"\n")
    if not held:
        pytest.skip(f"the system Python cannot run the child: {done.stderr[-200:]!r}")
    assert verdict == b"passed T", (held, verdict, done.stderr)
    assert json.loads(held)["files"] in ("read-only mounts", "landlock")


@linux
def test_without_namespaces_seccomp_and_landlock_hold(tmp_path, monkeypatch):
    """A kernel that refuses namespaces: the child with that step cut out."""
    text = sandbox._CHILD.read_text()
    step = "    uid, gid = os.geteuid(), os.getegid()\n"
    assert step in text
    child = tmp_path / "child.py"
    child.write_text(text.replace(step, "    return False, False\n" + step))
    monkeypatch.setattr(sandbox, "_CHILD", child)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    result = run(f"import os; os.remove({str(victim)!r})")
    if result.files == "refused in Python":
        pytest.skip("this kernel has no Landlock")
    assert (result.status, result.network, result.files) == ("failed", "seccomp", "landlock")
    assert run(f"open({str(victim)!r}, 'w')").status == "failed"
    assert run("import socket; socket.socket()").status == "failed"
    assert run("open('a', 'w').write('x'); assert open('a').read() == 'x'").status == "passed"
    assert victim.read_text() == "precious"


def test_python_guard_alone_refuses_the_usual_ways(tmp_path, monkeypatch):
    """Neither namespaces, nor Landlock, nor seccomp: what macOS gets."""
    text = sandbox._CHILD.read_text()
    child = tmp_path / "child.py"
    child.write_text(text.replace('sys.platform == "linux"', "False"))
    monkeypatch.setattr(sandbox, "_CHILD", child)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for source in (
        f"import os; os.remove({str(victim)!r})",
        f"open({str(victim)!r}, 'w')",
        "import socket; socket.socket()",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.kill(os.getppid(), 15)",
    ):
        result = run(source)
        assert (result.status, result.network) == ("failed", "refused in Python"), source
        assert "refused in the sandbox" in result.detail, (source, result)
    assert run("open('a', 'w').write('x'); assert open('a').read() == 'x'").status == "passed"
    assert victim.read_text() == "precious"


def test_a_killed_caller_leaves_no_folder_behind(tmp_path):
    code = (
        "from loram_cli.evaluation.sandbox import run_program\n"
        'run_program(\'open("a", "w").write("b")\\nwhile True: pass\', timeout_seconds=60)\n'
    )
    caller = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path)}
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("loram-sandbox-*")):
        assert caller.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.3)
    assert list(tmp_path.iterdir())
    caller.send_signal(signal.SIGKILL)
    caller.wait()
    while list(tmp_path.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_caller_killed_as_it_makes_the_folder_leaves_none_behind(tmp_path):
    code = (
        "import os, pathlib\n"
        "make = pathlib.Path.mkdir\n"
        "pathlib.Path.mkdir = lambda path, mode: (make(path, mode), os.kill(os.getpid(), 9))\n"
        "from loram_cli.evaluation.sandbox import run_program\n"
        "run_program('pass')\n"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    ended = subprocess.run([sys.executable, "-c", code], env=environment)
    assert ended.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 60
    while list(tmp_path.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
